"""What rank 0 tells of its start, and until when."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.telemetry.handler import StartHandler
from runtime.wire.startnote import MOST_CHARACTERS, begin_start, end_start, read_start, tell_start


@pytest.fixture
def sockets(tmp_path: Path) -> Iterator[Path]:
    begin_start(tmp_path)
    yield tmp_path
    end_start()


def test_the_newest_line_is_read(sockets: Path) -> None:
    assert read_start(sockets) == ""
    tell_start("importing torch")
    tell_start("loading weights:\n 43%")
    assert read_start(sockets) == "loading weights: 43%"
    assert [path.name for path in sockets.iterdir()] == ["starting"]
    tell_start("x" * 1000)
    assert len(read_start(sockets)) == MOST_CHARACTERS


def test_other_ranks_and_ranks_that_have_introduced_themselves_tell_nothing(tmp_path: Path) -> None:
    tell_start("importing torch")
    begin_start(tmp_path)
    end_start()
    tell_start("importing torch")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_gone_hurts_nobody(sockets: Path) -> None:
    sockets.rmdir()
    tell_start("importing torch")
    assert read_start(sockets) == ""


def test_progress_that_is_logged_is_told(sockets: Path) -> None:
    logger = logging.getLogger("tests.startnote")
    logger.setLevel(logging.INFO)
    handler = StartHandler(logging.INFO)
    logger.addHandler(handler)
    try:
        logger.info("tokenizing: %d%%", 43)
        logger.debug("details")
    finally:
        logger.removeHandler(handler)
    assert read_start(sockets) == "tokenizing: 43%"
