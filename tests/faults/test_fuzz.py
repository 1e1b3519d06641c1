"""Bad bytes against the sockets of a hub, and of a screen. With 200,000 frames: python -m tests.faults.fuzz."""

from __future__ import annotations

from tests.faults.fuzz.__main__ import attack_hub, attack_screen


def test_bad_frames_neither_end_a_hub_nor_act_nor_pile_up() -> None:
    report = attack_hub(frames=1500, seed=7)
    assert report.problems() == []
    assert report.hub["refused"] > 1000


def test_bad_frames_from_a_hub_do_not_end_a_screen() -> None:
    source = attack_screen(frames=1500, seed=7)
    assert source.state.ranks.keys() <= set(range(2**17))
