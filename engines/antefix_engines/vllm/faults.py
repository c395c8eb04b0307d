"""Faults to plant in checks, so that a check that cannot fail is noticed: incomplete restored rows, and flipped
bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from antefix.errors import BlockCorrupt
from antefix.record import RecordKind
from antefix.store_files.record_format import (
    RECORD_HEADER_BYTES,
    RECORD_MAGIC,
    SEGMENT_DIR,
    STORE_FILE,
    unpack_identity,
)
from antefix.store_files.record_header import unpack_record_header
from antefix_engines.vllm.prompt import Prompt, Row
from antefix_engines.vllm.row_store import Restored
from antefix_engines.vllm.v4_rows import V4Rows
from antefix_engines.vllm.whole_rows import WholeRows

NONE: Final = "none"
_V4_GET: Final = V4Rows.get
_WHOLE_GET: Final = WholeRows.get


def plant(name: str) -> None:
    """From now on, leave something out of every restored row.

    name: a kind of `v4_pages.Kind`, whose pages become zeros; for other models "group-N"; NONE ends the fault.
    """
    V4Rows.get = _V4_GET  # type: ignore[method-assign]
    WholeRows.get = _WHOLE_GET  # type: ignore[method-assign]
    if name.startswith("group-"):
        group = int(name.removeprefix("group-"))
        faulty = _zeroing(_WHOLE_GET, lambda rows, row: _zero_group(rows, row, group))
        WholeRows.get = faulty  # type: ignore[method-assign]
    elif name != NONE:
        faulty = _zeroing(_V4_GET, lambda rows, row: _zero_kind(rows, row, name))
        V4Rows.get = faulty  # type: ignore[method-assign]


def _zeroing(get: Callable[..., Restored], zero: Callable[[Any, Row], None]) -> Callable[..., Restored]:
    def get_with_fault(self: Any, prompt: Prompt, rows: Sequence[Row]) -> Restored:
        restored = get(self, prompt, rows)
        for row in rows:
            zero(self, row)
        return restored

    return get_with_fault


def _zero_kind(rows: V4Rows, row: Row, kind: str) -> None:
    for run in rows.pages.runs[row.group]:
        if run.kind == kind:
            run.used(rows.memory[row.chunk])[...] = 0


def _zero_group(rows: WholeRows, row: Row, group: int) -> None:
    if row.group == group:
        rows.memory[row.chunk][...] = 0


def flip_blocks(directory: Path, position: int) -> int:
    """Flip one bit in the middle of each block that ends at `position`. Returns how many there were.

    directory: the folder of the data; its store is in `store/`.
    """
    store = directory / "store"
    seed = unpack_identity((store / STORE_FILE).read_bytes()).seed
    num_flipped = 0
    for path in sorted((store / SEGMENT_DIR).glob("*.seg")):
        data, at = path.read_bytes(), -1
        with path.open("r+b") as file:
            while (at := data.find(RECORD_MAGIC, at + 1)) >= 0:
                with contextlib.suppress(BlockCorrupt):
                    header = unpack_record_header(data[at : at + RECORD_HEADER_BYTES], seed)
                    if header.kind is RecordKind.BLOCK and header.position == position:
                        middle = at + RECORD_HEADER_BYTES + header.stored_bytes // 2
                        file.seek(middle)
                        file.write(bytes([data[middle] ^ 1]))
                        num_flipped += 1
    return num_flipped
