"""The writer processes of all ranks as one group: the `Peers` of job.py. They meet at a socket of rank 0's writer, and
it passes small values on, as JSON.

On one host it is a Unix socket in a folder of this user's. Between hosts it is a TCP port, and values are signed where
there is a key: see [Note: signed values] in runtime/wire/signature.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from runtime.process.tempdir import make_sockets_folder
from runtime.wire.signature import SignatureError, checked, signed

MEETING_S = 120.0
"""Seconds that the writers of all ranks have to find each other."""
HELLO_S = 10.0
"""Seconds that a process which has connected has to say which rank's writer it is."""
RETRY_S = 0.05
"""Seconds between two attempts to connect."""
LARGEST_BYTES = 2**28
"""Largest message in bytes; a larger size was not sent by a writer."""
MEETING_FOLDER = "zerotop-writers-"
"""Prefix of the temporary folder for the socket, outside a run."""
_SOCKET = "writers"
_SIZE_BYTES = 8
_SILENCE_S = 60
"""Seconds without a sign of life after which TCP asks whether the other host is still there."""


class PeerLost(Exception):
    """Another rank's writer is gone."""


def listen(path: Path) -> socket.socket:
    """The socket for rank 0's writer, at `path`. Raises OSError."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(socket.SOMAXCONN)
    return listener


def listen_anywhere() -> tuple[str, socket.socket]:
    """The address in a new folder, which the writers remove when they have met, and the socket for rank 0's writer.
    Raises OSError."""
    path = make_sockets_folder(MEETING_FOLDER, _SOCKET) / _SOCKET
    return str(path), listen(path)


def listen_for_hosts() -> tuple[str, socket.socket]:
    """The address ("HOST:PORT") for writers on other hosts, and the socket for rank 0's writer. Raises OSError."""
    host = os.environ.get("MASTER_ADDR") or socket.gethostname()
    listener = socket.create_server((host, 0))
    return f"{host}:{listener.getsockname()[1]}", listener


class WriterGroup:
    """One rank's place in the group."""

    def __init__(self, address: str, rank: int, world_size: int, listener: socket.socket | None) -> None:
        """Meet the others. address: path of a Unix socket, or "HOST:PORT". listener: the listening socket, on rank 0.
        Raises PeerLost if rank 0 has none, and TimeoutError when not all have come within MEETING_S."""
        if rank == 0 and listener is None:
            raise PeerLost(f"rank 0 does not listen at {address}")
        self.rank, self.world_size = rank, world_size
        self._number = 0
        """Of exchanges so far."""
        self._deadline_s = time.monotonic() + MEETING_S
        self._channels: dict[int, _Channel] = {}
        """On rank 0 to all others; elsewhere to rank 0."""
        if listener is None:
            self._channels[0] = _Channel(self._connect(address))
            self._channels[0].send(json.dumps(rank).encode(), "hello", 0)
        else:
            with listener:
                self._accept_all(listener)
            if address.startswith("/"):
                _remove(Path(address))
        self.gather_objects(None)

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's value, on every rank. Collective. Raises PeerLost."""
        self._number += 1
        return self._from_rank_0(json.dumps(value).encode() if self.rank == 0 else b"")

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's value in rank order, on every rank, with lists for tuples. Collective. Raises PeerLost."""
        self._number += 1
        own = json.dumps(value).encode()
        if self.rank != 0:
            self._channels[0].send(own, self._place, self.rank)
            return self._from_rank_0(b"")  # type: ignore[no-any-return]
        others = (self._channels[rank].receive(self._place, rank) for rank in range(1, self.world_size))
        return self._from_rank_0(b"[" + b",".join([own, *others]) + b"]")  # type: ignore[no-any-return]

    def close(self) -> None:
        """Leave the group."""
        for channel in self._channels.values():
            channel.close()

    @property
    def _place(self) -> str:
        return f"writers/{self.world_size}/{self._number}"

    def _from_rank_0(self, content: bytes) -> Any:
        """`content` of rank 0, decoded, on every rank."""
        place = self._place + "/all"
        if self.rank == 0:
            for channel in self._channels.values():
                channel.send(content, place, 0)
        else:
            content = self._channels[0].receive(place, 0)
        return json.loads(content)

    # ---- meeting -----------------------------------------------------------------------------------------------------
    def _accept_all(self, listener: socket.socket) -> None:
        while len(self._channels) < self.world_size - 1:
            listener.settimeout(max(0.001, self._deadline_s - time.monotonic()))
            try:
                connection = listener.accept()[0]
            except TimeoutError:
                missing = [rank for rank in range(1, self.world_size) if rank not in self._channels]
                raise TimeoutError(f"the writers of ranks {missing} did not come within {MEETING_S:g} s") from None
            channel = _Channel(connection)
            rank = channel.rank_of_hello()
            if rank is not None and 0 < rank < self.world_size and rank not in self._channels:
                self._channels[rank] = channel
            else:
                channel.close()  # not one of us

    def _connect(self, address: str) -> socket.socket:
        while True:
            try:
                return _connected(address)
            except OSError as error:
                if time.monotonic() > self._deadline_s:
                    raise TimeoutError(
                        f"rank 0's writer was not at {address} within {MEETING_S:g} s: {error}"
                    ) from None
                time.sleep(RETRY_S)


class _Channel:
    """Messages over one connection."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _SILENCE_S)

    def close(self) -> None:
        """The other side will see PeerLost."""
        self._connection.close()

    def rank_of_hello(self) -> int | None:
        """The rank whose writer has connected; None if it is none."""
        self._connection.settimeout(HELLO_S)
        with contextlib.suppress(PeerLost, SignatureError, ValueError):
            rank = json.loads(self.receive("hello", 0))
            self._connection.settimeout(None)
            return rank if isinstance(rank, int) else None
        return None

    def send(self, content: bytes, place: str, rank: int) -> None:
        """Send one message of `rank`. Raises PeerLost."""
        message = signed(content, place, rank)
        try:
            self._connection.sendall(len(message).to_bytes(_SIZE_BYTES, "little") + message)
        except OSError as error:
            raise PeerLost(str(error)) from None

    def receive(self, place: str, rank: int) -> bytes:
        """The next message, which must be `rank`'s. Raises PeerLost, or SignatureError if another process sent it."""
        size = int.from_bytes(self._exactly(_SIZE_BYTES), "little")
        if size > LARGEST_BYTES:
            raise SignatureError(f"a message of {size:,} bytes was not sent by a writer")
        return checked(self._exactly(size), place, rank)

    def _exactly(self, nbytes: int) -> bytes:
        found = bytearray()
        while len(found) < nbytes:
            try:
                more = self._connection.recv(min(nbytes - len(found), 1 << 20))
            except OSError as error:
                raise PeerLost(str(error)) from None
            if not more:
                raise PeerLost("it has closed the connection")
            found += more
        return bytes(found)


def _connected(address: str) -> socket.socket:
    if not address.startswith("/"):
        host, _, port = address.rpartition(":")
        connection = socket.create_connection((host, int(port)), timeout=MEETING_S)
        connection.settimeout(None)
        return connection
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(address)
    except OSError:
        connection.close()
        raise
    return connection


def _remove(path: Path) -> None:
    """Delete the socket, and its folder if it was created for it."""
    path.unlink(missing_ok=True)
    if path.parent.name.startswith(MEETING_FOLDER):
        path.parent.rmdir()
