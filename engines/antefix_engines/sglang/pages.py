"""Pages in the memory of SGLang's host pools, as buffers that a store reads into and writes from without a copy.

A pool tells where its pages are: `get_page_buffer_meta(indices)` returns pointers and sizes. The pool has one pointer
per page if a page is contiguous (layout page_first), and several if it is in pieces (layer_first: one per layer). A
page in pieces needs one copy. A pool without memory (V4's anchor) has empty pages.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from antefix.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class PageMemory:
    """One page: its runs of memory, in the order of its bytes. The page is valid only as long as SGLang holds it."""

    runs: tuple[memoryview, ...]

    @property
    def nbytes(self) -> int:
        return sum(run.nbytes for run in self.runs)

    def payload(self) -> memoryview:
        """The page's bytes: a view if the page is contiguous, else a copy."""
        return self.runs[0] if len(self.runs) == 1 else memoryview(b"".join(self.runs))

    def fill(self, payload: memoryview | bytes) -> None:
        offset = 0
        for run in self.runs:
            run[:] = payload[offset : offset + run.nbytes]
            offset += run.nbytes

    def landing(self) -> memoryview:
        """A buffer into which a store may write the page; `settle` must be called afterwards."""
        return self.runs[0] if len(self.runs) == 1 else memoryview(bytearray(self.nbytes))

    def settle(self, landed: memoryview) -> None:
        if len(self.runs) != 1:
            self.fill(landed)


class PoolPages:
    """The pages of one registered host pool."""

    def __init__(self, host_pool: Any) -> None:
        self._pool: Final = host_pool
        self.page_size: Final = int(getattr(host_pool, "page_size", 1) or 1)
        self.page_bytes: Final = _page_bytes(host_pool)

    @property
    def description(self) -> dict[str, Any]:
        """What determines the meaning of a page's bytes; part of its name. Layouts order the same bytes differently."""
        pool = self._pool
        names = (
            "layout",
            "layer_num",
            "start_layer",
            "end_layer",
            "item_bytes",
            "size_per_token",
            "storage_format_tag",
        )
        said = {name: str(getattr(pool, name, "")) for name in names}
        device_pool = getattr(pool, "device_pool", None)
        dtypes = [str(getattr(each, "dtype", "")) for each in (pool, device_pool)]
        return {"class": type(pool).__name__, "dtypes": dtypes, "page_size": self.page_size, **said}

    def at(self, host_indices: Any, num_pages: int) -> list[PageMemory]:
        """host_indices: of all tokens of the pages.

        Raises:  InvalidRequest: not `num_pages` pages' indices.
        """
        if not self.page_bytes:
            return [PageMemory(()) for _ in range(num_pages)]
        if host_indices is None or host_indices.numel() != num_pages * self.page_size:
            given = 0 if host_indices is None else host_indices.numel()
            raise InvalidRequest(
                f"{num_pages} pages of {self.page_size} tokens need one index per token, got {given} indices"
            )
        if not num_pages:
            return []
        pointers, sizes = self._pool.get_page_buffer_meta(host_indices)
        runs = [_memory_at(pointer, size) for pointer, size in zip(pointers, sizes, strict=True)]
        per_page = len(runs) // num_pages
        return [PageMemory(tuple(runs[i * per_page : (i + 1) * per_page])) for i in range(num_pages)]


def _page_bytes(host_pool: Any) -> int:
    if getattr(host_pool, "kv_buffer", None) is None and type(host_pool).__name__ == "LogicalHostPool":
        return 0
    page = host_pool.get_dummy_flat_data_page()
    return int(page.numel() * page.element_size())


def _memory_at(pointer: int, nbytes: int) -> memoryview:
    return memoryview((ctypes.c_ubyte * nbytes).from_address(pointer)).cast("B")


def matching(keys: Sequence[str], pages: Sequence[PageMemory]) -> None:
    """Raises:  InvalidRequest: not one page for each key."""
    if len(keys) != len(pages):
        raise InvalidRequest(f"{len(keys)} keys but {len(pages)} pages")
