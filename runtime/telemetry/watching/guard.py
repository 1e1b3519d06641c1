"""Keeps what a trainer calls from raising into it: a monitor must not end the training that it watches."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

log = logging.getLogger("runtime.watch")
_warned: set[str] = set()
"""Names of the functions about whose errors a warning was logged."""


def never_raises(function: Callable[Arguments, Result]) -> Callable[Arguments, Result | None]:
    """`function`, which returns None where it would have raised an Exception; the first of each function is logged."""

    @functools.wraps(function)
    def guarded(*arguments: Arguments.args, **named: Arguments.kwargs) -> Result | None:
        try:
            return function(*arguments, **named)
        except Exception as error:
            warn_once(function.__qualname__, f"{function.__qualname__} failed, and training goes on", error)
            return None

    return guarded


def attribute(owner: Any, name: str, default: Any) -> Any:
    """What `owner.name`, or `owner.name()` if it is a method, gives; `default` where this version has no such thing, or
    it raises."""
    try:
        value = getattr(owner, name)
        return value() if callable(value) else value
    except Exception as error:
        warn_once(f"{type(owner).__name__}.{name}", f"{type(owner).__name__}.{name} can't be read", error)
        return default


def warn_once(what: str, text: str, error: Exception) -> None:
    """Log `text` and the error as a warning, unless there was one about `what`."""
    if what not in _warned:
        _warned.add(what)
        log.warning(f"{text}: {type(error).__name__}: {error}", exc_info=error)
