"""GPUs on the screen: calm while they are healthy, a word in colour when they are not, figures on the rank screen."""

from __future__ import annotations

import pytest

from tests.tui.screen_reading import OpenApp, screen_text, settle
from tests.tui.scripted_run import GPU_FAULTS, ScriptedRun
from zerotop.tui.app import ZerotopApp

SIZES = [(80, 24), (120, 40), (200, 50)]


def a_run(faults: bool = False) -> ScriptedRun:
    run = ScriptedRun(ranks=8, gpu=True)
    run.steps(5)
    if faults:
        run.gpu_changes = dict(GPU_FAULTS)
    for _ in range(3):
        run.steps(1)
        run.node()
    return run


def gpu_lines(app: ZerotopApp) -> str:
    """The lines about the GPU on the rank screen."""
    lines = screen_text(app)
    first = next(y for y, line in enumerate(lines) if line.startswith(" GPU "))
    return "\n".join(lines[first : first + 2])


@pytest.mark.parametrize("size", SIZES)
async def test_healthy_gpus_take_no_room_on_the_main_screen(open_app: OpenApp, size: tuple[int, int]) -> None:
    async with open_app(a_run(), size=size) as (app, _, _):
        assert "GPU alarm" not in "\n".join(screen_text(app))


@pytest.mark.parametrize("size", SIZES)
async def test_each_fault_is_a_word_in_its_ranks_line(open_app: OpenApp, size: tuple[int, int]) -> None:
    async with open_app(a_run(faults=True), size=size) as (app, pilot, run):
        lines = screen_text(app)
        top = next(y for y, line in enumerate(lines) if "GPU alarm" in line)
        for rank, word in ((1, "power cap"), (2, "ECC errors"), (3, "hot"), (5, "lost"), (7, "no answer")):
            assert f"▲ {word}" in lines[top + 1 + rank]
        assert not any("▲" in lines[top + 1 + rank] for rank in (0, 4, 6))
        run.gpu_changes.clear()
        run.steps(1)
        run.node()
        await settle(app, pilot)
        text = "\n".join(screen_text(app))
        assert "GPU alarm" in text  # the columns stay where they are
        assert "ECC errors" not in text


@pytest.mark.parametrize("size", SIZES)
async def test_the_rank_screen_has_the_figures_of_its_gpu(open_app: OpenApp, size: tuple[int, int]) -> None:
    async with open_app(a_run(), size=size) as (app, pilot, _):
        await pilot.press("enter")
        await settle(app, pilot)
        text = gpu_lines(app)
        for part in ("GPU 0", "util 97%", "SM 81%", "640/700 W", "1830/1980 MHz", "61/87 °C", "tensor 42%", "DRAM 55%"):
            assert part in text, text
        for part in ("NVLink out 37.3 GiB/s", "gen 5 x16", "NV18 to 7", "per million tokens"):
            assert part in text or size[0] < 200, text


@pytest.mark.parametrize(
    ("rank", "parts"),
    [
        (1, ["▲ power cap", "1200/1980 MHz", "500/500 W"]),
        (3, ["▲ hot", "▲ PCIe x8"]),
        (4, ["SM n/a", "no permission: SM"]),
        (5, ["▲ lost: the driver has lost it: reboot; check power, cooling, seating"]),
        (6, ["n/a since 12 s: PCIe, ECC errors"]),
        (7, ["▲ no answer", "util n/a", "n/a since 42 s: util, power, temp, SM clock"]),
    ],
)
async def test_what_is_wrong_comes_first_on_the_rank_screen(open_app: OpenApp, rank: int, parts: list[str]) -> None:
    async with open_app(a_run(faults=True), size=(80, 24)) as (app, pilot, _):
        await pilot.press(*["down"] * rank, "enter")
        await settle(app, pilot)
        text = gpu_lines(app)
        assert all(part in text for part in parts), text
        assert all(len(line) <= 80 for line in screen_text(app))


async def test_a_cpu_rank_has_no_line_about_a_gpu(open_app: OpenApp) -> None:
    async with open_app(size=(120, 40)) as (app, pilot, _):
        await pilot.press("enter")
        await settle(app, pilot)
        assert not any(line.startswith(" GPU ") for line in screen_text(app))


async def test_the_rank_screen_says_what_binds_where_there_is_room(open_app: OpenApp) -> None:
    for size, shown in (((150, 40), True), ((100, 24), False)):
        async with open_app(a_run(), size=size) as (app, pilot, _):
            await pilot.press("enter")
            await settle(app, pilot)
            head = "\n".join(screen_text(app)[:9])
            assert ("ceiling " in head) == shown, head
