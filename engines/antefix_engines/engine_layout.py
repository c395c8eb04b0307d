"""Describes an engine's blocks and checkpoints, part by part. Knows bytes, never tensors.

A *group* is one kind of KV that an engine keeps together: keys of full attention, compressed entries, the window, a
state.
A part is one group of one layer: `num_rows` equal rows, each made of fields. A payload consists of its parts, one after
the other.

    block        KV that every later token may need: one record per block, and a restore reads all blocks of a prefix.
    checkpoint   state that only the next tokens need: window rows of the block's last tokens, states at its end.

To continue after block i, an engine reads blocks 0 to i, and the checkpoints of the last `num_checkpoints` blocks up to
i. A window of at most a block needs one checkpoint. Without windows there are no checkpoints, and `num_checkpoints` is
0.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Final

from antefix.block import Family
from antefix.errors import InvalidRequest
from antefix.layout import Field, RecordLayout

# Raise this when the same parts get another meaning; records stored before then become misses.
LAYOUT_VERSION: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """`num_rows` rows of one group of one layer.  dtype: of the numbers, such as "bfloat16"; for display and
    comparisons.
    """

    layer: int
    group: str
    num_rows: int
    record: RecordLayout
    dtype: str = ""

    @property
    def nbytes(self) -> int:
        return self.num_rows * self.record.nbytes


@dataclass(frozen=True, kw_only=True)
class EngineLayout:
    """A model's KV as one engine keeps it. This class has no slots, so that the derived numbers are computed only once.

    engine: the engine's name, so that two engines never read each other's payloads. block_size: tokens in a block.
    num_checkpoints: how many consecutive checkpoints a restore needs.
    """

    engine: str
    family: Family
    block_size: int
    block: tuple[Part, ...]
    checkpoint: tuple[Part, ...] = ()
    num_checkpoints: int = 0

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise InvalidRequest(f"a block must have at least one token, but block_size is {self.block_size}")
        if bool(self.checkpoint) != bool(self.num_checkpoints):
            raise InvalidRequest(
                "a layout must have parts in its checkpoints if a restore needs checkpoints, and no such parts "
                "otherwise"
            )

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts of a block, by the names that stores use (`antefix.layout.PayloadLayout`)."""
        return self.block

    @property
    def checkpoint_parts(self) -> tuple[Part, ...]:
        return self.checkpoint

    @cached_property
    def block_bytes(self) -> int:
        """Size of a block's payload. Stores refuse empty payloads, so a block without parts is one zero byte."""
        return max(sum(part.nbytes for part in self.block), 1)

    @cached_property
    def checkpoint_bytes(self) -> int:
        return sum(part.nbytes for part in self.checkpoint)

    def num_checkpoints_at(self, num_blocks: int) -> int:
        """How many checkpoints a restore of `num_blocks` blocks needs; the last of them is at the prefix's end."""
        return min(self.num_checkpoints, num_blocks)

    def restorable(self, num_blocks: int, checkpoints: Collection[int]) -> list[int]:
        """All numbers of blocks after which an engine can continue, ascending, given what a lookup found.

        checkpoints: the numbers of blocks after which there is a checkpoint.
        """
        have, run, ends = frozenset(checkpoints), 0, []
        for end in range(1, num_blocks + 1):
            run = run + 1 if end in have else 0
            if run >= self.num_checkpoints_at(end):
                ends.append(end)
        return ends

    def digest(self) -> bytes:
        """The 16 bytes that identify this layout; they are used as the geometry in a fingerprint."""
        text = json.dumps({"layout_version": LAYOUT_VERSION, **asdict(self)}, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16, person=b"antefix-englayou").digest()


def views_of(payload: memoryview, parts: tuple[Part, ...]) -> Iterator[tuple[Part, memoryview]]:
    """Each part, with a view of its bytes in a payload."""
    offset = 0
    for part in parts:
        yield part, payload[offset : offset + part.nbytes]
        offset += part.nbytes


def plain_rows(nbytes: int, width: int) -> RecordLayout:
    """A row of numbers of one kind, `width` bytes each."""
    return RecordLayout(fields=(Field(name="values", offset=0, nbytes=nbytes, width=width),))
