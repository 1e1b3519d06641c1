"""A stack in a few words, and the outlier among the ranks."""

from __future__ import annotations

import pytest

from zerotop.diagnose.frames import native_frame, place, python_frame, spokesmen, summary

TORCH = "/x/lib/python3.11/site-packages/torch/distributed"


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        (
            [
                python_frame(f"{TORCH}/distributed_c10d.py", 3245, "all_gather"),
                python_frame(f"{TORCH}/c10d_logger.py", 83, "wrapper"),
                python_frame("/x/lib/python3.11/site-packages/runtime/comm/group.py", 90, "_issue"),
                python_frame("/x/lib/python3.11/site-packages/runtime/zero/unshard.py", 210, "unshard"),
                python_frame("/home/me/train.py", 5, "<module>"),
            ],
            "_issue at unshard.py:210",
        ),
        (
            [
                python_frame(f"{TORCH}/distributed_c10d.py", 3245, "all_gather"),
                python_frame(f"{TORCH}/c10d_logger.py", 83, "wrapper"),
                python_frame("/home/me/train.py", 5, "<module>"),
            ],
            "all_gather at train.py:5",
        ),
        ([python_frame("/home/me/data.py", 17, "read_batch")], "read_batch at data.py:17"),
        (
            [
                native_frame("clock_nanosleep", "libc.so.6"),
                native_frame("time_sleep", "libpython3.11.so.1.0"),
                python_frame("/home/me/data.py", 17, "read_batch"),
            ],
            "time_sleep at data.py:17",
        ),
        (
            [
                native_frame("pause", "libc.so.6"),
                native_frame("ffi_call", "libffi.so.8"),
                native_frame("PyCFuncPtr_call", "_ctypes.so"),
                native_frame("0x7fa07f433f7a", "libffi.so.8"),
                python_frame("/home/me/data.py", 17, "read_batch"),
            ],
            "pause at data.py:17",
        ),
        ([python_frame("/x/lib/python3.11/threading.py", 331, "wait")], "wait at threading.py:331"),
        ([native_frame("clock_nanosleep", "libc.so.6")], ""),
        ([], ""),
    ],
)
def test_a_stack_in_a_few_words(frames: list[str], words: str) -> None:
    assert place(frames) == words


def test_the_outlier_is_named_last() -> None:
    common, alone = "all_gather at unshard.py:210", "sleep at data.py:17"
    places = dict.fromkeys(range(8), common) | {3: alone}
    assert summary(places) == f"7 ranks: {common}; rank 3 alone: {alone}"
    assert summary(dict.fromkeys(range(8), common)) == f"all 8 ranks: {common}"
    assert summary(places | {4: alone}) == f"6 ranks: {common}; ranks 3, 4: {alone}"
    assert summary({0: common, 1: alone}) == f"rank 0: {common}; rank 1: {alone}"  # of two neither is the outlier
    assert summary({0: common}) == f"rank 0: {common}" and summary({}) == ""


def test_one_rank_of_each_group_speaks_the_smallest_groups_first() -> None:
    keys = dict.fromkeys(range(8), "a") | {3: "b", 5: "c", 6: "c"}
    assert spokesmen(keys, 4) == (3, 5, 0) and spokesmen(keys, 2) == (3, 5)
