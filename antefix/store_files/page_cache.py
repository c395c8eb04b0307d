"""Tells by samples which records of a store are in this host's page cache. Sampling loads nothing, and waits for no
disk.

Each sample is one page of one record, asked with mincore(2). A read with RWF_NOWAIT would tell as much, but it starts
readahead, so the next look-up would find all samples in the page cache. The kernel answers mincore only for files that
the caller owns or may write; for other files it says that all pages are there, so they are not sampled.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np

from antefix.record import Held, RecordKind
from antefix.store_files.index import Index
from antefix.store_files.record_format import IndexEntry
from antefix.store_files.segment_files import SegmentFiles

# Samples per look-up, of blocks and of checkpoints. A sample costs 10 microseconds, mostly for its index entry.
NUM_SAMPLES: Final = 16
_PAGE_BYTES: Final = mmap.PAGESIZE
# mincore's answer for a page: the lowest bit says whether it is in memory.
_RESIDENT: Final = 1


class PageCache:
    """The page cache's share of one store's records. Thread-safe.

    num_sampled, num_cached: blocks sampled so far, and those of them that were in the page cache. The counts are
    approximate, because threads count without a lock.
    """

    def __init__(self, index: Index, files: SegmentFiles) -> None:
        self._index = index
        self._files = files
        self._mincore = _mincore()
        self.num_sampled = self.num_cached = 0

    def sampled(self, held: Held, chain: Sequence[bytes]) -> Held:
        """`held`, completed by which of its records are in the page cache, as far as this process may know."""
        if self._mincore is None or not (held.spans or held.checkpoints):
            return held
        stretches = _stretches(held)
        blocks = [chain[(start + stop) // 2] for start, stop in stretches]
        # The last ones are the likeliest to be read.
        counts = held.checkpoints[-NUM_SAMPLES:]
        with self._index.txn() as txn:
            entries = list(self._index.entries(txn, RecordKind.BLOCK, blocks))
            entries += self._index.entries(txn, RecordKind.CHECKPOINT, [chain[count - 1] for count in counts])
        there = self._resident([entry for entry in entries if entry is not None])
        if there is None:
            return held
        flags = [entry is not None and there.get((entry.segment, entry.offset), False) for entry in entries]
        of_blocks, of_checkpoints = flags[: len(blocks)], flags[len(blocks) :]
        self.num_sampled += len(of_blocks)
        self.num_cached += sum(of_blocks)
        return replace(
            held,
            cached=_joined(stretch for stretch, flag in zip(stretches, of_blocks, strict=True) if flag),
            cached_checkpoints=tuple(count for count, flag in zip(counts, of_checkpoints, strict=True) if flag),
        )

    def _resident(self, entries: Iterable[IndexEntry]) -> dict[tuple[int, int], bool] | None:
        """Whether the middle page of each record is in memory, by segment and offset. None: this process may not know
        which pages are in memory.

        Records of segments that are gone are left out.
        """
        by_segment: Mapping[int, list[IndexEntry]] = defaultdict(list)
        for entry in entries:
            by_segment[entry.segment].append(entry)
        found: dict[tuple[int, int], bool] = {}
        for segment, of_segment in by_segment.items():
            with contextlib.suppress(OSError, ValueError), self._files.use(segment) as fd:
                if not _may_know(fd):
                    return None
                pages = [(entry.offset + entry.extent_bytes // 2) // _PAGE_BYTES for entry in of_segment]
                places = [(segment, entry.offset) for entry in of_segment]
                found.update(zip(places, self._pages(fd, pages), strict=True))
        return found

    def _pages(self, fd: int, pages: Sequence[int]) -> list[bool]:
        """Raises:  OSError, ValueError: the file cannot be mapped, or is empty."""
        assert self._mincore is not None
        answer = (ctypes.c_ubyte * 1)()
        with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapped:
            address, size = np.frombuffer(mapped, np.uint8).ctypes.data, len(mapped)
            return [
                page * _PAGE_BYTES < size
                and self._mincore(address + page * _PAGE_BYTES, _PAGE_BYTES, answer) == 0
                and bool(answer[0] & _RESIDENT)
                for page in pages
            ]


def _stretches(held: Held) -> Sequence[tuple[int, int]]:
    """The held blocks, cut into at most about NUM_SAMPLES stretches. The middle block of each stretch is sampled.

    If the blocks lie in more spans than that, only some spans are sampled, and the others count as not cached.
    """
    length = max(1, -(-held.num_blocks // NUM_SAMPLES))
    found = [(first, min(first + length, stop)) for start, stop in held.spans for first in range(start, stop, length)]
    # Up to twice NUM_SAMPLES: each span may end with a short stretch.
    return found[:: -(-len(found) // (2 * NUM_SAMPLES)) or 1]


def _joined(stretches: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """The same blocks as `stretches`, with adjacent stretches joined."""
    spans: list[tuple[int, int]] = []
    for start, stop in stretches:
        if spans and spans[-1][1] == start:
            start = spans.pop()[0]
        spans.append((start, stop))
    return tuple(spans)


def _may_know(fd: int) -> bool:
    """Whether the kernel tells this process the truth about the file's pages."""
    return os.fstat(fd).st_uid == os.geteuid() or os.access(f"/proc/self/fd/{fd}", os.W_OK)


def _mincore() -> Callable[..., int] | None:
    """mincore(2) of the C library; None if this system does not have it."""
    function: Any = getattr(ctypes.CDLL(None), "mincore", None)
    if function is not None:
        function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
        function.restype = ctypes.c_int
    return function  # type: ignore[no-any-return]
