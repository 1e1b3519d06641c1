"""Rows to tokens, and which of them are trained."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from runtime.data import DataError
from runtime.data.conversations.formats import Completion, Conversation, Plain, Row, RowError, parse_row
from runtime.data.conversations.spans import NotFound, Span, TurnFinder
from runtime.data.conversations.template import Renderer, TemplateFailed
from runtime.data.conversations.token_bytes import TokenBytes

NO_TURN = "no assistant turn"
CUT_AWAY = "all trained tokens beyond seq_len"
OVERLONG = "more than seq_len tokens"
EMPTY_MASK = "no trained token"
FULL_MASK = "every token trained"
TURNS_NOT_FOUND = "turns not found in the rendered text"
NO_TOKENS = "fewer than two tokens"


@dataclass(frozen=True)
class Recipe:
    """Everything that says how rows become tokens. Equal recipes make equal tokens."""

    tokenizer: str
    """tokenizer.json, as text."""
    templates: Mapping[str, str]
    variables: Mapping[str, Any]
    """What templates may use beside the messages, such as `bos_token`."""
    specials: tuple[str, ...]
    """Texts of the special tokens."""
    eos: int | None
    vocab_size: int
    train_on: str
    seq_len: int
    overlong: str
    slow: bytes = b""
    """The pickled tokenizer of transformers, where only that one renders the template right."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """How tokens are stored."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)


@dataclass
class Encoded:
    """Samples of a chunk of rows, one after the other."""

    tokens: np.ndarray
    trained: np.ndarray  # uint8, 1: the loss counts the token
    lengths: np.ndarray  # int32
    numbers: np.ndarray  # int64: the rows that the samples come from
    cut: np.ndarray  # int32: tokens that each sample lost to truncation
    rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    wrong: str = ""
    """The text of a row whose mask is empty or full."""
    complaint: str = ""
    """What the chat template or the search for turns said first about a row that it failed on."""


@dataclass(slots=True)
class _Text:
    """A row as text. `spans` None: every token is trained."""

    number: int
    text: str
    spans: list[Span] | None
    plain: bool = False
    """Whether the tokenizer adds its special tokens, as it does for text that comes from no template."""
    must_differ: bool = False
    """Whether something in it is not trained."""


class Encoder:
    """Encodes rows as a recipe says."""

    def __init__(self, recipe: Recipe) -> None:
        from tokenizers import Tokenizer

        self.recipe = recipe
        self._library = Tokenizer.from_str(recipe.tokenizer)
        self._library.no_padding()
        self._library.no_truncation()
        self._bytes = TokenBytes.of(self._library)
        self._finder: TurnFinder | None = None
        self.render: Any = None
        if recipe.templates:
            self.render = _slow_renderer(recipe.slow) if recipe.slow else Renderer(recipe.templates, recipe.variables)

    def encode(self, form: str, rows: Iterable[tuple[int, Mapping[str, Any]]], split: bool = False) -> Encoded:
        """Samples of numbered rows. `split`: overlong samples become several.

        Raises DataError for a row that is too long under overlong "error", and for rows that need a chat template.
        """
        nothing = np.empty(0)
        made = Encoded(nothing, nothing, nothing, nothing, nothing)
        texts: list[_Text] = []
        for number, row in rows:
            made.rows += 1
            try:
                texts.append(self._text(number, parse_row(row, form, self.render is not None)))
            except RowError as reason:
                made.dropped[str(reason)] += 1
            except (TemplateFailed, NotFound) as problem:
                found = isinstance(problem, TemplateFailed)
                made.dropped["the chat template refuses" if found else TURNS_NOT_FOUND] += 1
                if isinstance(problem, NotFound):
                    made.wrong = made.wrong or problem.text[:4000]
                made.complaint = made.complaint or f"row {number}: {problem}"
        self._tokenize(texts, split, made)
        return made

    # ---- rows to text ----------------------------------------------------------------------------------------------
    def _text(self, number: int, row: Row) -> _Text:
        train_on = self.recipe.train_on
        if isinstance(row, Plain):
            if train_on in ("assistant", "completion"):
                raise DataError(
                    f'zerotop.data.train_on is "{train_on}", but text has no turns; write "all" or leave it out'
                )
            return _Text(number, row.text, None, plain=True)
        if isinstance(row, Completion):
            text = row.prompt + row.completion
            if train_on == "all":
                return _Text(number, text, None, plain=True)
            span = Span(len(row.prompt), len(text))
            return _Text(number, text, [span], plain=True, must_differ=bool(row.prompt))
        wanted = self._wanted(row)
        if not any(wanted):
            raise RowError(NO_TURN)
        if train_on == "all":
            return _Text(number, self._rendered(row), None)
        if self._finder is None:
            self._finder = TurnFinder(self.render, list(self.recipe.templates.values()), self.recipe.specials)
        text, spans = self._finder.find(row.messages, row.tools, wanted)
        others = any(message["content"] and not want for message, want in zip(row.messages, wanted, strict=True))
        return _Text(number, text, spans, must_differ=others)

    def _rendered(self, row: Conversation) -> str:
        text: str = self.render(row.messages, row.tools)
        return text

    def _wanted(self, row: Conversation) -> list[bool]:
        """Which messages are trained."""
        if self.render is None:
            raise DataError(
                "zerotop.data: the rows are conversations, but the tokenizer has no chat template (a base model's "
                "often has none); name a file with one in zerotop.data.chat_template"
            )
        wanted = [_speaks(message) for message in row.messages]
        train_on = self.recipe.train_on
        if train_on == "completion" or (train_on == "auto" and row.prompt_messages):
            turns = [at for at, want in enumerate(wanted) if want]
            first = row.prompt_messages or (turns[-1] if turns else 0)
            wanted = [want and at >= first for at, want in enumerate(wanted)]
        return wanted

    # ---- text to tokens --------------------------------------------------------------------------------------------
    def _tokenize(self, texts: Sequence[_Text], split: bool, made: Encoded) -> None:
        ids: list[np.ndarray] = []
        masks: list[np.ndarray] = []
        numbers: list[int] = []
        cut: list[int] = []
        for text, tokens, mask in self._masked(texts):
            for one, trained, lost in self._fit(text, tokens, mask, split, made):
                ids.append(one)
                masks.append(trained)
                numbers.append(text.number)
                cut.append(lost)
        made.tokens = np.concatenate(ids) if ids else np.empty(0, self.recipe.dtype)
        made.trained = np.concatenate(masks) if masks else np.empty(0, np.uint8)
        made.lengths = np.array([len(one) for one in ids], dtype=np.int32)
        made.numbers = np.array(numbers, dtype=np.int64)
        made.cut = np.array(cut, dtype=np.int32)

    def _masked(self, texts: Sequence[_Text]) -> Iterator[tuple[_Text, np.ndarray, np.ndarray]]:
        """(text, its tokens, which of them are trained): first those from a template, then the others."""
        for plain in (False, True):
            some = [text for text in texts if text.plain is plain]
            quick = [text for text in some if text.spans is None or (self._bytes is not None and not plain)]
            placed = {id(text) for text in some} - {id(text) for text in quick}
            found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
            for text, encoding in self._encoded(quick, plain, places=False):
                tokens = np.array(encoding.ids, dtype=self.recipe.dtype)
                if (mask := self._mask_by_bytes(text, tokens)) is not None:
                    found[id(text)] = self._ended(tokens, mask, plain)
                else:
                    placed.add(id(text))
            for text, encoding in self._encoded([text for text in some if id(text) in placed], plain, places=True):
                tokens = np.array(encoding.ids, dtype=self.recipe.dtype)
                found[id(text)] = self._ended(tokens, _mask(text, encoding), plain)
            for text in some:
                yield text, *found[id(text)]

    def _encoded(self, texts: Sequence[_Text], plain: bool, places: bool) -> Iterator[tuple[_Text, Any]]:
        """Each text and what the library makes of it. places: whether that says where its tokens are."""
        encode = self._library.encode_batch if places else self._library.encode_batch_fast
        return zip(texts, encode([text.text for text in texts], add_special_tokens=plain), strict=True)

    def _mask_by_bytes(self, text: _Text, tokens: np.ndarray) -> np.ndarray | None:
        """Which tokens are trained; None if their lengths don't tell."""
        if text.spans is None:
            return np.ones(len(tokens), np.uint8)
        assert self._bytes is not None
        edges = self._bytes.indices(text.text, tokens, [edge for span in text.spans for edge in span])
        if edges is None:
            return None
        mask = np.zeros(len(tokens), np.uint8)
        for first, after in zip(edges[::2], edges[1::2], strict=True):
            mask[first:after] = 1
        return mask

    def _ended(self, tokens: np.ndarray, mask: np.ndarray, plain: bool) -> tuple[np.ndarray, np.ndarray]:
        """Both with an end-of-text token, which is trained, after a text that comes from no template."""
        eos = self.recipe.eos
        if not plain or eos is None or (len(tokens) and tokens[-1] == eos):
            return tokens, mask
        return np.append(tokens, self.recipe.dtype.type(eos)), np.append(mask, np.uint8(1))

    def _fit(
        self, text: _Text, tokens: np.ndarray, mask: np.ndarray, split: bool, made: Encoded
    ) -> Iterable[tuple[np.ndarray, np.ndarray, int]]:
        """The samples that a row gives, with the tokens that each lost: one, none, or several if it may be split."""
        seq_len = self.recipe.seq_len
        if len(tokens) < 2:
            made.dropped[NO_TOKENS] += 1
            return
        if text.spans is not None and (not mask.any() or (text.must_differ and mask.all())):
            made.dropped[FULL_MASK if mask.any() else EMPTY_MASK] += 1
            made.wrong = made.wrong or text.text[:4000]
            return
        lost = max(0, len(tokens) - seq_len)
        if lost:
            if split:
                for first in range(0, len(tokens) - 1, seq_len):
                    yield tokens[first : first + seq_len], mask[first : first + seq_len], 0
                return
            if self.recipe.overlong == "error":
                raise DataError(
                    f"row {text.number} has {len(tokens):,} tokens, more than zerotop.data.seq_len = {seq_len:,}; "
                    'raise seq_len, or set zerotop.data.overlong to "truncate" or "drop"'
                )
            if self.recipe.overlong == "drop":
                made.dropped[OVERLONG] += 1
                return
            if not mask[1:seq_len].any():
                made.dropped[CUT_AWAY] += 1
                return
            tokens, mask = tokens[:seq_len], mask[:seq_len]
        if not mask[1:].any():
            made.dropped[EMPTY_MASK] += 1
            return
        yield tokens, mask, lost


def _speaks(message: Mapping[str, Any]) -> bool:
    """Whether it is a turn of the assistant that says something and that the data does not take out of training."""
    if message["role"] not in ("assistant", "model") or message.get("weight") == 0 or message.get("train") is False:
        return False
    return bool(message["content"].strip() or message.get("tool_calls"))


def _mask(text: _Text, encoding: Any) -> np.ndarray:
    """Which tokens are trained: those that overlap a span."""
    encoded = len(encoding)
    mask = np.zeros(encoded, np.uint8)
    for start, end in text.spans or ():
        first = _token_from(encoding, start, end)
        if first is not None:
            after = _token_from(encoding, end, len(text.text))
            mask[first : encoded if after is None else after] = 1
    return mask


def _token_from(encoding: Any, start: int, stop: int) -> int | None:
    """The first token that holds a character from `start` on, before `stop`; some tokenizers leave spaces out."""
    for at in range(start, stop):
        if (token := encoding.char_to_token(at)) is not None:
            return int(token)
    return None


def _slow_renderer(pickled: bytes) -> Any:
    """The renderer of a tokenizer of transformers, for templates that template.py renders otherwise."""
    tokenizer = pickle.loads(pickled)

    def render(messages: Any, tools: Any = None, prompt: bool = False) -> str:
        try:
            text: str = tokenizer.apply_chat_template(
                list(messages), tools=tools, tokenize=False, add_generation_prompt=prompt
            )
        except Exception as error:  # as in template.Renderer
            raise TemplateFailed(f"{type(error).__name__}: {error}") from error
        return text

    return render
