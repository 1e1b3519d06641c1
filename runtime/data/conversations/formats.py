"""Recognises what a row holds: messages, ShareGPT, prompt and completion, Alpaca, or text."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from runtime.data import DataError

KEY = "zerotop.data.format"
EXPECTED = (
    '"messages" (a list of {role, content}), "conversations" (a list of {from, value}), "prompt" and "completion", '
    '"instruction" and "output", or "text"'
)

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}
_ROLES = {"function": "tool"}


@dataclass(slots=True)
class Conversation:
    """Messages as a chat template takes them: {role, content, tool_calls ...}, every content a string."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    prompt_messages: int = 0
    """How many of the messages are the prompt of a prompt with completion."""


@dataclass(slots=True)
class Completion:
    """A prompt and the completion that follows it, without a chat template."""

    prompt: str
    completion: str


@dataclass(slots=True)
class Plain:
    """A document."""

    text: str


Row = Conversation | Completion | Plain


class RowError(ValueError):
    """A row that is left out; the text is the reason under which it is counted."""


def recognise(columns: Collection[str], named: str = "auto", where: str = "") -> str:
    """The format of rows with these columns: `named`, unless that is "auto". Raises DataError if it does not fit."""
    have = set(columns)
    found = next((name for name, needed in _NEEDS if any(group <= have for group in needed)), None)
    if named != "auto":
        needed = dict(_NEEDS)[named]
        if not any(group <= have for group in needed):
            wanted = " or ".join(" and ".join(f'"{name}"' for name in sorted(group)) for group in needed)
            raise DataError(
                f'{KEY} is "{named}", which needs the columns {wanted}; {where or "the data"} has {_listed(have)}'
            )
        return named
    if found is None:
        raise DataError(
            f"{KEY}: {where or 'the data'} has the columns {_listed(have)}; expected {EXPECTED}. "
            "Rename the columns, or set the format by name"
        )
    return found


def _listed(columns: Collection[str]) -> str:
    return ", ".join(f'"{name}"' for name in sorted(columns)[:20]) or "no columns"


_NEEDS: list[tuple[str, list[set[str]]]] = [
    ("messages", [{"messages"}]),
    ("sharegpt", [{"conversations"}, {"conversation"}]),
    ("prompt-completion", [{"prompt", "completion"}, {"prompt", "response"}]),
    ("alpaca", [{"instruction", "output"}]),
    ("text", [{"text"}]),
]
"""Format -> the alternative sets of columns that it needs; the first format that fits is taken."""


def parse_row(row: Mapping[str, Any], form: str, has_template: bool) -> Row:
    """What a row of a recognised format holds. Raises RowError with the reason why it is left out."""
    return _PARSERS[form](row, has_template)


def _messages(row: Mapping[str, Any], has_template: bool) -> Row:
    found = _list(row.get("messages"), "messages")
    if found and isinstance(found[0], Mapping) and "role" not in found[0] and "from" in found[0]:
        return _sharegpt({**row, "conversations": found}, has_template)
    return Conversation([_message(message) for message in found], _tools(row))


def _sharegpt(row: Mapping[str, Any], has_template: bool) -> Row:
    found = _list(row.get("conversations", row.get("conversation")), "conversations")
    messages: list[dict[str, Any]] = []
    if isinstance(system := row.get("system"), str) and system.strip():
        messages.append({"role": "system", "content": system})
    for turn in found:
        if not isinstance(turn, Mapping):
            raise RowError("a turn that is not an object")
        if "role" in turn and "from" not in turn:
            messages.append(_message(turn))
            continue
        said = str(turn.get("from", "")).lower()
        role = _SHAREGPT_ROLES.get(said)
        if role is None:
            raise RowError(f'unknown role "{said}"')
        value = turn.get("value")
        if said == "function_call" and (call := _call(value)):
            messages.append({"role": role, "content": "", "tool_calls": [{"type": "function", "function": call}]})
        else:
            messages.append({"role": role, "content": _content(value)})
    return Conversation(messages, _tools(row))


def _call(value: Any) -> dict[str, Any] | None:
    """{name, arguments} of a function call written as JSON; None if it is something else."""
    try:
        parsed = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return None
    if not isinstance(parsed, Mapping) or not isinstance(parsed.get("name"), str):
        return None
    return {"name": parsed["name"], "arguments": _arguments(parsed.get("arguments", {}))}


def _prompt_completion(row: Mapping[str, Any], has_template: bool) -> Row:
    prompt, completion = row.get("prompt"), row.get("completion", row.get("response"))
    if isinstance(completion, list) or isinstance(prompt, list):
        before = [_message(message) for message in prompt] if isinstance(prompt, list) else _said("user", prompt)
        after = (
            [_message(message) for message in completion]
            if isinstance(completion, list)
            else _said("assistant", completion)
        )
        return Conversation([*before, *after], _tools(row), prompt_messages=len(before))
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise RowError("prompt or completion is not text")
    if not completion:
        raise RowError("empty completion")
    return Completion(prompt, completion)


def _said(role: str, text: Any) -> list[dict[str, Any]]:
    if not isinstance(text, str):
        raise RowError("prompt or completion is not text")
    return [{"role": role, "content": text}] if text else []


def _alpaca(row: Mapping[str, Any], has_template: bool) -> Row:
    """With a chat template a question and its answer; without one Stanford's prompt
    (https://github.com/tatsu-lab/stanford_alpaca)."""
    instruction, extra, output = row.get("instruction"), row.get("input") or "", row.get("output")
    if not isinstance(instruction, str) or not isinstance(output, str) or not isinstance(extra, str):
        raise RowError("instruction, input or output is not text")
    if not output:
        raise RowError("empty output")
    system = row.get("system")
    if has_template:
        said = [{"role": "system", "content": system}] if isinstance(system, str) and system.strip() else []
        question = f"{instruction}\n\n{extra}" if extra else instruction
        return Conversation([*said, {"role": "user", "content": question}, {"role": "assistant", "content": output}])
    middle = f"### Instruction:\n{instruction}\n\n" + (f"### Input:\n{extra}\n\n" if extra else "")
    lead = "Below is an instruction that describes a task" + (
        ", paired with an input that provides further context. " if extra else ". "
    )
    prompt = f"{lead}Write a response that appropriately completes the request.\n\n{middle}### Response:\n"
    return Completion(prompt, output)


def _text(row: Mapping[str, Any], has_template: bool) -> Row:
    text = row.get("text")
    if not isinstance(text, str):
        raise RowError("text is not a string")
    if not text:
        raise RowError("empty text")
    return Plain(text)


_PARSERS: dict[str, Callable[[Mapping[str, Any], bool], Row]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "prompt-completion": _prompt_completion,
    "alpaca": _alpaca,
    "text": _text,
}


def _list(value: Any, name: str) -> list[Any]:
    if isinstance(value, str):  # a cell of a CSV file
        try:
            value = json.loads(value)
        except ValueError:
            raise RowError(f"{name} is not a list") from None
    if not isinstance(value, list):
        raise RowError(f"{name} is not a list")
    if not value:
        raise RowError("no messages")
    return value


def _message(message: Any) -> dict[str, Any]:
    """A message without keys that are null, with content as one string and tool arguments as an object."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise RowError("a message without role")
    if len(message) == 2 and type(message.get("content")) is str and message["role"] not in _ROLES:
        return message if type(message) is dict else dict(message)  # as nearly all are: nothing to clean
    kept = {key: value for key, value in message.items() if value is not None}
    kept["role"] = _ROLES.get(kept["role"], kept["role"])
    kept["content"] = _content(kept.get("content", ""))
    if calls := kept.get("tool_calls"):
        kept["tool_calls"] = [_tool_call(call) for call in _list(calls, "tool_calls")]
    else:
        kept.pop("tool_calls", None)
    return kept


def _content(value: Any) -> str:
    """Content as a string; a list of parts of text is joined."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, list):
        parts = []
        for part in value:
            if isinstance(part, str):
                parts.append(part)
            elif isinstance(part, Mapping) and isinstance(part.get("text"), str):
                parts.append(part["text"])
            else:
                kind = part.get("type", "?") if isinstance(part, Mapping) else type(part).__name__
                raise RowError(f'content of the type "{kind}", only text can be trained on')
        return "".join(parts)
    if isinstance(value, Mapping):  # the result of a tool
        return json.dumps(value, ensure_ascii=False)
    raise RowError("content that is not text")


def _tool_call(call: Any) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RowError("a tool call without a function name")
    cleaned = {key: value for key, value in function.items() if value is not None}
    cleaned["arguments"] = _arguments(cleaned.get("arguments", {}))
    if function is call:
        return {"type": "function", "function": cleaned}
    return {**{key: value for key, value in call.items() if value is not None}, "function": cleaned}


def _arguments(value: Any) -> Any:
    """Arguments as the object that chat templates expect; OpenAI's format has them as JSON text."""
    if isinstance(value, str):
        try:
            parsed = json.loads(value)
        except ValueError:
            return value
        return parsed if isinstance(parsed, dict) else value
    return value


def _tools(row: Mapping[str, Any]) -> list[Any] | None:
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError:
            raise RowError("tools is not JSON") from None
    if not tools:
        return None
    if not isinstance(tools, list):
        raise RowError("tools is not a list")
    return tools
