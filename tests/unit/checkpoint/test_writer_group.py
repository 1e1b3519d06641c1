"""Writers that meet at a socket and exchange values, some of which are gone, late, or not writers at all."""

from __future__ import annotations

import shutil
import socket
import tempfile
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from runtime.checkpoint.saving import writer_group
from runtime.checkpoint.saving.writer_group import PeerLost, WriterGroup, listen_anywhere, listen_for_hosts
from runtime.wire.signature import GROUP_KEY_VARIABLE, SignatureError

WORLD = 3


@pytest.fixture(params=["one host", "several hosts"])
def place(request, monkeypatch):
    """(address, listening socket)."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    place = listen_anywhere() if request.param == "one host" else listen_for_hosts()
    yield place
    if request.param == "one host":
        shutil.rmtree(Path(place[0]).parent, ignore_errors=True)  # where they have not met


def together(place: Any, act: Callable[[WriterGroup], Any], world: int = WORLD) -> list[Any]:
    """What `act` returns or raises on every rank, each on a thread."""
    address, listener = place
    found: list[Any] = [None] * world

    def run(rank: int) -> None:
        try:
            with closing(WriterGroup(address, rank, world, listener if rank == 0 else None)) as group:
                found[rank] = act(group)
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in reversed(range(world))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("key", [None, "secret"])
def test_values_go_around(place, monkeypatch, key):
    if key:
        monkeypatch.setenv(GROUP_KEY_VARIABLE, key)

    def act(group: WriterGroup) -> Any:
        return (
            group.gather_objects({"rank": group.rank, "rows": [("a", 1)]}),
            group.broadcast_object(f"of {group.rank}"),
            group.gather_objects("x" * 3_000_000)[2][-1],
        )

    expected = [{"rank": rank, "rows": [["a", 1]]} for rank in range(WORLD)]
    assert together(place, act) == [(expected, "of 0", "x")] * WORLD


def test_one_rank_alone(place):
    assert together(place, lambda group: group.gather_objects(1), world=1) == [[1]]


def test_the_socket_is_gone_when_all_have_met():
    place = listen_anywhere()
    assert Path(place[0]).parent.stat().st_mode & 0o077 == 0
    together(place, lambda group: None)
    assert not Path(place[0]).parent.exists()


def test_a_folder_of_temporary_files_with_a_long_path(tmp_path, monkeypatch):
    long = tmp_path / ("long" * 25)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    assert together(listen_anywhere(), lambda group: group.rank) == [0, 1, 2]
    assert list(long.iterdir()) == []


def test_a_writer_that_is_gone_is_noticed_by_all(place):
    def act(group: WriterGroup) -> Any:
        if group.rank == 1:
            group.close()
            return "gone"
        return group.gather_objects(None)

    found = together(place, act)
    assert isinstance(found[0], PeerLost) and found[1] == "gone"


def test_rank_0_that_is_gone_is_noticed(place):
    def act(group: WriterGroup) -> Any:
        if group.rank == 0:
            group.close()
            return "gone"
        return group.broadcast_object(None)

    found = together(place, act)
    assert found[0] == "gone" and all(isinstance(error, PeerLost) for error in found[1:])


def test_who_does_not_come_is_named(place, monkeypatch):
    monkeypatch.setattr(writer_group, "MEETING_S", 0.3)
    with pytest.raises(TimeoutError, match=r"the writers of ranks \[1, 2\] did not come within 0.3 s"):
        WriterGroup(place[0], 0, WORLD, place[1])


def test_a_meeting_place_that_nobody_opens(short_folder, monkeypatch):
    monkeypatch.setattr(writer_group, "MEETING_S", 0.2)
    with pytest.raises(TimeoutError, match=r"rank 0's writer was not at .*/nowhere within 0.2 s"):
        WriterGroup(str(short_folder / "nowhere"), 1, WORLD, None)


def test_rank_0_without_a_socket_gives_up_at_once():
    with pytest.raises(PeerLost, match="rank 0 does not listen at /nowhere"):
        WriterGroup("/nowhere", 0, WORLD, None)


def test_strangers_are_left_outside(monkeypatch):
    """They speak no hello, or no sense, or name a rank that is taken or none."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(writer_group, "HELLO_S", 0.2)
    place = listen_for_hosts()
    strangers = [socket.create_connection(place[1].getsockname()) for _ in range(4)]
    for stranger, text in zip(
        strangers[1:], (b"GET / HTTP/1.1\r\n\r\n", b"\x01" + bytes(7) + b"0", b"\x01" + bytes(7) + b"9"), strict=True
    ):
        stranger.sendall(text)
    try:
        assert together(place, lambda group: group.gather_objects(group.rank)) == [[0, 1, 2]] * WORLD
    finally:
        for stranger in strangers:
            stranger.close()


def test_values_are_signed(place, monkeypatch):
    """Rank 1 loses the key after the meeting: what it sends might be anybody's."""
    monkeypatch.setenv(GROUP_KEY_VARIABLE, "secret")
    met = threading.Barrier(2)

    def act(group: WriterGroup) -> Any:
        met.wait()
        if group.rank == 1:
            channel = group._channels[0]
            content = b'"forged"'
            channel._connection.sendall((len(content) + 32).to_bytes(8, "little") + bytes(32) + content)
            return "forged"
        return group.gather_objects("sound")

    found = together(place, act, world=2)
    assert isinstance(found[0], SignatureError) and found[1] == "forged"
