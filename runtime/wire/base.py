"""The base of all messages."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Message(BaseModel):
    """The base of all messages: immutable, and tolerant of unknown fields."""

    # Deferred: few processes make messages of every kind, and building the validators of all takes 50 ms.
    model_config = ConfigDict(frozen=True, extra="ignore", defer_build=True)
