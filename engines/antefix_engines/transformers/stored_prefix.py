"""Reading and writing one prompt's blocks and checkpoints. This module knows bytes and names, never tensors.

If a read delivers less than the lookup promised (damage, or eviction in between), the longest prefix that can still be
restored is used.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from antefix.block import Chain
from antefix.record import Record
from antefix_engines.engine_store import KvOfModel

# When payloads of so many bytes have been computed, they are put before more is computed.
_PUT_BYTES: Final = 64 << 20


@dataclass(slots=True)
class StoredPrefix:
    """blocks: payloads of `num_blocks` blocks; checkpoints: those of the last blocks, as many as the layout needs.

    num_known: blocks that the lookup found.  why: why `num_blocks` is smaller; empty if it is not.
    """

    num_blocks: int = 0
    num_known: int = 0
    blocks: bytearray = field(default_factory=bytearray)
    checkpoints: bytearray = field(default_factory=bytearray)
    why: str = ""


def read_prefix(kv: KvOfModel, chain: Chain, num_blocks_max: int) -> StoredPrefix:
    """The longest prefix of a chain that an engine can continue from, read and verified."""
    layout, size = kv.layout, kv.layout.block_bytes
    found = kv.lookup(chain.hashes[:num_blocks_max])
    have = set(found.checkpoints)
    out = StoredPrefix(num_known=found.num_blocks)
    ends = layout.restorable(found.num_blocks, have)
    if found.num_blocks and (not ends or ends[-1] < found.num_blocks):
        out.why = f"no checkpoint is stored after block {found.num_blocks - 1}"
    if not ends:
        return out
    blocks = bytearray(ends[-1] * size)
    rows = [memoryview(blocks)[i * size : (i + 1) * size] for i in range(ends[-1])]
    num_good = kv.get_blocks(chain.hashes[: ends[-1]], rows)
    if num_good < ends[-1]:
        out.why = f"block {num_good} was damaged, or evicted while it was read"
    while ends := layout.restorable(num_good, have):
        end = ends[-1]
        wanted = range(end - layout.num_checkpoints_at(end) + 1, end + 1)
        read = {number: kv.get_checkpoint(chain.hashes[number - 1]) for number in wanted}
        lost = [number for number, payload in read.items() if payload is None]
        if not lost:
            out.num_blocks = end
            # The rows are views of this bytearray, which cannot be shortened while they exist.
            out.blocks = blocks if end * size == len(blocks) else blocks[: end * size]
            out.checkpoints = bytearray(b"".join(payload for payload in read.values() if payload is not None))
            return out
        out.why = f"the checkpoint after block {lost[-1] - 1} was damaged, or evicted while it was read"
        have.difference_update(lost)
    return out


class PrefixWriter:
    """Puts a prompt's blocks and checkpoints, parents first, many at a time.

    every: checkpoints are stored for a boundary at every so many blocks, and for the last one, after `num_blocks`.
    """

    def __init__(self, kv: KvOfModel, chain: Chain, *, num_blocks: int, every: int = 1) -> None:
        self.num_blocks: Final = num_blocks
        self._kv, self._chain, self._every = kv, chain, every
        self._waiting: list[Record] = []
        self._waiting_bytes = 0
        self._num_stored = 0

    def keeps_checkpoint(self, number: int) -> bool:
        """Whether the checkpoint after the first `number` blocks is kept."""
        run = self._kv.layout.num_checkpoints
        next_kept = -(-number // self._every) * self._every
        return bool(run) and (next_kept - number < run or self.num_blocks - number < run)

    def add(self, index: int, block: bytearray | None, checkpoint: bytearray | None) -> None:
        """A None is a record that is stored already, need not be stored (`keeps_checkpoint`), or does not exist."""
        name, parent = self._chain.hashes[index], self._chain.parent(index)
        end = (index + 1) * self._kv.layout.block_size
        if block is not None:
            self._append(self._kv.block(name, parent, end, block))
        if checkpoint is not None:
            self._append(self._kv.checkpoint(name, parent, end, checkpoint))
        if self._waiting_bytes >= _PUT_BYTES:
            self.finish()

    def finish(self) -> int:
        """Put the waiting records. Returns how many of all records added so far are stored."""
        self._num_stored += self._kv.put(self._waiting)
        self._waiting, self._waiting_bytes = [], 0
        return self._num_stored

    def _append(self, record: Record) -> None:
        self._waiting.append(record)
        self._waiting_bytes += memoryview(record.payload).nbytes
