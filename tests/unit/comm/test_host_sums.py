"""Sums over ranks beside the training thread: in the order in which they began, whichever rank's numbers are late."""

from __future__ import annotations

import threading
import time

import pytest
import torch
import torch.distributed as dist

from runtime.comm import Comm
from runtime.telemetry import NullTelemetry


class Heard(NullTelemetry):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[tuple[object, ...]] = []

    def issued(self, op: str, nbytes: int) -> int:
        self.records.append((op, nbytes))
        return len(self.records)

    def completed(self, *given: object) -> None:
        self.records.append(given)


def comm_of(telemetry: NullTelemetry) -> Comm:
    comm = Comm(torch.device("cpu"), telemetry)
    comm.prepare_host_sums()
    return comm


def sum_in_order() -> list[list[float]]:
    """Two engines' sums. On each rank the numbers of another one come late."""
    rank, first, second = dist.get_rank(), comm_of(NullTelemetry()), comm_of(NullTelemetry())
    gates = [threading.Event(), threading.Event()]

    def late(which: int, numbers: list[float]) -> list[float]:
        assert gates[which].wait(60)
        return numbers

    sums = [
        first.begin_host_sum(lambda: late(0, [1.0 + rank, 10.0]), 2),
        second.begin_host_sum(lambda: late(1, [100.0 * rank, -1.0]), 2),
    ]
    gates[1 - rank].set()
    time.sleep(0.1)
    gates[rank].set()
    return [each.wait() for each in sums]


def test_sums_keep_the_order_in_which_they_began(ranks):
    assert ranks(2).run(sum_in_order) == [[[3.0, 20.0], [100.0, -2.0]]] * 2


def report() -> list[tuple[object, ...]]:
    heard = Heard()
    began = comm_of(heard).begin_host_sum(lambda: [1.0] * 7, 7)
    assert began.wait() == [2.0] * 7
    began.report()
    return heard.records


def test_a_sum_is_reported_as_a_collective_without_a_wait(ranks):
    for issued, (seq, op, nbytes, began_ns, ended_ns, wait_ns) in ranks(2).run(report):
        assert issued == ("all_reduce", 56) and (seq, op, nbytes, wait_ns) == (1, "all_reduce", 56, 0)
        assert 0 < began_ns <= ended_ns


def fail() -> str:
    def broken() -> list[float]:
        raise ZeroDivisionError("no numbers")

    comm = comm_of(NullTelemetry())
    with pytest.raises(ZeroDivisionError, match="no numbers"):
        comm.begin_host_sum(broken, 1).wait()
    again: float = comm.begin_host_sum(lambda: [5.0], 1).wait()[0]
    return str(again)


def test_a_rank_without_numbers_says_so_and_sums_on(ranks):
    assert ranks(1).run(fail) == ["5.0"]
