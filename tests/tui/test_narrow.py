"""Only changed cells are drawn, and only they are sent."""

from __future__ import annotations

import pytest
from rich.console import Console
from rich.segment import Segment
from rich.style import Style
from textual._compositor import ChopsUpdate
from textual.strip import Strip

from zerotop.tui.narrow import NarrowUpdate
from zerotop.tui.widgets.lines import Row, changed_cells

RED, BLUE = Style(color="red"), Style(color="blue")


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("step 19 of 90", "step 20 of 90", (5, 7)),
        ("step 19 of 90", "step 19 of 91", (12, 13)),
        ("aaaa", "aaab", (3, 4)),
        ("漢字x", "漢字y", (0, 5)),  # a cell of two columns is not cut
        ("same", "same", (0, 4)),
    ],
)
def test_the_changed_cells_of_a_line_are_found(old: str, new: str, expected: tuple[int, int]) -> None:
    before, after = Row().add(old), Row().add(new)
    assert changed_cells(before.strip(before.width), after.strip(after.width)) == expected


def test_cells_of_another_colour_have_changed() -> None:
    old = Strip([Segment("abc", RED), Segment("def", RED), Segment("ghi", BLUE)])
    new = Strip([Segment("abc", RED), Segment("def", BLUE), Segment("ghi", BLUE)])
    assert changed_cells(old, new) == (3, 6)


def test_an_update_is_cropped_on_both_sides() -> None:
    strip = Strip([Segment("0123456789")])
    update = ChopsUpdate([{0: strip, 10: strip}], [(0, 4, 12)], [[10, 20]])
    console = Console(color_system=None, force_terminal=True)
    sent = NarrowUpdate.of(update).render_segments(console)
    assert sent == "\x1b[1;5H456789\x1b[1;11H01"
    assert len(sent) < len(update.render_segments(console))
