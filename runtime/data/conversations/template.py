"""Renders chat templates without transformers, whose import takes the tokenizing processes seconds.

The environment is the one that templates are written for (https://huggingface.co/docs/transformers/chat_templating):
a sandbox with trimmed blocks, `raise_exception`, `strftime_now`, `tojson` that keeps characters as they are, loop
controls and `{% generation %}`. prepare.py compares it with the tokenizer's own rendering before it is relied on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

Message = Mapping[str, Any]
_OF_LOOPS = frozenset({"first", "last", "index", "index0", "length", "previtem", "nextitem"})
_REASONING = ("reasoning_content", "thinking", "reasoning")


class TemplateFailed(ValueError):
    """The template does not take these messages; the text is the template's own where it raised one."""


class Renderer:
    """The tokenizer's chat templates, compiled. `templates`: by name; "tool_use" is used where there are tools."""

    def __init__(self, templates: Mapping[str, str], variables: Mapping[str, Any]) -> None:
        environment = _environment()
        self.sources = dict(templates)
        self._compiled = {name: environment.from_string(source) for name, source in templates.items()}
        self._variables = dict(variables)

    def __call__(self, messages: Sequence[Message], tools: list[Any] | None = None, prompt: bool = False) -> str:
        """The conversation as text. `prompt`: ends it with the header of the assistant's next turn."""
        name = "tool_use" if tools and "tool_use" in self._compiled else "default"
        try:
            return self._compiled[name].render(
                messages=[_with_reasoning(message) for message in messages],
                tools=tools,
                documents=None,
                add_generation_prompt=prompt,
                **self._variables,
            )
        except Exception as error:  # a template may fail in any way on messages that it does not expect
            raise TemplateFailed(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__) from error


def _with_reasoning(message: Message) -> Message:
    """The message with its reasoning under both names that templates read."""
    if len(message) == 2:  # role and content
        return message
    for name in _REASONING:
        if message.get(name) is not None:
            return {"thinking": message[name], **message, "reasoning_content": message[name]}
    return message


def _environment() -> Any:
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.runtime import LoopContext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Sandbox(ImmutableSandboxedEnvironment):
        """The sandbox, which need not look twice at `loop.first` and the like."""

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            if type(obj) is LoopContext and attr in _OF_LOOPS:
                return True
            return bool(super().is_safe_attribute(obj, attr, value))

    class Generation(Extension):
        """`{% generation %} ... {% endgeneration %}` renders what is inside."""

        tags = {"generation"}  # noqa: RUF012  (jinja2's own declaration)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def strftime_now(layout: str) -> str:
        return datetime.now().strftime(layout)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


def literals(source: str) -> set[str]:
    """Texts of a template with which it may compare, split or replace parts of a message."""
    import jinja2

    tree = _environment().parse(source)
    found: set[str] = set()
    for kind in (jinja2.nodes.Compare, jinja2.nodes.Call, jinja2.nodes.Filter):
        for node in tree.find_all(kind):
            found.update(const.value for const in node.find_all(jinja2.nodes.Const) if isinstance(const.value, str))
    return {text for text in found if len(text.strip()) > 1 and text not in _WORDS}


_WORDS = frozenset(
    [
        "user",
        "assistant",
        "system",
        "tool",
        "developer",
        "function",
        "ipython",
        "model",
        "content",
        "text",
        "image",
        "role",
        "name",
        "arguments",
        "tool_calls",
        "reasoning_content",
        "thinking",
        "tools",
        "string",
        "none",
        "default",
        "type",
    ]
)
"""Literals that templates compare roles and keys with."""
