"""From the config section to prepared data: what the trainer calls before the first step."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from runtime.config.finetune import DataConfig, EvaluationConfig
from runtime.config.zerotop import ZerotopConfig
from runtime.data import DataError
from runtime.data.cache import Log, cache_folder
from runtime.data.conversations.batches import EvaluationBatches, Sequences, TrainingBatches
from runtime.data.conversations.build import build_store
from runtime.data.conversations.encode import Encoder, Recipe
from runtime.data.conversations.packing import Plan, hashed, pack, separate
from runtime.data.conversations.report import make_report, notes_of
from runtime.data.conversations.sources import Reader, Source, find_sources, source_digest
from runtime.data.conversations.store import Store, is_complete
from runtime.wire.messages import DataReport

VERSION = 1
"""Part of every digest: raise it when the same settings give other tokens."""
_COMPARED_ROWS = 16

_HOLD_OUT, _HALF, _LIMIT = 2, 3, 4
"""Purposes of hashes of row numbers."""


@dataclass
class Prepared:
    """Sequences to train or evaluate on."""

    sequences: Sequences
    report: DataReport
    digest: str
    """Changes with the sequences: with the data, the settings and the seed."""


@dataclass
class PreparedData:
    """What a run trains and evaluates on."""

    train: Prepared
    evaluation: Prepared | None
    seed: int

    def batches(
        self, micro_batch: int, accumulation: int, rank: int, world: int, pin: bool = False
    ) -> TrainingBatches:
        """One rank's micro-batches of every step."""
        return TrainingBatches(self.train.sequences, self.seed, micro_batch, accumulation, rank, world, pin)

    def evaluation_batches(self, micro_batch: int, rank: int, world: int, pin: bool = False) -> EvaluationBatches | None:
        """One rank's forward passes of an evaluation; None without held-out data."""
        if self.evaluation is None:
            return None
        return EvaluationBatches(self.evaluation.sequences, micro_batch, rank, world, pin)


def prepare_all(
    section: ZerotopConfig, tokenizer: Any, vocab_size: int, folder: Path, log: Log, cache: Path | None = None
) -> PreparedData:
    """Prepare the data of `section`, or find it in the cache.

    tokenizer: one of transformers. vocab_size: rows of the model's embedding. folder: where relative paths start.
    Raises ConfigError and DataError, naming the key, for anything that cannot be used.
    """
    cache = cache or cache_folder("conversations")
    data, evaluation, seed = section.data, section.evaluation, section.train.seed
    if not data.files:
        raise DataError(
            'zerotop.data.files is empty; name the data to fine-tune on, for example ["chats.jsonl"] or '
            '["hf://datasets/OWNER/NAME"]'
        )
    recipe, template = make_recipe(data, tokenizer, vocab_size, folder)
    store, cached, recipe = _stored(data.files, data, recipe, tokenizer, folder, cache, log)
    rows = np.arange(len(store))
    held: Prepared | None = None
    pieces = _Pieces(store, recipe, tokenizer, template, cached, data)
    if evaluation is not None and evaluation.split is not None:
        share = _row_hash(store, seed, _HOLD_OUT)
        is_held = share < np.uint64(int(evaluation.split * 2.0**64))
        rows, held_rows = rows[~is_held], rows[is_held]
        if not len(held_rows) or not len(rows):
            raise DataError(
                f"zerotop.evaluation.split: {evaluation.split} of {len(store):,} samples leaves "
                f"{len(held_rows):,} to evaluate on and {len(rows):,} to train on; give more data or another share"
            )
        held = pieces.prepared("evaluation", _limited(store, held_rows, evaluation, seed), seed)
    elif evaluation is not None and evaluation.files:
        other, other_cached, other_recipe = _stored(
            evaluation.files, data, recipe, tokenizer, folder, cache, log, "zerotop.evaluation.files"
        )
        chosen = _limited(other, np.arange(len(other)), evaluation, seed)
        held = _Pieces(other, other_recipe, tokenizer, template, other_cached, data).prepared("evaluation", chosen, seed)
    rows = _weighted(store, rows, data, seed)
    if not len(rows):
        raise DataError("zerotop.data.weights leaves no sample; raise the weights or give more data")
    return PreparedData(pieces.prepared("train", rows, seed), held, seed)


# ---- the recipe ------------------------------------------------------------------------------------------------------
def make_recipe(data: DataConfig, tokenizer: Any, vocab_size: int, folder: Path) -> tuple[Recipe, str]:
    """(how rows become tokens, where the chat template comes from)."""
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"zerotop.data.tokenizer: {type(tokenizer).__name__} has no tokenizer.json; save a fast tokenizer "
            "(tokenizer.save_pretrained with use_fast) beside the model"
        )
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= vocab_size:
        raise DataError(
            f"zerotop.data.tokenizer: its largest token id is {largest:,}, but the model's embedding has only "
            f"{vocab_size:,} rows; use the tokenizer that belongs to the model, or name what you added in "
            "zerotop.model.new_tokens, for which rows are added"
        )
    templates, origin = _templates(data, tokenizer, folder)
    added = tokenizer.added_tokens_decoder.values()
    specials = {str(token.content) for token in added if token.special} | set(_names(tokenizer).values())
    recipe = Recipe(
        tokenizer=tokenizer.backend_tokenizer.to_str(),
        templates=templates,
        variables=dict(tokenizer.special_tokens_map),
        specials=tuple(sorted(specials)),
        eos=tokenizer.eos_token_id,
        vocab_size=vocab_size,
        train_on=data.train_on,
        seq_len=data.seq_len,
        overlong=data.overlong,
    )
    return recipe, origin


def _templates(data: DataConfig, tokenizer: Any, folder: Path) -> tuple[dict[str, str], str]:
    """(chat templates by name, where they come from); empty without one."""
    if data.chat_template is not None:
        path = folder / Path(data.chat_template).expanduser()
        try:
            source = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            what = getattr(error, "strerror", None) or str(error)
            raise DataError(f"zerotop.data.chat_template: cannot read {path}: {what}") from None
        return _compiled({"default": source}, str(path)), str(path)
    found = tokenizer.chat_template
    if not found:
        return {}, ""
    if isinstance(found, str):
        found = {"default": found}
    elif not isinstance(found, Mapping):
        found = {one["name"]: one["template"] for one in found}
    if "default" not in found:
        raise DataError(
            f"zerotop.data: the tokenizer has the chat templates {', '.join(found)}, but none called default; name a "
            "file with the one to use in zerotop.data.chat_template"
        )
    origin = f"the tokenizer's ({tokenizer.name_or_path})" if tokenizer.name_or_path else "the tokenizer's"
    return _compiled(dict(found), origin), origin


def _compiled(templates: dict[str, str], origin: str) -> dict[str, str]:
    """The same templates, once they are known to compile."""
    from runtime.data.conversations.template import Renderer

    try:
        Renderer(templates, {})
    except ImportError:
        raise DataError(
            "zerotop.data: chat templates need the jinja2 library (pip install 'zerotop[train,finetune]')"
        ) from None
    except Exception as error:  # jinja2's errors, which cannot be named without importing it
        raise DataError(f"zerotop.data.chat_template: {origin} is not a Jinja template: {error}") from None
    return templates


def _names(tokenizer: Any) -> dict[int, str]:
    """Special tokens by id."""
    return {
        int(number): str(text)
        for number, text in zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
    } | {int(number): str(token.content) for number, token in tokenizer.added_tokens_decoder.items() if token.special}


# ---- the store -------------------------------------------------------------------------------------------------------
def _stored(
    files: Sequence[str],
    data: DataConfig,
    recipe: Recipe,
    tokenizer: Any,
    folder: Path,
    cache: Path,
    log: Log,
    key: str = "zerotop.data.files",
) -> tuple[Store, bool, Recipe]:
    """(the store of some files, whether it was there, the recipe with which it was built)."""
    sources = find_sources(files, folder, data.split, key)
    path = cache / _digest(sources, recipe, data.format)
    cached = is_complete(path)
    if not cached:
        recipe = _compare(sources, data, recipe, tokenizer)
    store = build_store(path, Reader(sources, data.format), recipe, data.workers, log)
    return store, cached, recipe


def _digest(sources: Sequence[Source], recipe: Recipe, form: str) -> str:
    settings = [VERSION, source_digest(sources), form]
    settings += [getattr(recipe, name) for name in ("tokenizer", "templates", "variables", "specials", "eos")]
    settings += [recipe.dtype.name, recipe.vocab_size, recipe.train_on, recipe.seq_len, recipe.overlong]
    return hashlib.blake2b(json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def _compare(sources: Sequence[Source], data: DataConfig, recipe: Recipe, tokenizer: Any) -> Recipe:
    """The recipe, with the tokenizer of transformers in it if that renders the first conversations differently."""
    if not recipe.templates:
        return recipe
    from runtime.data.conversations.formats import Conversation, RowError, parse_row
    from runtime.data.conversations.template import TemplateFailed

    encoder = Encoder(recipe)
    template: Any = recipe.templates if len(recipe.templates) > 1 else recipe.templates["default"]
    reader = Reader(sources, data.format)
    chunk = next(reader.chunks(), None)
    if chunk is None:
        return recipe
    compared = 0
    for _, row in chunk.numbered([]):
        try:
            parsed = parse_row(row, chunk.form, True)
            if not isinstance(parsed, Conversation):
                continue
            ours = encoder.render(parsed.messages, parsed.tools)
        except (RowError, TemplateFailed):
            continue
        named = template if isinstance(template, str) else template.get("tool_use" if parsed.tools else "default")
        theirs = tokenizer.apply_chat_template(
            parsed.messages, tools=parsed.tools, tokenize=False, chat_template=named or template["default"]
        )
        if ours != theirs:
            tokenizer.chat_template = template
            return Recipe(**{**recipe.__dict__, "slow": pickle.dumps(tokenizer)})
        compared += 1
        if compared == _COMPARED_ROWS:
            break
    return recipe


# ---- which samples ---------------------------------------------------------------------------------------------------
def _row_hash(store: Store, seed: int, purpose: int) -> np.ndarray:
    """64 bits per sample that depend on its file and row: all samples of a row share them."""
    files = np.asarray(store.files, np.uint64)
    return hashed(np.asarray(store.numbers, np.uint64) + (files << np.uint64(40)), seed, purpose)


def _limited(store: Store, samples: np.ndarray, evaluation: EvaluationConfig, seed: int) -> np.ndarray:
    """At most `evaluation.samples` of them, chosen at random."""
    if evaluation.samples is None or len(samples) <= evaluation.samples:
        return samples
    order = np.argsort(_row_hash(store, seed, _LIMIT)[samples], kind="stable")
    return np.sort(samples[order[: evaluation.samples]])


def _weighted(store: Store, samples: np.ndarray, data: DataConfig, seed: int) -> np.ndarray:
    """Samples as often as the weight of their entry says; a fraction is a random part of them."""
    if not data.weights:
        return samples
    if len(data.weights) != len(data.files):
        raise DataError(
            f"zerotop.data.weights has {len(data.weights)} numbers, but zerotop.data.files has {len(data.files)} "
            "entries; expected one each"
        )
    entry_of = np.array(store.meta["entries"])
    weights = np.array(data.weights)[entry_of[np.asarray(store.files)[samples]]]
    whole = np.floor(weights).astype(np.int64)
    part = _row_hash(store, seed, _HALF)[samples].astype(np.float64) / 2.0**64 < weights - whole
    return np.repeat(samples, whole + part)


@dataclass(frozen=True)
class _Pieces:
    """What is the same for the training and the held-out samples of a store."""

    store: Store
    recipe: Recipe
    tokenizer: Any
    template: str
    cached: bool
    data: DataConfig

    def prepared(self, role: Literal["train", "evaluation"], samples: np.ndarray, seed: int) -> Prepared:
        """Sequences of these samples, and the report on them."""
        store, recipe, data = self.store, self.recipe, self.data
        plan = self._plan(samples, seed)
        tokenizer = self.tokenizer
        padding = next((one for one in (tokenizer.pad_token_id, recipe.eos) if one is not None), 0)
        width = int(plan.lengths.max(initial=0)) if data.packing else None
        report = make_report(
            role,
            store,
            plan,
            recipe,
            lambda ids: str(tokenizer.decode(ids, skip_special_tokens=False)),
            _names(tokenizer),
            template=self.template if any(form in _TEMPLATED for form in store.meta["forms"]) else "",
            packed=data.packing,
            notes=notes_of(store, recipe),
            cached=self.cached,
        )
        digest = hashlib.blake2b(store.folder.name.encode(), digest_size=16)
        digest.update(plan.samples.tobytes())
        digest.update(plan.offsets.tobytes())
        return Prepared(Sequences(store, plan, padding, width), report, digest.hexdigest())

    def _plan(self, samples: np.ndarray, seed: int) -> Plan:
        lengths, counted = np.asarray(self.store.lengths), np.asarray(self.store.counted)
        if self.data.packing:
            return pack(samples, lengths, counted, self.recipe.seq_len, seed)
        return separate(samples, lengths, counted)


_TEMPLATED = frozenset({"messages", "sharegpt", "alpaca", "prompt-completion"})
