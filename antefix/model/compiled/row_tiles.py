"""Tiles of a product that keep their sums in registers: some rows by one or two vectors of columns.

Each sum is one chain of fused multiply-adds in the order of the addends, as in `products`, so its bits do not depend on
the tile that it is computed in. A tile reads each weight once for all of its rows.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from antefix.model.compiled.tile_code import NUMBER, WORD, at, everywhere, multiply_add, sum_up, write_sums

# Six rows by two vectors: with two vectors of weights and one of inputs they fill the 16 registers of AVX2.
ROWS_MAX = 6
LANES = 8


def _tile(rows: int, vectors: int) -> Any:
    """Compiles `sums(out, out_step, x, x_step, weights, columns, addends, adds)`: addresses, and steps in numbers.

    out [rows, vectors * LANES] becomes x [rows, addends] times weights [addends, columns]; or is increased by it, if
    `adds` is not 0.
    """
    vector = ir.VectorType(NUMBER, LANES)

    def build(_: Any, builder: Any, __: Any, args: Any) -> Any:
        out, x, weights = (builder.inttoptr(args[i], NUMBER.as_pointer()) for i in (0, 2, 4))
        lines = [builder.gep(x, [builder.mul(args[3], WORD(r))]) for r in range(rows)]
        fma = multiply_add(builder, vector)

        def step(k: Any, sums: list[Any]) -> list[Any]:
            first = builder.mul(k, args[5])
            parts = [
                builder.load(at(builder, weights, builder.add(first, WORD(v * LANES)), vector), align=4)
                for v in range(vectors)
            ]
            made = []
            for r in range(rows):
                same = everywhere(builder, builder.gep(lines[r], [k]), vector)
                made += [builder.call(fma, [same, parts[v], sums[r * vectors + v]]) for v in range(vectors)]
            return made

        sums = sum_up(builder, args[6], vector, rows * vectors, step)
        places = [
            at(builder, out, builder.add(builder.mul(args[1], WORD(r)), WORD(v * LANES)), vector)
            for r in range(rows) for v in range(vectors)
        ]  # fmt: skip
        write_sums(builder, places, sums, args[7])
        return WORD(0)

    def sums(_context: Any, out: Any, out_step: Any, x: Any, x_step: Any, weights: Any, columns: Any, addends: Any,
             adds: Any) -> Any:  # fmt: skip
        return types.int64(*[types.int64] * 8), build

    return intrinsic(sums)


tile_1, tile_2, tile_3, tile_4, tile_5, tile_6 = (_tile(rows, 2) for rows in range(1, ROWS_MAX + 1))
narrow_1, narrow_2, narrow_3, narrow_4, narrow_5, narrow_6 = (_tile(rows, 1) for rows in range(1, ROWS_MAX + 1))
