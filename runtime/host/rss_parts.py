"""What the resident memory of a process consists of, beyond the states that the ledger counts. Torch-free.

Every part is measured by itself, so that what they leave of the RSS shows how true they are:

libraries    unchanged pages of mapped libraries: the kernel's count of file pages without `mapped_files`
mapped_files resident pages of mapped data, such as safetensors
imports      Python, torch's own memory and the data: what the process held before the model (`note_baseline`), what
             grew outside of malloc until the engine was built (`note_prepared`), and what malloc had given out by the
             end of initialize() beyond the ledger (`note_built`)
activations  what malloc has given out beyond that and the ledger: activations, gradients at their birth, temporary
             tensors, what a script keeps
allocator    freed blocks that malloc keeps. How many of their pages are in memory is not known: this is what is left of
             the RSS, and at most what malloc says that it has free
rest         what is left then: what has grown outside of malloc since the engine was built, such as Python's objects.
             Negative where the ledger counts pages that nothing has written to yet
"""

from __future__ import annotations

from typing import NamedTuple

from runtime.host.heap import HeapUse, heap_use
from runtime.host.resident import FileMappings, Resident, outside_malloc, read_resident


class RssParts(NamedTuple):
    """Bytes; see above. `rest` may be negative, the others not."""

    rss: int
    libraries: int
    mapped_files: int
    imports: int
    activations: int
    allocator: int
    rest: int

    @property
    def untouched(self) -> int:
        """Bytes that the parts and the ledger count beyond the RSS."""
        return max(0, -self.rest)

    def named(self) -> dict[str, int]:
        """The parts that are not empty, by name."""
        return {name: size for name, size in self._asdict().items() if name != "rss" and size > 0}


class RssAccount:
    """Divides the resident memory of this process. One per process: `account()`."""

    def __init__(self) -> None:
        self._baseline: tuple[Resident, HeapUse] | None = None
        self._model_bytes = 0
        self._built = 0
        self._outside = 0
        self._prepared = False
        self._files = FileMappings()

    def note_baseline(self, model_bytes: int = 0) -> None:
        """Call it before the engine builds anything; only the first call counts. model_bytes: what the caller has
        allocated with malloc for the model, which the engine will replace."""
        if self._baseline is not None:
            return
        resident, heap = read_resident(), heap_use()
        if resident is not None and heap is not None:
            self._baseline, self._model_bytes = (resident, heap), model_bytes

    def note_prepared(self) -> None:
        """Call it when data and model are there and the engine is not yet: counts what has grown outside of malloc
        since the baseline, mostly Python's own objects. Only the first call counts."""
        resident, heap, first = read_resident(), heap_use(), not self._prepared
        self._prepared = True
        if first and resident is not None and heap is not None and self._baseline is not None:
            before = _outside_heap(*self._baseline)
            self._outside = max(0, _outside_heap(resident, heap) - before)

    def note_built(self, ledger_bytes: int) -> None:
        """Call it when initialize() is done. ledger_bytes: of all categories, host memory included."""
        self._built = self._grown(ledger_bytes) or 0

    def heap_activations(self, ledger_bytes: int) -> int | None:
        """The part `activations` alone, in microseconds."""
        grown = self._grown(ledger_bytes)
        return None if grown is None else max(0, grown - self._built)

    def _grown(self, ledger_bytes: int) -> int | None:
        """Bytes that malloc has given out since the baseline, without those of the ledger."""
        heap = heap_use()
        if heap is None or self._baseline is None:
            return None
        of_ledger = max(0, ledger_bytes - outside_malloc.nbytes)
        return heap.in_use - (self._baseline[1].in_use - self._model_bytes) - of_ledger

    def parts(self, ledger_bytes: int) -> RssParts | None:
        """The current parts; None where /proc or glibc's figures are missing. ledger_bytes: as in `note_built`."""
        resident, heap, grown = read_resident(), heap_use(), self._grown(ledger_bytes)
        if resident is None or heap is None or grown is None or self._baseline is None:
            return None
        before, heap_before = self._baseline
        imports = max(0, before.anonymous - heap_before.free - self._model_bytes)
        imports += self._built + self._outside
        activations = max(0, grown - self._built)
        files = self._files.data_bytes(resident.file)
        left = resident.rss - ledger_bytes - resident.file - imports - activations
        allocator = min(max(0, left), heap.free)
        return RssParts(resident.rss, resident.file - files, files, imports, activations, allocator, left - allocator)


def _outside_heap(resident: Resident, heap: HeapUse) -> int:
    """Anonymous memory that malloc has not given out and does not keep."""
    return resident.anonymous - heap.in_use - heap.free


_account = RssAccount()


def account() -> RssAccount:
    """The account of this process."""
    return _account
