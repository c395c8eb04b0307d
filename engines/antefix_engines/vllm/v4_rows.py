"""Rows of a V4 cache as our blocks and checkpoints.

A row of the blocks' group is a BLOCK, chained to the block before it. The rows of all other groups that end in one
block's tail form one CHECKPOINT of that block. The checkpoint is stored when its last row has come, because vLLM
stores rows as it computes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import numpy as np

from antefix.record import Record, RecordKind
from antefix_engines.engine_store import EngineStore
from antefix_engines.vllm.naming import Identity
from antefix_engines.vllm.prompt import Asked, Prompt, Row
from antefix_engines.vllm.row_store import Restored, Stored, TierCounters
from antefix_engines.vllm.v4_pages import NO_MEMORY, Bytes, Piece, V4Pages

# Limit on windows that wait for their last rows, one per prompt in prefill. On V4-Flash each takes 3.6 MB.
UNFINISHED_MAX: Final = 64
# Blocks that one thread reads at a time: 16 MB on V4-Flash.
BATCH_BLOCKS: Final = 16
# One thread reads and fills this much in less time than waking another thread takes.
ALONE_BYTES: Final = 4 << 20
# Limit on remembered names that this process stored: KV that several requests compute at once is sent only once.
KNOWN_MAX: Final = 65536

RowAt = tuple[int, int]


@dataclass(slots=True)
class _Window:
    """A window whose rows are arriving. parts: by place.  keys: those of all rows that a lookup finds once it is
    stored.
    """

    parts: dict[RowAt, bytes] = field(default_factory=dict)
    keys: list[bytes] = field(default_factory=list)


class V4Rows:
    """`antefix_engines.vllm.row_store.RowStore` for V4. `put` is called by one thread, `get` and `find` by several."""

    def __init__(
        self,
        pages: V4Pages,
        memory: Bytes,
        store: EngineStore,
        identity: Identity,
        counters: TierCounters,
        *,
        num_readers: int = 4,
    ) -> None:
        """memory: vLLM's host memory, one line per row.  num_readers: threads that read and fill, for all loads."""
        self.pages: Final = pages
        self.counters: Final = counters
        self.memory = memory
        self._kv: Final = store.kv(identity.fingerprint(pages.layout), pages.layout)
        self._pieces: Final[dict[RowAt, tuple[int, Piece]]] = _places(pages)
        # Only the storing thread uses these; other threads set `_has_lost` to tell it that records may be gone.
        self._unfinished: OrderedDict[bytes, _Window] = OrderedDict()
        self._known: OrderedDict[tuple[RecordKind, bytes], None] = OrderedDict()
        self._has_lost = False
        self._readers: Final = ThreadPoolExecutor(num_readers, thread_name_prefix="antefix-vllm-read")

    def may_have(self, asked: Asked) -> bool:
        return asked.group == self.pages.blocks.id or self.pages.is_in_window(asked.group, asked.position)

    def remembers(self, group: int) -> bool:
        return group == self.pages.blocks.id

    def find(self, prompt: Prompt, asked: Sequence[Asked]) -> set[bytes]:
        """Keys of blocks up to the last stored window, and of the rows of all windows. Later blocks would be
        useless.
        """
        blocks = sorted((each for each in asked if each.group == self.pages.blocks.id), key=lambda each: each.position)
        if blocks:
            found = self._kv.lookup([self._kv.hash_of(each.hash) for each in blocks])
            prompt.windows |= {blocks[number - 1].position for number in found.checkpoints}
        last = max(prompt.windows, default=0)
        rows = (each for each in asked if each.group != self.pages.blocks.id)
        return {each.key for each in blocks if each.position <= last} | {
            each.key for each in rows if self.pages.end_of(each.position) in prompt.windows
        }

    def put(self, prompt: Prompt, rows: Sequence[Row]) -> Stored:
        if self._has_lost:
            self._has_lost = False
            self._known.clear()
        records: list[Record] = []
        keys: list[bytes] = []
        for row in sorted(rows, key=lambda row: (row.position, row.group != self.pages.blocks.id)):
            cell = self._cell(row)
            if cell is not None:
                store = self._take_block if row.group == self.pages.blocks.id else self._take_window_row
                store(prompt, row, cell, records, keys)
        is_right = self._kv.put(records) == len(records)
        if is_right:
            num_blocks = sum(record.kind is RecordKind.BLOCK for record in records)
            self.counters.count(stored_blocks=num_blocks, stored_windows=len(records) - num_blocks)
        else:
            for record in records:
                self._known.pop((record.kind, record.hash), None)
        nbytes = sum(memoryview(record.payload).nbytes for record in records)
        return Stored(num_bytes=nbytes, keys=keys if is_right else [], is_right=is_right)

    def get(self, prompt: Prompt, rows: Sequence[Row]) -> Restored:
        """Load rows. A window is useless without all blocks before it: only blocks and windows before the first lost
        block count.
        """
        blocks = sorted((row for row in rows if row.group == self.pages.blocks.id), key=lambda row: row.position)
        batches = [blocks[at : at + BATCH_BLOCKS] for at in range(0, len(blocks), BATCH_BLOCKS)]
        windows = self._by_end(rows)
        # 1. Read and fill everything at once, because losses are rare.
        nbytes = len(blocks) * self.pages.block_bytes + len(windows) * self.pages.window_bytes
        reading = [partial(self._get_blocks, batch) for batch in batches]
        filling = [partial(self._get_window, prompt, end, windows[end]) for end in windows]
        results = self._run([*reading, *filling], nbytes)
        # 2. Count the useful rows.
        good: list[bytes] = []
        is_whole = True
        for batch, num_good in zip(batches, results, strict=False):
            good += [row.key for row in batch[:num_good]] if is_whole else []
            is_whole &= num_good == len(batch)
        num_blocks, num_windows = len(good), 0
        first_lost = blocks[num_blocks].position if num_blocks < len(blocks) else None
        for end, is_filled in zip(windows, results[len(batches) :], strict=True):
            if is_filled and (first_lost is None or end < first_lost):
                good += [row.key for row in windows[end]]
                num_windows += 1
        self.counters.count(restored_blocks=num_blocks, restored_windows=num_windows, lost_rows=len(rows) - len(good))
        # A record that a lookup had found is gone, so it may have to be stored again.
        self._has_lost |= len(good) < len(rows)
        nbytes = num_blocks * self.pages.block_bytes + num_windows * self.pages.window_bytes
        return Restored(num_bytes=nbytes, keys=good)

    def _run(self, works: Sequence[Callable[[], int]], nbytes: int) -> list[int]:
        """The results of all works. All reads have ended when this returns, even if one failed, because the rows belong
        to vLLM afterwards.
        """
        if nbytes <= ALONE_BYTES:
            return [work() for work in works]
        running = [self._readers.submit(work) for work in works]
        wait(running)
        return [each.result() for each in running]

    def close(self) -> None:
        self._readers.shutdown()
        self.memory = NO_MEMORY

    # --- storing -------------------------------------------------------------------------------------------------

    def _cell(self, row: Row) -> Bytes | None:
        """The cell of the first rank; None if another rank's cell differs, which must not happen with V4."""
        width = self.pages.shape.cell_bytes
        line: Bytes = self.memory[row.chunk]
        first = line[:width]
        for rank in range(1, self.pages.shape.num_cells):
            other = line[rank * width : (rank + 1) * width]
            if any(not np.array_equal(run.used(first), run.used(other)) for run in self.pages.runs[row.group]):
                self.counters.count(unequal_ranks=1)
                return None
        return first

    def _take_block(self, prompt: Prompt, row: Row, cell: Bytes, records: list[Record], keys: list[bytes]) -> None:
        name, parent = self._kv.hash_of(row.hash), self._parent(prompt, row.position)
        if not parent:
            self.counters.count(orphaned_rows=1)
        elif self._is_new(RecordKind.BLOCK, name):
            payload = np.concatenate([run.used(cell).reshape(-1) for run in self.pages.runs[row.group]])
            records.append(self._kv.block(name, parent, row.position, payload.data))
            keys.append(row.key)

    def _take_window_row(self, prompt: Prompt, row: Row, cell: Bytes, records: list[Record], keys: list[bytes]) -> None:
        """Keep the part of the checkpoint that this row has. The last missing part completes the checkpoint's
        record.
        """
        end = self.pages.end_of(row.position)
        if not self.pages.is_in_window(row.group, row.position) or not self._name_at(prompt, end):
            return
        name = self._name_at(prompt, end)
        if (RecordKind.CHECKPOINT, name) in self._known:
            keys.append(row.key)
            return
        window = self._unfinished.setdefault(name, _Window())
        self._unfinished.move_to_end(name)
        window.keys.append(row.key)
        at = (row.group, end - row.position)
        if at in self._pieces:
            window.parts[at] = b"".join(view.tobytes() for view in self._pieces[at][1].views(cell))
        if len(window.parts) < len(self._pieces):
            self._bound_unfinished()
            return
        del self._unfinished[name]
        self._is_new(RecordKind.CHECKPOINT, name)
        payload = b"".join(window.parts[each] for each in self._pieces)
        records.append(self._kv.checkpoint(name, self._parent(prompt, end) or self._kv.root, end, payload))
        keys += window.keys

    def _bound_unfinished(self) -> None:
        while len(self._unfinished) > UNFINISHED_MAX:
            self._unfinished.popitem(last=False)
            self.counters.count(unfinished_windows=1)

    def _parent(self, prompt: Prompt, position: int) -> bytes:
        """The name of the block before this one; empty if it is not known."""
        before = position - self.pages.block_tokens
        return self._name_at(prompt, before) if before > 0 else self._kv.root

    def _name_at(self, prompt: Prompt, end: int) -> bytes:
        """The name of the block that ends at this position; empty if its hash is not known."""
        found = prompt.rows.get((self.pages.blocks.id, end))
        return b"" if found is None else self._kv.hash_of(found)

    def _is_new(self, kind: RecordKind, name: bytes) -> bool:
        """Whether this process has not stored this name yet; the name is marked as stored."""
        is_new = (kind, name) not in self._known
        self._known[kind, name] = None
        self._known.move_to_end((kind, name))
        if len(self._known) > KNOWN_MAX:
            self._known.popitem(last=False)
        return is_new

    # --- restoring -----------------------------------------------------------------------------------------------

    def _cells(self, row: Row) -> list[Bytes]:
        """The cells into which each rank's bytes are written."""
        width, line = self.pages.shape.cell_bytes, self.memory[row.chunk]
        return [line[rank * width : (rank + 1) * width] for rank in range(self.pages.shape.num_cells)]

    def _fill_block(self, row: Row, payload: Bytes) -> None:
        for cell in self._cells(row):
            offset = 0
            for run in self.pages.runs[row.group]:
                used = run.used(cell)
                used[...] = payload[offset : offset + used.size].reshape(used.shape)
                offset += used.size

    def _by_end(self, rows: Sequence[Row]) -> dict[int, list[Row]]:
        ends: dict[int, list[Row]] = {}
        for row in rows:
            if row.group != self.pages.blocks.id and self.pages.is_in_window(row.group, row.position):
                ends.setdefault(self.pages.end_of(row.position), []).append(row)
        return ends

    def _get_blocks(self, blocks: Sequence[Row]) -> int:
        """Read blocks and fill their rows. Returns how many leading blocks passed all checks."""
        payloads = np.empty((len(blocks), self.pages.block_bytes), np.uint8)
        names = [self._kv.hash_of(row.hash) for row in blocks]
        num_good = self._kv.get_blocks(names, [line.data for line in payloads])
        for row, payload in zip(blocks[:num_good], payloads, strict=False):
            self._fill_block(row, payload)
        return num_good

    def _get_window(self, prompt: Prompt, end: int, rows: Sequence[Row]) -> bool:
        name = self._name_at(prompt, end)
        payload = self._kv.get_checkpoint(name) if name else None
        if payload is not None:
            self._fill_window(rows, np.frombuffer(payload, np.uint8))
        return payload is not None

    def _fill_window(self, rows: Sequence[Row], payload: Bytes) -> None:
        for row in rows:
            end = self.pages.end_of(row.position)
            offset, piece = self._pieces.get((row.group, end - row.position), (0, None))
            for cell in self._cells(row):
                if piece is None or piece.only_live:
                    # Bytes that no hit reads become zeros instead of keeping the memory's old content.
                    for run in self.pages.runs[row.group]:
                        run.used(cell)[...] = 0
                if piece is not None:
                    _scatter(piece, cell, payload[offset : offset + piece.nbytes])


def _places(pages: V4Pages) -> dict[RowAt, tuple[int, Piece]]:
    """For each (group, tokens before the end): the place in a checkpoint, and the piece of that row."""
    places, offset = {}, 0
    for piece in pages.pieces:
        places[piece.group, piece.tokens_before_end] = (offset, piece)
        offset += piece.nbytes
    return places


def _scatter(piece: Piece, cell: Bytes, data: Bytes) -> None:
    offset = 0
    for view in piece.views(cell):
        view[...] = data[offset : offset + view.size].reshape(view.shape)
        offset += view.size
