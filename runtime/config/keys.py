"""Selects the keys that zerotop implements; notes or refuses DeepSpeed's other keys, and reports unknown ones."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import ValidationError

from .deepspeed_keys import NO_EFFECT, REFUSED, SPELLINGS, STAGE3_PREFIX, deepspeed_key_names
from .errors import Findings, Path, dotted, nearest, shown
from .section import Section

AUTO = "auto"

S = TypeVar("S", bound=Section)


def select_keys(model: type[Section], raw: Any, path: Path, found: Findings) -> dict[str, Any]:
    """The keys of `raw` that are fields of `model`, recursively, without values that are null or "auto"; all others are
    recorded in `found`."""
    if not isinstance(raw, Mapping):
        found.problem(path, f": expected an object, got {shown(raw)}")
        return {}
    kept: dict[str, Any] = {}
    for key, value in raw.items():
        here = (*path, str(key))
        if path == ("zero_optimization",) and STAGE3_PREFIX + str(key) in model.model_fields:
            key = STAGE3_PREFIX + str(key)
        if str(key) not in model.model_fields:
            _handle_foreign_key(model, here, value, found)
        elif value is None:
            continue
        elif (section := section_of(model, str(key))) is not None:
            kept[str(key)] = select_keys(section, value, here, found)
        elif (item := item_section_of(model, str(key))) is not None and isinstance(value, list | tuple):
            kept[str(key)] = [
                select_keys(item, one, (*here, str(index)), found) if isinstance(one, Mapping) else one
                for index, one in enumerate(value)
            ]
        elif value == AUTO:
            found.autos.add(here)
        else:
            kept[str(key)] = value
    return kept


def validate(model: type[S], kept: Mapping[str, Any], path: Path, found: Findings) -> S | None:
    """An instance of `model`, or None after every wrong value was recorded as a problem."""
    try:
        return model.model_validate(kept)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            where = (*path, *(str(part) for part in detail["loc"]))
            found.problem(where, f": {_describe_error(detail)}")
        return None


def section_of(model: type[Section], key: str) -> type[Section] | None:
    """The section that the field `key` holds, or None when it holds a plain value."""
    annotation = model.model_fields[key].annotation
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    sections = [option for option in options if isinstance(option, type) and issubclass(option, Section)]
    return sections[0] if len(sections) == 1 else None


def item_section_of(model: type[Section], key: str) -> type[Section] | None:
    """The section of which the field `key` holds a list; None if it holds something else."""
    annotation = model.model_fields[key].annotation
    if typing.get_origin(annotation) is not tuple:
        return None
    item = typing.get_args(annotation)[0]
    item = typing.get_args(item)[0] if typing.get_origin(item) is Annotated else item
    return item if isinstance(item, type) and issubclass(item, Section) else None


def _handle_foreign_key(model: type[Section], here: Path, value: Any, found: Findings) -> None:
    """Record a key that is not a field of its section: refused, without effect, or unknown."""
    key = dotted(here)
    if here[0] == "zero_optimization":
        key = key.replace(STAGE3_PREFIX, "")
    key = SPELLINGS.get(key, key)
    for name, inner in value.items() if isinstance(value, Mapping) else ():
        refused, reason = REFUSED.get(f"{key}.{name}", (None, ""))
        if refused is not None and refused(inner):
            found.problem((*here, str(name)), f": {reason}")
            return
    if key in REFUSED and REFUSED[key][0](value):
        found.problem(here, f": {REFUSED[key][1]}")
    elif key in NO_EFFECT:
        if value is not None and not (isinstance(value, Mapping) and value.get("enabled") is False):
            found.ignored(here, NO_EFFECT[key])
    elif key not in REFUSED:
        _unknown(model, here, found)


_LENIENT_SECTIONS = ("fp16", "bf16", "activation_checkpointing", "data_types", "optimizer", "scheduler")
"""Sections in which DeepSpeed ignores keys that it does not know."""


def _unknown(model: type[Section], here: Path, found: Findings) -> None:
    """Record an unknown key. One that resembles a known key is a typing mistake, which must not be ignored; any other,
    in a section where DeepSpeed ignores it, comes from another version or tool and gets a note."""
    section, name = here[:-1], here[-1]
    fields = f"{' of ' + dotted(section) if section else ''}: {', '.join(model.model_fields)}"
    if near := nearest(name, {*model.model_fields, *deepspeed_key_names(section)}):
        found.problem(here, f": unknown key. Did you mean {dotted((*section, near))}?")
    elif near := nearest(name, found.vocabulary):
        found.problem(here, f": unknown key. Did you mean {dotted(found.vocabulary[near])}?")
    elif len(section) == 1 and section[0] in _LENIENT_SECTIONS and not found.origin.place(here).startswith("--set"):
        found.ignored(here, f"it is an unknown key. Known keys{fields}")
    else:
        found.problem(here, f": unknown key. Known keys{fields}")


def key_paths(model: type[Section], section: Path) -> typing.Iterator[Path]:
    """The path of every field, outer ones first."""
    for name in model.model_fields:
        yield (*section, name)
    for name in model.model_fields:
        if inner := section_of(model, name):
            yield from key_paths(inner, (*section, name))


_BOUNDS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}


def _describe_error(detail: Mapping[str, Any]) -> str:
    """pydantic's finding as "expected ..., got ..."."""
    context = detail.get("ctx", {})
    got = shown(detail["input"])
    for name, words in _BOUNDS.items():
        if name in context:
            return f"expected {words} {context[name]:g}, got {got}"
    if detail["type"] == "literal_error":
        return f"expected {context['expected'].replace(chr(39), chr(34))}, got {got}{_near_choice(detail)}"
    if detail["type"] == "missing":
        return "expected a value, got nothing"
    return str(detail["msg"])


def _near_choice(detail: Mapping[str, Any]) -> str:
    if not isinstance(detail["input"], str):
        return ""
    choices = [part.strip(" '") for part in detail["ctx"]["expected"].replace(" or ", ", ").split(",")]
    near = nearest(detail["input"], choices)
    return f". Did you mean {near}?" if near else ""
