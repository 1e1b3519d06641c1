"""Keys one at a time: a burst of keys means what the same keys mean when they are typed slowly.

Textual hands a key to the widget that has the focus when the key arrives, and the key climbs from there to the
application, widget by widget and message by message. In a paste or over a slow line the next keys arrive meanwhile,
and go to the same widget: the letters behind a `/` would act as keys, because the field is not open yet. So here a key
waits until the one before it has been dealt with, and the screen or field that it opened is there and has the focus.
"""

from __future__ import annotations

import collections
from functools import partial
from typing import TypeVar

from textual import events
from textual.app import App
from textual.dom import DOMNode
from textual.driver import Driver
from textual.message import Message
from textual.timer import Timer

from zerotop.clean import clean

ReturnType = TypeVar("ReturnType")
LOOK_AGAIN_S, LONGEST_WAIT_S = 0.5, 30.0
"""A key whose widget was removed is never reported as handled: at this interval we check whether the widget is still
there. A slow machine is no reason to send the next key early; after LONGEST_WAIT_S it is sent anyway.
"""
ROUNDS, MOST_ROUNDS = 2, 10
"""A key may cause another message, such as a selected option: the second round waits for that. Each change of screen
or focus adds a round."""


class _DealtWith(Message, bubble=True, verbose=True):
    """Follows a key from widget to widget; where it comes out, the key has been handled."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class KeyFlow(App[ReturnType]):
    """An App that handles keys and pasted text one after the other."""

    _busy = False
    _number = 0
    _rounds = 0
    _place: tuple[DOMNode, DOMNode | None] | None = None
    _overdue: Timer | None = None

    def __init__(self, driver_class: type[Driver] | None = None) -> None:
        super().__init__(driver_class=driver_class)
        self._typed: collections.deque[events.Key | events.Paste] = collections.deque()

    async def on_event(self, event: events.Event) -> None:
        if isinstance(event, events.Key | events.Paste) and not event.is_forwarded:
            self._typed.append(events.Paste(clean(event.text)) if isinstance(event, events.Paste) else event)
            if not self._busy:
                await self._next_key()
        else:
            await super().on_event(event)

    def takes(self, event: events.Key | events.Paste) -> bool:
        """Whether typed input may go to the current screen."""
        return True

    async def _next_key(self) -> None:
        self._busy = False
        while self._typed and not self._busy:
            event = self._typed.popleft()
            if not self.takes(event):
                continue
            self._busy, self._rounds = True, 0
            target = self.focused or self.screen
            await super().on_event(event)
            self._follow(target)

    def _follow(self, target: DOMNode) -> None:
        self._number += 1
        self._rounds += 1
        self._place = (self.screen, self.focused)
        if self._overdue is not None:
            self._overdue.stop()
        self._overdue = self.set_timer(LOOK_AGAIN_S, partial(self._look_again, target, LONGEST_WAIT_S))
        if not target.post_message(_DealtWith(self._number)):  # it is being removed
            self.post_message(_DealtWith(self._number))

    def _look_again(self, target: DOMNode, left_s: float) -> None:
        if not self._busy or not self.screen_stack:
            return
        if target.is_attached and left_s > 0:
            left_s -= LOOK_AGAIN_S
            self._overdue = self.set_timer(LOOK_AGAIN_S, partial(self._look_again, target, left_s))
        else:
            self._follow(self)

    async def on__dealt_with(self, message: _DealtWith) -> None:
        message.stop()
        if message.number != self._number or not self.screen_stack:
            return
        moved = self._place != (self.screen, self.focused)
        if self._rounds < ROUNDS or (moved and self._rounds < MOST_ROUNDS):
            # A screen that was pushed takes this only once it is mounted and has set its focus.
            self._follow(self.focused or self.screen)
            return
        if self._overdue is not None:
            self._overdue.stop()
        await self._next_key()
