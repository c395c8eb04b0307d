"""Tiles of a product that keep their sums in registers: some rows by one or two vectors of columns.

Each sum is one chain of fused multiply-adds in the order of the addends, as in `products`, so its bits do not depend on
the tile that it is computed in. A tile reads each weight once for all of its rows.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

# Six rows by two vectors: with two vectors of weights and one of inputs they fill the 16 registers of AVX2.
ROWS_MAX = 6
LANES = 8


def _tile(rows: int, vectors: int) -> Any:
    """Compiles `sums(out, out_step, x, x_step, weights, columns, addends, adds)`: addresses, and steps in numbers.

    out [rows, vectors * LANES] becomes x [rows, addends] times weights [addends, columns]; or is increased by it, if
    `adds` is not 0.
    """
    word, number = ir.IntType(64), ir.FloatType()
    vector = ir.VectorType(number, LANES)

    def at(builder: Any, base: Any, place: Any, kind: Any) -> Any:
        return builder.bitcast(builder.gep(base, [place]), kind.as_pointer())

    def build(_: Any, builder: Any, __: Any, args: Any) -> Any:
        out, x, weights = (builder.inttoptr(args[i], number.as_pointer()) for i in (0, 2, 4))
        out_step, x_step, columns, addends, adds = args[1], args[3], args[5], args[6], args[7]
        # llvmlite's own declaration of intrinsics knows no vectors.
        fma = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fma.v{LANES}f32"
        )
        lines = [builder.gep(x, [builder.mul(x_step, word(r))]) for r in range(rows)]
        before, loop, done = builder.block, *(builder.append_basic_block(name) for name in ("addend", "summed"))
        builder.branch(loop)
        builder.position_at_end(loop)
        # 1. For each addend, one multiply-add per sum.
        k = builder.phi(word)
        sums = [[builder.phi(vector) for _ in range(vectors)] for _ in range(rows)]
        first = builder.mul(k, columns)
        parts = [
            builder.load(at(builder, weights, builder.add(first, word(v * LANES)), vector), align=4)
            for v in range(vectors)
        ]
        made = []
        for r in range(rows):
            one = builder.insert_element(ir.Constant(vector, ir.Undefined), builder.load(builder.gep(lines[r], [k])),
                                         ir.IntType(32)(0))  # fmt: skip
            same = builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES))
            made.append([builder.call(fma, [same, parts[v], sums[r][v]]) for v in range(vectors)])
        after = builder.add(k, word(1))
        for phi, start, following in [(k, word(0), after)] + [
            (sums[r][v], ir.Constant(vector, [0.0] * LANES), made[r][v]) for r in range(rows) for v in range(vectors)
        ]:
            phi.add_incoming(start, before)
            phi.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", after, addends), loop, done)
        builder.position_at_end(done)
        # 2. Write the sums, or add them to what is there.
        places = [
            at(builder, out, builder.add(builder.mul(out_step, word(r)), word(v * LANES)), vector)
            for r in range(rows) for v in range(vectors)
        ]  # fmt: skip
        flat = [each for row in made for each in row]
        with builder.if_else(builder.icmp_signed("!=", adds, word(0))) as (more, new):
            with more:
                for place, each in zip(places, flat, strict=True):
                    builder.store(builder.fadd(builder.load(place, align=4), each), place, align=4)
            with new:
                for place, each in zip(places, flat, strict=True):
                    builder.store(each, place, align=4)
        return word(0)

    def sums(_context: Any, out: Any, out_step: Any, x: Any, x_step: Any, weights: Any, columns: Any, addends: Any,
             adds: Any) -> Any:  # fmt: skip
        return types.int64(*[types.int64] * 8), build

    return intrinsic(sums)


tile_1, tile_2, tile_3, tile_4, tile_5, tile_6 = (_tile(rows, 2) for rows in range(1, ROWS_MAX + 1))
narrow_1, narrow_2, narrow_3, narrow_4, narrow_5, narrow_6 = (_tile(rows, 1) for rows in range(1, ROWS_MAX + 1))
