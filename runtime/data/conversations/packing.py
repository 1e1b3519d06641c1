"""Which samples share a sequence: best-fit decreasing within shuffled groups.

A group is some thousands of samples in a random order, so that a sequence's documents have nothing in common but that
their lengths fit: within a group the samples are taken by falling length, each put into the fullest sequence that it
still fits in (Coffman, Garey and Johnson, 1984).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

GROUP = 1 << 15


@dataclass(frozen=True)
class Plan:
    """Sequences of samples: sequence i is `samples[offsets[i] : offsets[i + 1]]`, numbers of samples in the store."""

    samples: np.ndarray  # int64
    offsets: np.ndarray  # int64 [sequences + 1]
    lengths: np.ndarray  # int32 [sequences]: tokens
    counted: np.ndarray  # int32 [sequences]: targets that the loss counts

    def __len__(self) -> int:
        return len(self.lengths)

    def of(self, sequence: int) -> np.ndarray:
        """The samples of a sequence."""
        return self.samples[self.offsets[sequence] : self.offsets[sequence + 1]]


def hashed(values: np.ndarray, seed: int, purpose: int = 0) -> np.ndarray:
    """64 bits per value that depend on the seed and nothing else: SplitMix64, the same with every version of numpy."""
    mask = (1 << 64) - 1
    key = _mix(np.array([(seed * 0x9E3779B97F4A7C15 + purpose + 1) & mask], np.uint64))
    return _mix(_mix(values.astype(np.uint64)) ^ key)


def _mix(value: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        value = value + np.uint64(0x9E3779B97F4A7C15)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return value ^ (value >> np.uint64(31))


def separate(samples: np.ndarray, lengths: np.ndarray, counted: np.ndarray) -> Plan:
    """Every sample is a sequence. `lengths` and `counted`: of all samples in the store."""
    offsets = np.arange(len(samples) + 1, dtype=np.int64)
    return Plan(samples.astype(np.int64), offsets, lengths[samples].astype(np.int32), counted[samples].astype(np.int32))


def pack(samples: np.ndarray, lengths: np.ndarray, counted: np.ndarray, seq_len: int, seed: int) -> Plan:
    """Sequences of at most `seq_len` tokens. No sample is longer than that.

    `lengths` and `counted`: of all samples in the store; `samples`: the numbers of those to pack, which may repeat.
    """
    order = np.argsort(hashed(np.arange(len(samples)), seed, 1), kind="stable")
    shuffled = samples[order]
    sequence_of = np.empty(len(samples), np.int64)
    count = 0
    for first in range(0, len(shuffled), GROUP):
        group = slice(first, first + GROUP)
        numbers, used = _best_fit(lengths[shuffled[group]], seq_len)
        sequence_of[group] = numbers + count
        count += used
    by_sequence = np.argsort(sequence_of, kind="stable")  # documents stay in their shuffled order
    packed = shuffled[by_sequence].astype(np.int64)
    offsets = np.zeros(count + 1, np.int64)
    np.cumsum(np.bincount(sequence_of, minlength=count), out=offsets[1:])
    if not count:
        return Plan(packed, offsets, np.empty(0, np.int32), np.empty(0, np.int32))
    sums = np.add.reduceat(lengths[packed], offsets[:-1], dtype=np.int64).astype(np.int32)
    targets = np.add.reduceat(counted[packed], offsets[:-1], dtype=np.int64).astype(np.int32)
    return Plan(packed, offsets, sums, targets)


def _best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """(the sequence of each sample, the number of sequences).

    `spaces` has bit r set where a sequence with r tokens of space is open, so that the fullest one that fits is its
    lowest set bit from the sample's length on.
    """
    falling = np.argsort(-lengths, kind="stable")
    placed = np.empty(len(lengths), np.int64)
    smallest = int(lengths.min(initial=capacity))
    open_by_space: dict[int, list[int]] = {}
    spaces = used = 0
    result = []
    for length in lengths[falling].tolist():
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            waiting = open_by_space[space]
            sequence = waiting.pop()
            if not waiting:
                spaces ^= 1 << space
        else:
            space, sequence = capacity, used
            used += 1
        result.append(sequence)
        if (rest := space - length) >= smallest:
            if spaces >> rest & 1:
                open_by_space[rest].append(sequence)
            else:
                open_by_space[rest] = [sequence]
                spaces |= 1 << rest
    placed[falling] = result
    return placed, used
