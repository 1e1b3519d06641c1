"""Where in a rendered conversation the assistant's turns begin and end, for any chat template.

[Note: markers]
A template that does not mark what the assistant writes (`{% generation %}`) tells it only by what it renders. So every
message gets marks, private-use characters around what it says, and the text is rendered once with them; where they
are, the messages are. Without them the text must be the one that the template renders of the unmarked conversation.

    header of the turn     from the end of the previous message to the header's end, as the template writes it when it
                           is asked for a prompt (`add_generation_prompt`) after that message: the span begins there.
                           Before a first message, the header itself is searched backwards from the message.
    the assistant's text   marks stand inside surrounding whitespace, which templates trim, and after `</think>`, if the
                           template mentions it: it then cuts off what stands before
    tool calls             marks stand after the last text of the last call's arguments, or around its name
    end of the turn        the first end-of-turn token after the message, which is trained, too. Which tokens those are
                           is found with conversations of our own.

Marks could change what a template does, if it looks at more of a message than whether it is empty. The plain text is
rendered, too, and compared: for the first conversations and every so often, and always where a message holds a text
that the template mentions (`startswith("<tool_response>")`), where a mark got lost, or where the data has private-use
characters of its own. Where they differ, fewer messages are marked, then one at a time, and at last the turns are found
by rendering the conversation up to each of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from runtime.data.conversations.template import TemplateFailed, literals

Messages = Sequence[Mapping[str, Any]]
Render = Callable[..., str]
"""Called with messages, tools and `prompt`, like template.Renderer."""

_PLANES = (0xF0000, 0x100000)
_PLANE_SIZE = 0xFFFE
_REASONED = "</think>"
_PRIVATE = re.compile("[\U000f0000-\U0010fffd]")
CHECKED_FIRST = 64
CHECKED_EVERY = 32


class Span(NamedTuple):
    """Characters of the text, from `start` up to `end`."""

    start: int
    end: int


class NotFound(ValueError):
    """The assistant's turns were not found in what the template renders, which is `text`."""

    def __init__(self, problem: str, text: str = "") -> None:
        super().__init__(problem)
        self.text = text


@dataclass(slots=True)
class _Places:
    """Where a message is in the text: None where a mark was not set or got lost."""

    start: int | None = None
    end: int | None = None


class TurnFinder:
    """Finds the assistant's turns in what one chat template renders. See [Note: markers]."""

    def __init__(self, render: Render, sources: Sequence[str], specials: Sequence[str]) -> None:
        """sources: the templates' texts. specials: texts of the tokenizer's special tokens."""
        self._render = render
        found = set().union(*(literals(source) for source in sources)) if sources else set()
        self._reasons = any(_REASONED in text for text in found)
        self._mentions = _any_of(found)
        self._specials = _any_of(specials)
        self._seen = 0
        self._trusted = True
        self._tails: dict[str, list[str]] = {}
        """Role of a message -> what was found to follow it up to the end of the header of the assistant's turn."""
        self.header = self._find_header()
        self.ends, self._plain_end = self._find_ends()
        self._end = _any_of(self.ends)

    # ---- what the template does, found with conversations of our own ------------------------------------------------
    def _find_header(self) -> str:
        """What the template appends when it is asked for a prompt; empty if it appends nothing."""
        probe = [{"role": "user", "content": "x"}]
        try:
            without, with_header = self._render(probe), self._render(probe, prompt=True)
        except TemplateFailed:
            return ""
        return with_header[len(without) :] if with_header.startswith(without) else ""

    def _find_ends(self) -> tuple[list[str], str]:
        """(the tokens that end a turn of the assistant, longest first; the text that ends it if there are none)."""
        user, mark = {"role": "user", "content": "x"}, chr(_PLANES[0])
        said = {"role": "assistant", "content": "y" + mark}
        call = {"type": "function", "function": {"name": "f", "arguments": {"a": "y" + mark}}}
        called = {"role": "assistant", "content": "", "tool_calls": [call]}
        result = {"role": "tool", "content": "z", "name": "f"}
        ends: set[str] = set()
        tails = []
        for probe in ([user, said], [user, said, user], [user, called], [user, called, result]):
            try:
                text = self._render(probe)
            except TemplateFailed:
                continue  # a template without tools
            if mark not in text:
                continue
            tail = text[text.index(mark) + 1 :]
            tails.append(tail)
            if self._specials and (first := self._specials.search(tail)):
                ends.add(first.group())
        return sorted(ends, key=len, reverse=True), _common(tails[0], tails[1]) if len(tails) > 1 else ""

    # ---- one conversation ------------------------------------------------------------------------------------------
    def find(self, messages: Messages, tools: list[Any] | None, wanted: Sequence[bool]) -> tuple[str, list[Span]]:
        """(the rendered text, the spans of the messages that are `wanted`, in order).

        Raises TemplateFailed if the template does not take the conversation, NotFound if turns are not found in it.
        """
        self._seen += 1
        every = range(len(messages))
        marked = self._mark(messages, every, wanted)
        plain = None
        try:
            text, places, complete = marked.read(self._render(marked.messages, tools))
        except TemplateFailed:
            plain, complete, text, places = self._render(messages, tools), False, "", []
        if complete and not self._must_check(marked):
            return text, self._spans(text, messages, tools, places, wanted)
        if plain is None:
            plain = self._render(messages, tools)
        if text != plain:
            if complete and not marked.has_private and not self._mentioned(marked):
                self._trusted = False
            places = self._without_trust(plain, messages, tools, wanted)
        elif not complete and any(wanted[at] and places[at].end is None for at in every):
            places = self._one_at_a_time(plain, messages, tools, wanted, places)
        return plain, self._spans(plain, messages, tools, places, wanted)

    def _mark(self, messages: Messages, which: Sequence[int], wanted: Sequence[bool]) -> _Marked:
        return _Marked(messages, which, wanted, self._reasons)

    def _must_check(self, marked: _Marked) -> bool:
        if self._trusted and self._seen > CHECKED_FIRST and self._seen % CHECKED_EVERY:
            return marked.has_private or self._mentioned(marked)
        return True

    def _mentioned(self, marked: _Marked) -> bool:
        return self._mentions is not None and self._mentions.search(marked.said) is not None

    def _without_trust(
        self, plain: str, messages: Messages, tools: list[Any] | None, wanted: Sequence[bool]
    ) -> list[_Places]:
        """Places in a conversation in which the marks of all messages changed the text."""
        marked = self._mark(messages, [at for at in range(len(messages)) if wanted[at]], wanted)
        try:
            text, places, complete = marked.read(self._render(marked.messages, tools))
        except TemplateFailed:
            text, complete = "", False
        if text == plain and complete:
            return places
        return self._one_at_a_time(plain, messages, tools, wanted, [_Places() for _ in messages])

    def _one_at_a_time(
        self,
        plain: str,
        messages: Messages,
        tools: list[Any] | None,
        wanted: Sequence[bool],
        known: list[_Places],
    ) -> list[_Places]:
        places = list(known)
        for at, message in enumerate(messages):
            if places[at].end is not None:
                continue
            marked = self._mark(messages, [at], wanted)
            try:
                text, found, _ = marked.read(self._render(marked.messages, tools))
            except TemplateFailed:
                text = ""
            if text == plain and (found[at].end is not None if text else False):
                places[at] = found[at]
            elif wanted[at]:
                places[at] = self._by_prefix(plain, messages, tools, at, message)
        return places

    def _by_prefix(
        self, plain: str, messages: Messages, tools: list[Any] | None, at: int, message: Mapping[str, Any]
    ) -> _Places:
        """The place of a message, from the text that the conversation up to it renders to."""
        try:
            before = self._render(messages[:at], tools, prompt=True) if at else ""
            through = self._render(messages[: at + 1], tools)
        except TemplateFailed as error:
            raise NotFound(f"no mark of message {at + 1} in the text, and: {error}", plain) from None
        start, end = len(_common(before, plain)), len(_common(through, plain))
        if start < end and end == len(through):
            last = start
            for found in self._end.finditer(plain, start, end) if self._end is not None else ():
                last = found.start()
            return _Places(start, last if last > start else end - len(self._plain_end))
        content = str(message.get("content", "")).rpartition("</think>")[2].strip()
        if content and (place := plain.find(content, start)) >= 0:
            return _Places(place, place + len(content))
        raise NotFound(f"message {at + 1} is not in the text that the template renders", plain)

    def _spans(
        self,
        text: str,
        messages: Messages,
        tools: list[Any] | None,
        places: Sequence[_Places],
        wanted: Sequence[bool],
    ) -> list[Span]:
        spans: list[Span] = []
        for at, place in enumerate(places):
            if not wanted[at] or place.end is None:
                continue
            start = self._start(text, messages, tools, places, at)
            if spans and start < spans[-1].end:
                raise NotFound("turns overlap in the text that the template renders", text)
            spans.append(Span(start, self._stop(text, messages[at], place.end, _next_edge(places, at + 1, len(text)))))
        return spans

    def _start(self, text: str, messages: Messages, tools: list[Any] | None, places: Sequence[_Places], at: int) -> int:
        """Where the header of a turn ends."""
        place = places[at]
        latest = place.start if place.start is not None else place.end
        assert latest is not None
        before = places[at - 1].end if at else None
        if before is not None and before <= latest:
            role = messages[at - 1]["role"]
            tails = self._tails.get(role, ())
            for gap in _gaps(text, before, messages[at - 1]):
                for tail in tails:
                    if text.startswith(tail, gap) and gap + len(tail) <= latest:
                        return gap + len(tail)
            if (start := self._learn_tail(text, messages, tools, before, at, latest)) is not None:
                return start
        edge = max((spot.end for spot in places[:at] if spot.end is not None), default=0)
        if self.header and (found := text.rfind(self.header, edge, latest)) >= 0:
            return found + len(self.header)
        if at:
            try:
                return min(latest, max(edge, len(_common(self._render(messages[:at], tools, prompt=True), text))))
            except TemplateFailed:
                return latest
        return latest

    def _learn_tail(
        self, text: str, messages: Messages, tools: list[Any] | None, before: int, at: int, latest: int
    ) -> int | None:
        """The end of the header after the message before `at`, found by rendering up to there and asking for a
        prompt; None if the template does not render that."""
        previous = dict(messages[at - 1])
        previous["content"] = str(previous.get("content", "")).strip()
        marked = self._mark([*messages[: at - 1], previous], [at - 1], [True] * at)
        try:
            prompt, places, _ = marked.read(self._render(marked.messages, tools, prompt=True))
        except TemplateFailed:
            return None
        if (end := places[-1].end) is None:
            return None
        tail = prompt[end:]
        gap, length = max(
            ((gap, len(_common(tail, text[gap:latest]))) for gap in _gaps(text, before, messages[at - 1])),
            key=lambda found: found[1],
        )
        if length == 0:
            return None
        known = self._tails.setdefault(messages[at - 1]["role"], [])
        if len(known) < 16:
            known.append(tail[:length])
            known.sort(key=len, reverse=True)
        return gap + length

    def _stop(self, text: str, message: Mapping[str, Any], end: int, bound: int) -> int:
        """Where the end-of-turn token after a message ends."""
        if self._end is not None and (found := self._end.search(text, end)) and found.start() < bound:
            return found.end()
        if not self.ends and self._plain_end:
            for gap in _gaps(text, end, message):
                if text.startswith(self._plain_end, gap):
                    return min(bound, gap + len(self._plain_end))
        return end


class _Marked:
    """A copy of a conversation with marks in some of its messages: two private-use characters per message."""

    def __init__(self, messages: Messages, which: Sequence[int], wanted: Sequence[bool], reasons: bool) -> None:
        """which: the messages to mark. reasons: whether the template cuts off what stands before `</think>`."""
        self._reasons = reasons
        self.said = "\0".join([text for message in messages for text in _said(message)])
        """Everything that the messages say."""
        self.has_private = not self.said.isascii() and _PRIVATE.search(self.said) is not None
        self._base = _free(self.said if self.has_private else "", 2 * len(messages))
        self._marks = re.compile(f"([{chr(self._base)}-{chr(self._base + 2 * len(messages) - 1)}])")
        self._set: set[int] = set()
        """Numbers of the marks in the messages: 2 * message for its start, + 1 for its end."""
        chosen = set(which)
        self.messages = [
            self._mark(message, at, wanted[at]) if at in chosen else message for at, message in enumerate(messages)
        ]

    def _mark(self, message: Mapping[str, Any], at: int, assistant: bool) -> Mapping[str, Any]:
        opened, closed = chr(self._base + 2 * at), chr(self._base + 2 * at + 1)
        content = message.get("content", "")
        simple = len(message) == 2 and type(content) is str and content and not (assistant and self._reasons)
        if simple and content.strip() is content:  # strip() returns what it leaves whole
            self._set.add(2 * at + 1)
            if not assistant:
                return {"role": message["role"], "content": content + closed}
            self._set.add(2 * at)
            return {"role": message["role"], "content": opened + content + closed}
        calls = message.get("tool_calls") if assistant else None
        marked = dict(message)
        inner = content.strip() if isinstance(content, str) else ""
        if inner:
            lead_text = trail = ""
            if len(inner) < len(content):
                lead = content.index(inner)
                lead_text, trail = content[:lead], content[lead + len(inner) :]
            if assistant:
                if self._reasons and (cut := inner.rfind(_REASONED)) >= 0:
                    cut += len(_REASONED)
                    rest = inner[cut:].lstrip()
                    lead_text += inner[: len(inner) - len(rest)] if rest else inner + trail
                    inner, trail = rest, trail if rest else ""
                self._set.add(2 * at)
                inner = opened + inner
            if not calls:
                self._set.add(2 * at + 1)
                inner += closed
            marked["content"] = lead_text + inner + trail
        if calls:
            marked["tool_calls"] = self._mark_calls(calls, at, opened if not inner else "", closed)
        elif not inner and assistant:
            for key in ("reasoning_content", "thinking", "reasoning"):
                if isinstance(message.get(key), str) and message[key].strip():
                    said = message[key]
                    marked[key] = said.rstrip() + closed + said[len(said.rstrip()) :]
                    self._set.add(2 * at + 1)
                    break
        return marked

    def _mark_calls(self, calls: Sequence[Any], at: int, opened: str, closed: str) -> list[Any]:
        """The calls with `opened` before the first one's name, and `closed` in the last one: after its last argument
        that is text, else after its name."""
        copies = [{**call, "function": dict(call["function"])} for call in calls]
        if opened:
            copies[0]["function"]["name"] = opened + copies[0]["function"]["name"]
            self._set.add(2 * at)
        last = copies[-1]["function"]
        arguments = _append(last.get("arguments"), closed)
        if arguments is None:
            last["name"] += closed
        else:
            last["arguments"] = arguments
        self._set.add(2 * at + 1)
        return copies

    def read(self, text: str) -> tuple[str, list[_Places], bool]:
        """(the text without marks, the places of the messages, whether every mark is there exactly once, in order)."""
        places = [_Places() for _ in self.messages]
        pieces = self._marks.split(text)  # text, mark, text, mark, ..., text
        numbers: list[int] = []
        where = 0
        for piece, found in zip(pieces[::2], pieces[1::2], strict=False):
            mark = ord(found) - self._base
            numbers.append(mark)
            where += len(piece)
            place = places[mark >> 1]  # a function's name is repeated with its result: the first one is the call
            if mark & 1:
                if place.end is None:
                    place.end = where
            elif place.start is None:
                place.start = where
        return "".join(pieces[::2]), places, numbers == sorted(self._set)


def _append(value: Any, mark: str) -> Any:
    """A copy of `value` with `mark` after the text that it ends with; None if it does not end with text."""
    if isinstance(value, str):
        return value + mark if value.strip() == value and value else None
    if isinstance(value, Mapping) and value:
        *rest, key = value
        if (last := _append(value[key], mark)) is not None:
            return {**{name: value[name] for name in rest}, key: last}
    if isinstance(value, list) and value and (last := _append(value[-1], mark)) is not None:
        return [*value[:-1], last]
    return None


def _said(message: Mapping[str, Any]) -> list[str]:
    """All texts in a message."""
    if len(message) == 2 and type(message.get("content")) is str:  # and a role, as nearly all have
        return [*message.values()]
    return _texts(message)


def _texts(value: Any) -> list[str]:
    """All texts in a message."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return []
    found: list[str] = []
    for item in value:
        if type(item) is str:
            found.append(item)
        else:
            found += _texts(item)
    return found


def _free(text: str, count: int) -> int:
    """The first of `count` private-use characters in a row that are not in the text."""
    used = sorted({ord(character) for character in _PRIVATE.findall(text)})
    for plane in _PLANES:
        first = plane
        for character in [*(one for one in used if plane <= one < plane + _PLANE_SIZE), plane + _PLANE_SIZE]:
            if character - first >= count:
                return first
            first = character + 1
    raise NotFound("too many messages, or too many private-use characters in them")


def _next_edge(places: Sequence[_Places], first: int, end: int) -> int:
    """Where the first message from `first` on begins or, if its start is not known, ends; `end` if there is none."""
    for at in range(first, len(places)):
        place = places[at]
        if place.start is not None:
            return place.start
        if place.end is not None:
            return place.end
    return end


def _gaps(text: str, at: int, message: Mapping[str, Any]) -> tuple[int, ...]:
    """Where the template's own text may go on after a message's mark: there, or after the whitespace at the message's
    end, if the template keeps it."""
    content = message.get("content", "")
    if not (isinstance(content, str) and content and content[-1].isspace()):
        return (at,)
    trail = content[len(content.rstrip()) :]
    return (at + len(trail), at) if trail and text.startswith(trail, at) else (at,)


def _common(one: str, two: str) -> str:
    """The longest common beginning."""
    if one.startswith(two):
        return two
    length = next((at for at, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
    return one[:length]


def _any_of(texts: set[str] | Sequence[str]) -> re.Pattern[str] | None:
    """A pattern that matches any of the texts, the longest first; None without texts."""
    ordered = sorted({text for text in texts if text}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None
