"""The paged pool of global KV: one row per block, whose bytes are the payload that goes to disk.

A restore reads from disk straight into `landing(block_ids)` and then calls `note_filled`; what goes to disk comes from
`payloads(block_ids)`. Here both are the rows themselves; a pool on a card has pinned host memory next to them. The
pool knows which rows are in use, not by how many sequences: a worker's `ResidentBlocks` counts references. Belongs to
one thread.

Memory: `num_blocks * layout.block_bytes` for the rows. The FP8 format also keeps decoded float32 mirrors, because
decoding for every step would cost more than the attention: 3.5 to 7.5 times the rows (V4: 584 -> 2048 and 68 -> 512
bytes a record). The float formats read the rows in place. Fresh memory is only touched as blocks are used.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from antefix.errors import InternalError, Overloaded
from antefix.layout import BlockLayout, KVFormat, Part, PartKind
from antefix.model.finite import unusable_rows
from antefix.model.host_rows import HostRows, upload
from antefix.model.quant import pack, unpack, value_dtype, width_of

if TYPE_CHECKING:
    from antefix.model.lead import Lead

# Payload bytes decoded at once: large enough to hide the calls, small enough for a core's caches.
_DECODE_BYTES = 256 << 10
# Looked at in one call per field; of V4's blocks 4 MiB.
_CHECKED_BLOCKS = 8


class BlockPool:
    """`num_blocks` rows of `layout.block_bytes` on `device`.

    takes_payloads: False for a pool on a card whose payloads neither come from the host nor go there.
    """

    def __init__(
        self,
        layout: BlockLayout,
        num_blocks: int,
        device: str | torch.device = "cpu",
        *,
        takes_payloads: bool = True,
    ) -> None:
        if num_blocks < 1:
            raise InternalError(f"a pool needs at least one block, not {num_blocks}")
        self.layout = layout
        self.num_blocks = num_blocks
        self.rows = _fresh_zeros((num_blocks, layout.block_bytes), torch.uint8, device)
        self._host = HostRows(self.rows) if takes_payloads and self.rows.device.type != "cpu" else None
        self.num_free = num_blocks
        # Of rank 0 of several: other ranks have such a pool too.
        self.lead: Lead | None = None
        self._in_use = np.zeros(num_blocks, np.bool_)
        self._parts = {(part.layer, part.kind): part for part in layout.parts}
        self._decoded = {key: self._decoded_part(part) for key, part in self._parts.items()}

    def allocate(self, num: int, *, after: int | None = None) -> list[int]:
        """Ids of free blocks, in use from now on; side by side where there is room (reads of such runs need no copy).

        after: the sequence's last block; its neighbours are tried first.
        Raises:  Overloaded: fewer than `num` blocks are free; nothing was allocated.
        """
        free = np.flatnonzero(~self._in_use)
        if num < 0 or len(free) < num:
            raise Overloaded(f"the block pool has {len(free)} of {self.num_blocks} blocks free, {num} are needed")
        if not num:
            return []
        start = np.searchsorted(free, 0 if after is None else after + 1)
        picked = free[start : start + num]
        wanted_first = None if after is None else after + 1
        if len(picked) < num or picked[-1] - picked[0] != num - 1 or picked[0] != (wanted_first or picked[0]):
            picked = _first_run(free, num)
        self._in_use[picked] = True
        self.num_free -= num
        return [int(block) for block in picked]

    def release(self, block_ids: Iterable[int]) -> None:
        """These blocks are free again.  Raises InternalError for one that is free already, or named twice."""
        ids = self._held(block_ids)
        self._in_use[ids] = False
        self.num_free += len(ids)

    def landing(self, block_ids: Iterable[int]) -> list[memoryview]:
        """Host memory for the blocks' payloads, to be filled whole before `note_filled`."""
        return self._views(block_ids) if self._host is None else self._host.landing(block_ids)

    def payloads(self, block_ids: Iterable[int]) -> list[memoryview]:
        """The blocks' payloads in host memory, until the blocks are written again."""
        return self._views(block_ids) if self._host is None else self._host.fetch(block_ids)

    def unusable(self, block_ids: Iterable[int]) -> list[int]:
        """Which of the blocks hold values that no computation may meet (`finite.py`), in the order given.

        Of blocks whose payloads have landed, before `note_filled`, or were given by `payloads`.
        """
        ids = list(block_ids)
        rows = (self.rows if self._host is None else self._host.memory).numpy()
        bad: list[int] = []
        for first in range(0, len(ids), _CHECKED_BLOCKS):
            part = ids[first : first + _CHECKED_BLOCKS]
            neighbours = part == list(range(part[0], part[0] + len(part)))
            found = unusable_rows(rows[part[0] : part[0] + len(part)] if neighbours else rows[part], self.layout)
            bad += [part[number] for number in np.flatnonzero(found)]
        return bad

    def note_filled(self, block_ids: Iterable[int]) -> None:
        """Payloads have landed: move them to where the rows are, on every rank, and decode them again."""
        block_ids = list(block_ids)
        if self._host is not None:
            self._host.send(block_ids)
        if self.lead is not None:
            self.lead.fill(self, block_ids)
        self.decode_rows(block_ids)

    def decode_rows(self, block_ids: list[int]) -> None:
        """These rows have new payloads: decode what is kept decoded."""
        if self.layout.kv_format is not KVFormat.FP8:
            return
        ids = torch.as_tensor(block_ids, dtype=torch.long, device=self.rows.device)
        # In pieces that stay in cache; a restore of a long prefix comes with thousands of blocks.
        for piece in torch.split(ids, max(1, _DECODE_BYTES // self.layout.block_bytes)):
            first, last = int(piece[0]), int(piece[-1])
            neighbours = last - first == len(piece) - 1 and bool((piece[1:] > piece[:-1]).all())
            where = slice(first, last + 1) if neighbours else piece
            for key, part in self._parts.items():
                self._decoded[key][where] = unpack(part.kind, self.records(part)[where], self.layout)

    def clear(self, block_ids: Iterable[int]) -> None:
        """Zero rows that are about to be written for the first time, so that no earlier owner's bytes linger."""
        self.rows[upload(np.array(list(block_ids), np.int64), self.rows.device)] = 0

    def part(self, layer: int, kind: PartKind) -> Part:
        return self._parts[layer, kind]

    def records(self, part: Part) -> Tensor:
        """Packed records of one part, a view [num_blocks, num_rows, record bytes] of the rows."""
        return self._view(self.rows, part.offset, part.num_rows, part.record.nbytes)

    def decoded(self, part: Part) -> Tensor:
        """Decoded records of one part: [num_blocks, num_rows, width]."""
        return self._decoded[part.layer, part.kind]

    def write(self, part: Part, block_ids: Tensor, row_ids: Tensor, values: Tensor) -> None:
        """Pack values [G, width] into rows `row_ids` [G] of blocks `block_ids` [G]."""
        packed = pack(part.kind, values, self.layout)
        self.records(part)[block_ids, row_ids] = packed
        if self.layout.kv_format is KVFormat.FP8:
            self.decoded(part)[block_ids, row_ids] = unpack(part.kind, packed, self.layout)

    def _views(self, block_ids: Iterable[int]) -> list[memoryview]:
        return [self.rows[block_id].numpy().data for block_id in block_ids]

    def _decoded_part(self, part: Part) -> Tensor:
        width = width_of(part, self.layout)
        if self.layout.kv_format is KVFormat.FP8:
            return _fresh_zeros((self.num_blocks, part.num_rows, width), torch.float32, self.rows.device)
        dtype = value_dtype(self.layout.kv_format)
        return self._view(self.rows.view(dtype), part.offset // dtype.itemsize, part.num_rows, width)

    @staticmethod
    def _view(rows: Tensor, offset: int, num_rows: int, width: int) -> Tensor:
        span = rows[:, offset : offset + num_rows * width]
        return span.view(len(rows), num_rows, width)

    def _held(self, block_ids: Iterable[int]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        ids = np.asarray(list(block_ids), dtype=np.int64)
        if len(ids) and (ids.min() < 0 or ids.max() >= self.num_blocks or not self._in_use[ids].all()):
            raise InternalError("a block id is outside the pool or not allocated")
        if len(np.unique(ids)) < len(ids):
            raise InternalError("a block is released twice at once")
        return ids


def _fresh_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: str | torch.device) -> Tensor:
    """Zeros that take no memory until they are written (CPU): pages of the system's, which torch would fill.

    Mapped here, not allocated: `antefix up` has glibc keep large freed memory, and of what it kept it clears whatever
    it hands out as zeros. That touched 400 MB of a pool that nobody had used.
    """
    if torch.device(device).type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    kind = np.dtype(np.uint8 if dtype is torch.uint8 else np.float32)
    pages = mmap.mmap(-1, max(math.prod(shape) * kind.itemsize, 1))
    return torch.from_numpy(np.frombuffer(pages, kind, math.prod(shape)).reshape(shape))


def _first_run(
    free: np.ndarray[tuple[int], np.dtype[np.int64]], num: int
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The first `num` neighbouring ids of an ascending list; the first `num` ids where no run is long enough."""
    starts = np.flatnonzero(free[num - 1 :] - free[: len(free) - num + 1] == num - 1)
    start = int(starts[0]) if len(starts) else 0
    return free[start : start + num]
