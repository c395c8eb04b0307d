"""Where the rows are that attention reads: entries and keys of a sequence in the pool, named by their index.

A kernel gets one array of NUM_PLACES integers (`Place`) about a part of the pool.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

from antefix.model.compiled.intrinsics import floats, integers, plain


class Place(IntEnum):
    """Indices into the array. VALUES: address of the part's decoded rows.  BLOCK_STEP: numbers between two blocks.
    PER_BLOCK: rows of a block.  TABLES: address of the block table of query 0.  TABLE_STEP: integers between the tables
    of two queries; 0: all queries are of one sequence."""

    VALUES = 0
    BLOCK_STEP = 1
    PER_BLOCK = 2
    TABLES = 3
    TABLE_STEP = 4


NUM_PLACES = len(Place)
VALUES, BLOCK_STEP, PER_BLOCK, TABLES, TABLE_STEP = (int(place) for place in Place)


@plain
def list_stored(listed: Any, places: Any, query: int, count: int, size: int) -> None:
    """The addresses of the first `count` rows, of `size` numbers each, that belong to a query's sequence."""
    per_block = places[PER_BLOCK]
    table = integers(places[TABLES], query * places[TABLE_STEP], (count + per_block - 1) // per_block)
    i = 0
    for b in range(len(table)):
        first = places[VALUES] + 4 * table[b] * places[BLOCK_STEP]
        for r in range(min(per_block, count - i)):
            listed[i] = first + 4 * r * size
            i += 1


@plain
def list_picked(listed: Any, places: Any, query: int, picked: Any, size: int) -> int:
    """The addresses of the rows whose indices are `picked`, up to the first negative one. Returns their number."""
    per_block = places[PER_BLOCK]
    table = places[TABLES] + 8 * query * places[TABLE_STEP]
    for i in range(len(picked)):
        index = picked[i]
        if index < 0:
            return i
        block = integers(table, index // per_block, 1)[0]
        listed[i] = places[VALUES] + 4 * (block * places[BLOCK_STEP] + index % per_block * size)
    return len(picked)


@plain
def turn_rows(made: Any, x: int, num: int, size: int, step: int) -> None:
    """Transpose x [num, size] to made [size, step]; the columns from `num` on keep their values."""
    for r in range(num):
        row = floats(x, r * size, size)
        for c in range(size):
            made[c * step + r] = row[c]
