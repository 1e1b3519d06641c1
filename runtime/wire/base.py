"""The base of all messages."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Message(BaseModel):
    """The base of all messages: immutable, and tolerant of unknown fields."""

    model_config = ConfigDict(frozen=True, extra="ignore")
