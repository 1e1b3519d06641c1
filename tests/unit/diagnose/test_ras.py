"""NCCL RAS, played by a service on loopback: what it says is summed up, and no answer takes longer than allowed."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from zerotop.diagnose.ras import inspector_files, query, ras_address, summary

RANK = """{"rank": %d, "host": "10.0.0.1", "pid": %d, "cuda_dev": 0, "nvml_dev": 0,
 "status": {"init_state": 0, "async_error": %d, "finalize_called": false, "destroy_flag": false, "abort_flag": false},
 "collective_counts": {"Broadcast": 0, "AllReduce": %d}}"""
# As NCCL 2.28 writes it: the comma behind nvml_dev is missing.
MISSING = """{"rank": 1, "host": "10.0.0.1", "pid": 11, "cuda_dev": 1, "nvml_dev": 1
 "status": {"unresponsive": true, "considered_dead": %s}}"""


def status(ranks: list[str], missing: list[str] | None = None) -> str:
    return (
        '{"nccl_version": "2.28.9", "communicators_count": 1, "communicators": [{"hash": "0xa1", "size": 2,\n'
        f'"ranks": [{", ".join(ranks)}],\n"missing_ranks": [{", ".join(missing or [])}]}}], "ras": {{}}}}'
    )


@pytest.fixture
def serve() -> Iterator[Callable[..., tuple[str, int]]]:
    """`serve(answer, knows_json=True, stops_at="")`: an endpoint that speaks RAS, and falls silent at a line."""
    listeners: list[socket.socket] = []
    threads: list[threading.Thread] = []
    over = threading.Event()

    def begin(answer: str, knows_json: bool = True, stops_at: str = "") -> tuple[str, int]:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)

        def talk(connection: socket.socket) -> None:
            with connection, connection.makefile("rwb") as file:
                for line in file:
                    words = line.decode().strip()
                    if stops_at and words.startswith(stops_at):
                        over.wait(30)
                        return
                    if words.startswith("CLIENT PROTOCOL"):
                        file.write(b"SERVER PROTOCOL 2\n")
                    elif words.startswith("TIMEOUT") or (words == "SET FORMAT json" and knows_json):
                        file.write(b"OK\n")
                    elif words == "VERBOSE STATUS":
                        file.write(answer.encode())
                        file.flush()
                        return
                    else:
                        file.write(b"ERROR: unknown command\n")
                    file.flush()

        def accept() -> None:
            while True:
                try:
                    talk(listener.accept()[0])
                except OSError:
                    return

        threads.append(threading.Thread(target=accept))
        threads[-1].start()
        address: tuple[str, int] = listener.getsockname()
        return address

    yield begin
    over.set()
    for listener in listeners:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
    for thread in threads:
        thread.join()


def test_missing_ranks_errors_and_ranks_behind_are_summed_up(serve: Callable[..., tuple[str, int]]) -> None:
    answer = query(serve(status([RANK % (0, 10, 0, 4)], [MISSING % "true"])))
    assert answer.document is not None
    assert summary(answer) == "NCCL RAS: rank 1 (pid 11) of its communicator is considered dead"
    answer = query(serve(status([RANK % (0, 10, 0, 4)], [MISSING % "false"])))
    assert summary(answer) == "NCCL RAS: rank 1 (pid 11) of its communicator does not respond"
    answer = query(serve(status([RANK % (0, 10, 0, 42), RANK % (1, 11, 0, 41)])))
    assert summary(answer) == "NCCL RAS: rank 1 (pid 11) of its communicator issued 41 AllReduce, others up to 42"
    answer = query(serve(status([RANK % (0, 10, 0, 4), RANK % (1, 11, 3, 4)])))
    assert summary(answer) == "NCCL RAS: rank 1 (pid 11) of its communicator has an error"


def test_a_healthy_answer_is_no_proof(serve: Callable[..., tuple[str, int]]) -> None:
    answer = query(serve(status([RANK % (0, 10, 0, 4), RANK % (1, 11, 0, 4)])))
    assert summary(answer) == "NCCL RAS reports no problem, which does not prove that there is none"


def test_an_old_nccl_answers_in_text(serve: Callable[..., tuple[str, int]]) -> None:
    answer = query(serve("Job summary\n===========\n", knows_json=False))
    assert (answer.document, answer.text) == (None, "Job summary\n===========\n")
    assert "in text" in summary(answer)


@pytest.mark.parametrize("stops_at", ["CLIENT", "TIMEOUT", "SET", "VERBOSE"])
def test_a_service_that_falls_silent_costs_no_more_than_the_limit(
    serve: Callable[..., tuple[str, int]], stops_at: str
) -> None:
    address = serve("", stops_at=stops_at)
    began = time.monotonic()
    answer = query(address, timeout_s=0.3)
    assert time.monotonic() - began < 2 and "did not answer within 0.3 s" in answer.trouble


def test_no_service_and_another_service(serve: Callable[..., tuple[str, int]]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        free = taken.getsockname()
    assert query(free).trouble == f"no NCCL process offers RAS at 127.0.0.1:{free[1]}"
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = other.getsockname()

        def greet() -> None:
            with other.accept()[0] as connection:
                connection.sendall(b"220 mail\n")
                connection.recv(100)

        thread = threading.Thread(target=greet)
        thread.start()
        assert "which is not NCCL RAS" in query(address).trouble
        thread.join()


def test_the_address_comes_from_the_environment() -> None:
    assert ras_address({}) == ("localhost", 28028)
    assert ras_address({"NCCL_RAS_ADDR": "10.0.0.1:999"}) == ("10.0.0.1", 999)
    assert ras_address({"NCCL_RAS_ADDR": "[::1]:999"}) == ("::1", 999)
    assert ras_address({"NCCL_RAS_ENABLE": "0"}) is None and ras_address({"NCCL_RAS_ADDR": "host"}) is None


def test_the_ends_of_inspector_files_are_taken_where_it_is_on(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_bytes(b"x" * 100_000 + b"end")
    on = {"NCCL_INSPECTOR_ENABLE": "1", "NCCL_INSPECTOR_DUMP_DIR": str(tmp_path)}
    ((name, content),) = inspector_files(on)
    assert name == "a.log" and len(content) == 64 * 1024 and content.endswith(b"end")
    assert inspector_files({**on, "NCCL_INSPECTOR_ENABLE": "0"}) == []
    assert inspector_files({**on, "NCCL_INSPECTOR_DUMP_DIR": str(tmp_path / "none")}) == []
