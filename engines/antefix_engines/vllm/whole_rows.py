"""Stores rows as they are, for models other than V4 and for unknown layouts: plain, MLA, sliding windows, Mamba.

Each row of each group is a BLOCK under its group's fingerprint. The tier assumes nothing about the bytes of a row,
except that each rank has a cell. A row depends on the row before it if that is stored; otherwise it begins a chain,
since windows and states may begin anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from antefix.block import Family
from antefix.record import Record
from antefix_engines.engine_layout import EngineLayout, Part, plain_rows
from antefix_engines.engine_store import EngineStore, KvOfModel
from antefix_engines.vllm.naming import Identity
from antefix_engines.vllm.prompt import Asked, Prompt, Row
from antefix_engines.vllm.row_store import Restored, Stored, TierCounters
from antefix_engines.vllm.shape import Group, Shape
from antefix_engines.vllm.v4_pages import NO_MEMORY, Bytes

# In a group whose rows may begin inside a prompt, so many of the last rows are looked up one by one.
WINDOW_ROWS_MAX: Final = 128
_WIDTHS: Final = {"bfloat16": 2, "float16": 2, "half": 2, "float32": 4}


class WholeRows:
    """`antefix_engines.vllm.row_store.RowStore` for everything except V4."""

    def __init__(
        self, shape: Shape, memory: Bytes, store: EngineStore, identity: Identity, counters: TierCounters
    ) -> None:
        self.shape: Final = shape
        self.counters: Final = counters
        self.memory = memory
        self._groups: Final = {group.id: self._shards(store, identity, group) for group in shape.groups}

    def _shards(self, store: EngineStore, identity: Identity, group: Group) -> list[KvOfModel]:
        """One part per cell of a row, or one for all cells, if they are together the same bytes with any number of
        ranks.
        """
        num_shards = self._num_shards
        nbytes = self.shape.cell_bytes * self.shape.num_cells // num_shards
        width = _WIDTHS.get(self.shape.dtype, 1)
        # The layers are part of the name, because groups of equal size may still differ.
        part = Part(
            layer=0,
            group=",".join(group.layers),
            num_rows=1,
            record=plain_rows(nbytes, width if nbytes % width == 0 else 1),
            dtype=self.shape.dtype,
        )
        layout = EngineLayout(engine="vllm", family=Family.OPAQUE, block_size=group.num_tokens, block=(part,))
        return [
            store.kv(
                identity.fingerprint(
                    layout, group=str(group.id), shard=f"{number}/{num_shards}" if num_shards > 1 else ""
                ),
                layout,
            )
            for number in range(num_shards)
        ]

    @property
    def _num_shards(self) -> int:
        return 1 if self.shape.is_one_whole or self.shape.is_replicated else self.shape.num_cells

    def may_have(self, asked: Asked) -> bool:
        return asked.group in self._groups

    def remembers(self, group: int) -> bool:
        return group in self._groups

    def find(self, prompt: Prompt, asked: Sequence[Asked]) -> set[bytes]:
        found: set[bytes] = set()
        for group in self.shape.groups:
            of_group = sorted((each for each in asked if each.group == group.id), key=lambda each: each.position)
            if of_group:
                found |= self._found_of(group, of_group)
        return found

    def _found_of(self, group: Group, asked: Sequence[Asked]) -> set[bytes]:
        """The leading rows that are stored; for windows the last rows, one by one. For a group that may be of either
        kind, both are looked up.
        """
        kv = self._groups[group.id][-1]
        is_window = group.num_window_rows if len(self.shape.groups) > 1 else 0
        num_found = 0 if is_window else kv.lookup([kv.hash_of(each.hash) for each in asked]).num_blocks
        found = {each.key for each in asked[:num_found]}
        if is_window != 0:
            rest = asked[num_found:][-WINDOW_ROWS_MAX:]
            found |= {each.key for each in rest if kv.lookup([kv.hash_of(each.hash)]).num_blocks}
        return found

    def put(self, prompt: Prompt, rows: Sequence[Row]) -> Stored:
        nbytes, keys, is_right = 0, [], True
        for group in self.shape.groups:
            of_group = sorted((row for row in rows if row.group == group.id), key=lambda row: row.position)
            if not of_group:
                continue
            # The last rank's rows are stored last. Lookups search for these, so if they are found, all others are
            # stored.
            for number, kv in enumerate(self._groups[group.id]):
                records = self._records(kv, number, group, prompt, of_group)
                num_taken = kv.put(records)
                is_right &= num_taken == len(records)
                nbytes += sum(memoryview(record.payload).nbytes for record in records)
            keys += [row.key for row in of_group]
        self.counters.count(stored_blocks=len(rows) if is_right else 0)
        return Stored(num_bytes=nbytes, keys=keys if is_right else [], is_right=is_right)

    def _records(self, kv: KvOfModel, number: int, group: Group, prompt: Prompt, rows: Sequence[Row]) -> list[Record]:
        records: list[Record] = []
        before: Row | None = None
        for row in rows:
            parent = self._parent(kv, group, prompt, row, before)
            # A row that begins a chain gets the position of a first row, because a store accepts only that without a
            # parent.
            position = row.position if parent else group.num_tokens
            records.append(kv.block(kv.hash_of(row.hash), parent or kv.root, position, self._shard(row, number)))
            before = row
        return records

    def _parent(self, kv: KvOfModel, group: Group, prompt: Prompt, row: Row, before: Row | None) -> bytes:
        """The name of the row before, if that row is stored or about to be stored; else empty."""
        wanted = row.position - group.num_tokens
        if before is not None and before.position == wanted:
            return kv.hash_of(before.hash)
        earlier = prompt.rows.get((group.id, wanted))
        name = b"" if earlier is None else kv.hash_of(earlier)
        return name if name and kv.lookup([name]).num_blocks else b""

    def get(self, prompt: Prompt, rows: Sequence[Row]) -> Restored:
        nbytes, good = 0, []
        for group in self.shape.groups:
            left = sorted((row for row in rows if row.group == group.id), key=lambda row: row.position)
            while left:
                num_good = min(
                    kv.get_blocks([kv.hash_of(row.hash) for row in left], [self._shard(row, number) for row in left])
                    for number, kv in enumerate(self._groups[group.id])
                )
                good += [row.key for row in left[:num_good]]
                nbytes += num_good * self.shape.cell_bytes * self.shape.num_cells
                # The next row is lost. Later rows may be sound, and windows and states are useful without it.
                left = left[num_good + 1 :]
        self.counters.count(restored_blocks=len(good), lost_rows=len(rows) - len(good))
        return Restored(num_bytes=nbytes, keys=good)

    def close(self) -> None:
        self.memory = NO_MEMORY

    def _shard(self, row: Row, number: int) -> memoryview:
        nbytes = self.shape.cell_bytes * self.shape.num_cells // self._num_shards
        return self.memory[row.chunk, number * nbytes : (number + 1) * nbytes].data
