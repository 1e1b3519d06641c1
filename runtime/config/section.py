"""The base of every config section and the number types: strict, so that "16" or true is never taken for a number."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict
from pydantic_core import PydanticCustomError

from .errors import shown


class Section(BaseModel):
    """One object of the config file: immutable, without keys other than its fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def wrong(expected: str, got: Any) -> PydanticCustomError:
    """The validation error "expected ..., got ..."."""
    return PydanticCustomError("wrong_type", "{text}", {"text": f"expected {expected}, got {shown(got)}"})


def integer(value: Any) -> int:
    """A JSON number without fraction, within 64 bits."""
    # 5e8 is how people write five hundred million in JSON, and it parses as a float.
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong("a whole number", value)
    if isinstance(value, float) and not value.is_integer():
        raise wrong("a whole number", value)
    if not -(2**63) <= value < 2**63:
        raise wrong("a whole number that fits in 64 bits", value)
    return int(value)


def number(value: Any) -> float:
    """A finite JSON number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong("a number", value)
    try:
        found = float(value)
    except OverflowError:
        raise wrong("a number that fits a float", value) from None
    if not math.isfinite(found):
        raise wrong("a finite number", value)
    return found


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise wrong("true or false", value)
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise wrong("a string", value)
    if not value.strip() or "\0" in value:
        raise wrong("a string with something in it", value)
    return value


def _texts(value: Any) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list | tuple):
        raise wrong("a list of strings", value)
    return tuple(_text(item) for item in items)


def _pair(value: Any) -> tuple[float, float]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise wrong("a list of two numbers", value)
    return number(value[0]), number(value[1])


def _betas(value: Any) -> tuple[float, float]:
    betas = _pair(value)
    if not all(0.0 <= beta < 1.0 for beta in betas):
        raise wrong("two numbers, each at least 0 and less than 1", value)
    return betas


Int = Annotated[int, BeforeValidator(integer)]
"""A whole number; 5e8 counts, true and "5" do not."""
Num = Annotated[float, BeforeValidator(number)]
"""A finite number."""
Flag = Annotated[bool, BeforeValidator(_flag)]
Text = Annotated[str, BeforeValidator(_text)]
Texts = Annotated[tuple[str, ...], BeforeValidator(_texts)]
"""A list of strings; one string counts as a list of one."""
Pair = Annotated[tuple[float, float], BeforeValidator(_pair)]
Betas = Annotated[tuple[float, float], BeforeValidator(_betas)]
