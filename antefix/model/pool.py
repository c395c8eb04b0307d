"""The paged pool of global KV: one row per block, whose bytes are the payload that goes to disk.

A restore reads from disk straight into `landing(block_ids)` and then calls `fill`. Bytes that are to be written to disk
come from `payloads(block_ids)`. In this class both calls return the rows themselves; a pool on a GPU returns pinned
host memory instead. The pool knows which rows are in use, but not by how many sequences: references are counted by a
worker's `ResidentBlocks`. A pool belongs to one thread; on a CPU, another thread may call `payloads` and `unusable` for
rows that nothing writes meanwhile.

Memory: `num_blocks * layout.block_bytes` for the rows. The FP8 format also keeps decoded float32 copies, because
decoding for every step would cost more than the attention itself: 3.5 to 7.5 times the rows' bytes (V4: 584 -> 2048 and
68 -> 512 bytes per record). The float formats need no decoded copies, because they read the rows in place. The
operating system provides the memory only as blocks are used.
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
from antefix.model.finite import unusable_on_card, unusable_rows
from antefix.model.host_rows import HostRows, upload
from antefix.model.quant import decode, pack, unpack, value_dtype, width_of
from antefix.model.step_threads import one_thread

if TYPE_CHECKING:
    from antefix.model.lead import Lead

# Payload bytes decoded at once. 256 blocks of antefix-tiny took 19, 12, 7.5, 5.6 and 4.5 ms of processor time in pieces
# of 0.15, 0.3, 0.6, 1.2 and 2.5 MB. Larger pieces would only need more memory for the values in between.
_DECODE_BYTES = 2 << 20
# How many blocks one call per field checks for unusable values; 4 MiB of V4's blocks.
_CHECKED_BLOCKS = 8


class BlockPool:
    """`num_blocks` rows of `layout.block_bytes` on `device`.

    takes_payloads: False for a pool on a GPU whose payloads are neither read from the host nor copied to the host.
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
        # Set on rank 0 of several ranks: the other ranks have a pool like this one.
        self.lead: Lead | None = None
        self._in_use = np.zeros(num_blocks, np.bool_)
        self._parts = {(part.layer, part.kind): part for part in layout.parts}
        self._decoded = {key: self._decoded_part(part) for key, part in self._parts.items()}

    def touch(self, nbytes: int) -> None:
        """Have the system map about `nbytes` of memory for the first blocks now, instead of during the first restores.
        Only before the pool's first use, because the blocks are zeroed."""
        arrays = [self.rows, *self._decoded.values()]
        num = nbytes // sum(array[:1].nbytes for array in arrays)
        for array in arrays:
            array[:num].zero_()

    def allocate(self, num: int, *, after: int | None = None) -> list[int]:
        """The ids of free blocks, which are in use from now on. Neighbouring blocks are chosen where possible, because
        they can be read without a copy.

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
        """Free these blocks.  Raises InternalError for a block that is free already, or is named twice."""
        ids = self._held(block_ids)
        self._in_use[ids] = False
        self.num_free += len(ids)

    def landing(self, block_ids: Iterable[int]) -> list[memoryview]:
        """Host memory into which the blocks' payloads are to be read. All of this memory must be filled before `fill`
        is called.
        """
        return self._views(block_ids) if self._host is None else self._host.landing(block_ids)

    def payloads(self, block_ids: Iterable[int]) -> list[memoryview]:
        """The blocks' payloads in host memory. The payloads stay valid until the blocks are written again."""
        return self._views(block_ids) if self._host is None else self._host.fetch(block_ids)

    def unusable(self, block_ids: Iterable[int]) -> list[int]:
        """Which of the blocks' rows hold values that must not enter a computation (`finite.py`), in the order given."""
        ids = list(block_ids)
        if self._host is not None and ids:
            found = unusable_on_card(self.rows, upload(np.array(ids, np.int64), self.rows.device), self.layout)
            if found is not None:
                return [ids[number] for number in np.flatnonzero(found.cpu().numpy())]
            self._host.fetch(ids)
        rows = (self.rows if self._host is None else self._host.memory).numpy()
        bad: list[int] = []
        for first in range(0, len(ids), _CHECKED_BLOCKS):
            part = ids[first : first + _CHECKED_BLOCKS]
            neighbours = part == list(range(part[0], part[0] + len(part)))
            found_here = unusable_rows(rows[part[0] : part[0] + len(part)] if neighbours else rows[part], self.layout)
            bad += [part[number] for number in np.flatnonzero(found_here)]
        return bad

    def fill(self, block_ids: Iterable[int]) -> list[int]:
        """Take in payloads that were read into host memory, up to the first payload that holds unusable values. Returns
        all blocks whose payloads hold such values.

        A GPU checks its own rows, which takes a fraction of the time that the host needs.
        """
        block_ids = list(block_ids)
        if self._host is not None:
            self._host.send(block_ids)
        bad = self.unusable(block_ids)
        self._spread(block_ids[: block_ids.index(bad[0])] if bad else block_ids)
        return bad

    def note_filled(self, block_ids: Iterable[int]) -> None:
        """Like `fill`, but for payloads that need no check."""
        block_ids = list(block_ids)
        if self._host is not None:
            self._host.send(block_ids)
        self._spread(block_ids)

    def _spread(self, block_ids: list[int]) -> None:
        """These rows have new payloads, which must be copied to every rank and decoded again."""
        if not block_ids:
            return
        if self.lead is not None:
            self.lead.fill(self, block_ids)
        self.decode_rows(block_ids)

    def decode_rows(self, block_ids: list[int]) -> None:
        """The named rows have new payloads, so their decoded copies must be updated."""
        if self.layout.kv_format is not KVFormat.FP8:
            return
        ids = torch.as_tensor(block_ids, dtype=torch.long, device=self.rows.device)
        # Threads would wait for one another after each of many small operations: with two of them it takes longer.
        with one_thread():
            # In pieces, because a restore of a long prefix has thousands of blocks.
            for piece in torch.split(ids, max(1, _DECODE_BYTES // self.layout.block_bytes)):
                first, last = int(piece[0]), int(piece[-1])
                neighbours = last - first == len(piece) - 1 and bool((piece[1:] > piece[:-1]).all())
                self._decode_piece(slice(first, last + 1) if neighbours else piece)

    def _decode_piece(self, where: slice | Tensor) -> None:
        for key, part in self._parts.items():
            records, decoded = self.records(part)[where], self._decoded[key]
            if isinstance(where, slice):
                decode(part.kind, records, self.layout, out=decoded[where])
            else:
                out = decoded.new_empty((len(where), *decoded.shape[1:]))
                decoded[where] = decode(part.kind, records, self.layout, out=out)

    def clear(self, block_ids: Iterable[int]) -> None:
        """Zero rows that are about to be written for the first time, so that no bytes of an earlier owner remain."""
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
        rows = self.rows.numpy()
        return [rows[block_id].data for block_id in block_ids]

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
        given = list(block_ids)
        ids = np.asarray(given, dtype=np.int64)
        if len(ids) and (ids.min() < 0 or ids.max() >= self.num_blocks or not self._in_use[ids].all()):
            raise InternalError("a block id is outside the pool, or its block is not allocated")
        # Not np.unique, which loads numpy.ma at its first call, in the middle of a request.
        if len(set(given)) < len(given):
            raise InternalError("the same block is released twice in one call")
        return ids


def _fresh_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: str | torch.device) -> Tensor:
    """Zeros that take no memory on a CPU until they are written, because fresh pages of the operating system are zero
    already.

    The pages are mapped directly, not allocated through glibc: `antefix up` has glibc keep large freed memory, and when
    glibc returns kept memory as zeros it clears it first. That made 400 MB of an unused pool resident.

    The mapping is private: at its first write a page of a shared one, which is Python's default, takes the system 4 us,
    and one of a private mapping 2.3 us. Large pages took 0.1 ms per MiB, but 2.8 ms where the host of a virtual machine
    had never given the memory out before, so they are not asked for.
    """
    if torch.device(device).type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    kind = np.dtype(np.uint8 if dtype is torch.uint8 else np.float32)
    nbytes = max(math.prod(shape) * kind.itemsize, 1)
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.from_numpy(np.frombuffer(pages, kind, math.prod(shape)).reshape(shape))


def _first_run(
    free: np.ndarray[tuple[int], np.dtype[np.int64]], num: int
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The first `num` neighbouring ids of an ascending list; if no run is long enough, the first `num` ids."""
    starts = np.flatnonzero(free[num - 1 :] - free[: len(free) - num + 1] == num - 1)
    start = int(starts[0]) if len(starts) else 0
    return free[start : start + num]
