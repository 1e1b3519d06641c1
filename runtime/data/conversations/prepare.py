"""From the config section to prepared data: what the trainer calls before the first step."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable, Mapping, Sequence
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
from runtime.data.conversations.packing import hashed, pack, separate
from runtime.data.conversations.readers import Reader
from runtime.data.conversations.report import make_report
from runtime.data.conversations.sources import Source, find_sources, source_digest
from runtime.data.conversations.store import Store, is_complete
from runtime.data.conversations.stream import Cursor, StreamSpec, build_segment
from runtime.data.conversations.streaming import StreamingBatches
from runtime.process.extras import INSTALL_FINETUNING
from runtime.wire.finetuning import DataReport

VERSION = 3
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
    """What a run trains and evaluates on. Of streamed data `train` is the first segment."""

    train: Prepared
    evaluation: Prepared | None
    seed: int
    stream: StreamSpec | None = None
    plan: Callable[[Store, int], Sequences] | None = None
    """Makes sequences of a segment of the stream."""

    def batches(
        self, micro_batch: int, accumulation: int, rank: int, world: int, pin: bool = False
    ) -> TrainingBatches | StreamingBatches:
        """One rank's micro-batches of every step."""
        if self.stream is not None and self.plan is not None:
            return StreamingBatches(self.stream, self.plan, self.seed, micro_batch, accumulation, rank, world, pin)
        return TrainingBatches(self.train.sequences, self.seed, micro_batch, accumulation, rank, world, pin)

    def evaluation_batches(
        self, micro_batch: int, rank: int, world: int, pin: bool = False
    ) -> EvaluationBatches | None:
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
    if data.weights and len(data.weights) != len(data.files):
        raise DataError(
            f"zerotop.data.weights has {len(data.weights)} numbers, but zerotop.data.files has {len(data.files)} "
            "entries; expected one each"
        )
    share = evaluation.split if evaluation is not None else None
    recipe, template = make_recipe(data, tokenizer, vocab_size, folder)
    files = _Files(data, folder, cache, log, tokenizer, template)
    held: Prepared | None = None
    if evaluation is not None and evaluation.files:  # first: the shorter of the two
        other = files.stored(evaluation.files, recipe, "zerotop.evaluation.files")
        held = files.evaluated(other, np.arange(len(other.store)), evaluation, seed)
    found = files.segment(recipe) if data.streaming else files.stored(data.files, recipe)
    store = found.store
    rows = np.arange(len(store))
    set_aside = {}
    if evaluation is not None and share is not None:
        is_held = _is_held(store, seed, share)
        held_rows = rows[is_held]
        if not len(held_rows) or is_held.all():
            raise DataError(
                f"zerotop.evaluation.split: {share} of {len(store):,} samples leaves {len(held_rows):,} to evaluate on "
                f"and {len(rows) - len(held_rows):,} to train on; give more data or another share"
            )
        held = files.evaluated(found, held_rows, evaluation, seed, held_out=True)
        set_aside["held out by zerotop.evaluation.split"] = len(held_rows)
        rows = rows[~is_held]
    unweighted = len(rows)
    rows = _chosen(store, data, seed, share)
    if not len(rows):
        raise DataError("zerotop.data.weights leaves no sample; raise the weights or give more data")
    if left_out := unweighted - len(np.unique(rows)):
        set_aside["left out by zerotop.data.weights"] = left_out
    train = files.prepared(found, "train", rows, seed, set_aside)

    def plan(segment: Store, number: int) -> Sequences:
        return files.sequences(segment, recipe, _chosen(segment, data, seed, share), seed + number)

    return PreparedData(train, held, seed, found.spec, plan)


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
        raise DataError(f"zerotop.data: chat templates need the jinja2 library: {INSTALL_FINETUNING}") from None
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
@dataclass(frozen=True)
class _Found:
    """A store, the recipe with which it was built, and whether it was in the cache. spec: of streamed data."""

    store: Store
    recipe: Recipe
    cached: bool
    spec: StreamSpec | None = None


@dataclass(frozen=True)
class _Files:
    """What is the same for all files of a run."""

    data: DataConfig
    folder: Path
    cache: Path
    log: Log
    tokenizer: Any
    template: str

    def stored(self, files: Sequence[str], recipe: Recipe, key: str = "zerotop.data.files") -> _Found:
        """The store of some files, which is built if it is not in the cache."""
        data = self.data
        sources = find_sources(files, self.folder, data.split, key)
        path = self.cache / _digest(sources, recipe, data.format)
        cached = is_complete(path)
        if not cached:
            recipe = _compare(sources, data, recipe, self.tokenizer)
        store = build_store(path, Reader(sources, data.format), recipe, data.workers, self.log)
        return _Found(store, recipe, cached)

    def segment(self, recipe: Recipe) -> _Found:
        """The first segment of the training data."""
        data = self.data
        sources = find_sources(data.files, self.folder, data.split, streaming=True)
        recipe = _compare(sources, data, recipe, self.tokenizer)
        digest = _digest(sources, recipe, data.format)
        spec = StreamSpec(tuple(sources), data.format, recipe, data.segment_rows, data.workers, str(self.cache), digest)
        cached = is_complete(spec.folder(Cursor()))
        store = build_segment(spec, Cursor(), self.log)
        if not len(store):
            raise DataError(
                f"zerotop.data.files: none of the first {store.meta['rows']:,} rows gives a sample: "
                + ", ".join(f"{name}: {count:,}" for name, count in store.meta["dropped"].items())
            )
        return _Found(store, recipe, cached, spec)

    def sequences(self, store: Store, recipe: Recipe, samples: np.ndarray, seed: int) -> Sequences:
        """These samples of a store, packed or not."""
        lengths, counted = np.asarray(store.lengths), np.asarray(store.counted)
        if self.data.packing:
            plan = pack(samples, lengths, counted, recipe.seq_len, seed)
        else:
            plan = separate(samples, lengths, counted)
        padding = next((one for one in (self.tokenizer.pad_token_id, recipe.eos) if one is not None), 0)
        return Sequences(store, plan, padding, int(plan.lengths.max(initial=0)) if self.data.packing else None)

    def evaluated(
        self, found: _Found, samples: np.ndarray, evaluation: EvaluationConfig, seed: int, held_out: bool = False
    ) -> Prepared:
        """Sequences to evaluate on: of these samples as many as `evaluation` asks for. held_out: they are a part of the
        training data."""
        some = _limited(found.store, samples, evaluation, seed)
        more = len(samples) - len(some)
        set_aside = {f"beyond zerotop.evaluation.samples = {evaluation.samples:,}": more} if more else {}
        return self.prepared(found, "evaluation", some, seed, set_aside, held_out)

    def prepared(
        self,
        found: _Found,
        role: Literal["train", "evaluation"],
        samples: np.ndarray,
        seed: int,
        set_aside: dict[str, int],
        held_out: bool = False,
    ) -> Prepared:
        """Sequences of these samples, and the report on them; see make_report."""
        store, tokenizer = found.store, self.tokenizer
        sequences = self.sequences(store, found.recipe, samples, seed)
        plan = sequences.plan
        report = make_report(
            role,
            store,
            plan,
            found.recipe,
            lambda ids: str(tokenizer.decode(ids, skip_special_tokens=False)),
            _names(tokenizer),
            template=self.template if _TEMPLATED.intersection(store.meta["forms"]) else "",
            packed=self.data.packing,
            set_aside=set_aside,
            held_out=held_out,
            cached=found.cached,
            complete=found.spec is None,
        )
        digest = hashlib.blake2b(store.folder.name.encode(), digest_size=16)
        digest.update(plan.samples.tobytes())
        digest.update(plan.offsets.tobytes())
        return Prepared(sequences, report, digest.hexdigest())


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


def _is_held(store: Store, seed: int, share: float) -> np.ndarray:
    """Which samples are held out for evaluation."""
    return _row_hash(store, seed, _HOLD_OUT) < np.uint64(min(int(share * 2.0**64), 2**64 - 1))


def _chosen(store: Store, data: DataConfig, seed: int, share: float | None) -> np.ndarray:
    """The samples to train on: those that are not held out, as often as the weight of their entry says. A fraction is a
    random part of them."""
    samples = np.arange(len(store))
    if share is not None:
        samples = samples[~_is_held(store, seed, share)]
    if not data.weights:
        return samples
    entry_of = np.array(store.meta["entries"])
    weights = np.array(data.weights)[entry_of[np.asarray(store.files)[samples]]]
    whole = np.floor(weights).astype(np.int64)
    part = _row_hash(store, seed, _HALF)[samples].astype(np.float64) / 2.0**64 < weights - whole
    return np.repeat(samples, whole + part)


_TEMPLATED = frozenset({"messages", "sharegpt", "alpaca", "prompt-completion"})
