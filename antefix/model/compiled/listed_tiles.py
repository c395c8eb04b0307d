"""Tiles of products whose rows of one operand lie anywhere in memory: attention reads keys and values where they are.

Each sum is one chain of fused multiply-adds in the order of the addends, as in `row_tiles`, so its bits do not depend
on the tile that it is computed in. A list of addresses names the rows.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from antefix.model.compiled.intrinsics import f32, floats, fma, integers, plain
from antefix.model.compiled.tile_code import INDEX, NUMBER, WORD, at, everywhere, multiply_add, sum_up, write_sums

# How many listed rows one call of `dots` multiplies: with eight sums, no addition waits for the one before it.
KEYS = 8


def _dots(lanes: int) -> Any:
    """Compiles `dots(out, out_step, x, x_step, rows, first, addends, adds)`: addresses, and steps in numbers.

    out [KEYS, lanes] becomes, or is increased by, the listed rows' numbers from `first` on times x [addends, lanes].
    """
    vector = ir.VectorType(NUMBER, lanes)

    def build(_: Any, builder: Any, __: Any, args: Any) -> Any:
        pointer = NUMBER.as_pointer()
        out, x = builder.inttoptr(args[0], pointer), builder.inttoptr(args[2], pointer)
        listed = builder.inttoptr(args[4], WORD.as_pointer())
        addresses = [builder.load(builder.gep(listed, [WORD(i)])) for i in range(KEYS)]
        rows = [builder.gep(builder.inttoptr(each, pointer), [args[5]]) for each in addresses]
        fma_ = multiply_add(builder, vector)

        def step(k: Any, sums: list[Any]) -> list[Any]:
            shared = builder.load(at(builder, x, builder.mul(k, args[3]), vector), align=4)
            numbers = [everywhere(builder, builder.gep(row, [k]), vector) for row in rows]
            return [builder.call(fma_, [number, shared, s]) for number, s in zip(numbers, sums, strict=True)]

        sums = sum_up(builder, args[6], vector, KEYS, step)
        places = [at(builder, out, builder.mul(args[1], WORD(i)), vector) for i in range(KEYS)]
        write_sums(builder, places, sums, args[7])
        return WORD(0)

    def dots(_context: Any, out: Any, out_step: Any, x: Any, x_step: Any, rows: Any, first: Any, addends: Any,
             adds: Any) -> Any:  # fmt: skip
        return types.int64(*[types.int64] * 8), build

    return intrinsic(dots)


def _mix(rows: int, vectors: int) -> Any:
    """Compiles `mix(out, out_step, x, x_step, listed, first, addends, adds)`: addresses, and steps in numbers.

    out [rows, vectors * 8] becomes, or is increased by, x [rows, addends] times the listed rows' numbers from `first`
    on.
    """
    vector = ir.VectorType(NUMBER, 8)

    def build(_: Any, builder: Any, __: Any, args: Any) -> Any:
        pointer = NUMBER.as_pointer()
        out, x = builder.inttoptr(args[0], pointer), builder.inttoptr(args[2], pointer)
        listed = builder.inttoptr(args[4], WORD.as_pointer())
        lines = [builder.gep(x, [builder.mul(args[3], WORD(r))]) for r in range(rows)]
        fma_ = multiply_add(builder, vector)

        def step(k: Any, sums: list[Any]) -> list[Any]:
            base = builder.inttoptr(builder.load(builder.gep(listed, [k])), pointer)
            parts = [
                builder.load(at(builder, base, builder.add(args[5], WORD(8 * v)), vector), align=4)
                for v in range(vectors)
            ]
            numbers = [everywhere(builder, builder.gep(line, [k]), vector) for line in lines]
            return [
                builder.call(fma_, [numbers[r], parts[v], sums[r * vectors + v]])
                for r in range(rows) for v in range(vectors)
            ]  # fmt: skip

        sums = sum_up(builder, args[6], vector, rows * vectors, step)
        places = [
            at(builder, out, builder.add(builder.mul(args[1], WORD(r)), WORD(8 * v)), vector)
            for r in range(rows) for v in range(vectors)
        ]  # fmt: skip
        write_sums(builder, places, sums, args[7])
        return WORD(0)

    def mix(_context: Any, out: Any, out_step: Any, x: Any, x_step: Any, listed: Any, first: Any, addends: Any,
            adds: Any) -> Any:  # fmt: skip
        return types.int64(*[types.int64] * 8), build

    return intrinsic(mix)


@intrinsic
def add_votes(_context: Any, out: Any, hits: Any, step: Any, votes: Any) -> Any:
    """Increase 8 numbers by the weighted sums of 8 rows' hits: hits [8, 8], rows `step` numbers apart, votes [8].

    Each sum is a chain over a row's hits in order, and starts with the number that is there. Negative hits count as 0.
    """
    vector = ir.VectorType(NUMBER, KEYS)

    def swap(builder: Any, a: Any, b: Any, picked: list[int]) -> Any:
        return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(INDEX, KEYS), picked))

    def build(_: Any, builder: Any, __: Any, args: Any) -> Any:
        made, given, votes = (builder.inttoptr(args[i], NUMBER.as_pointer()) for i in (0, 1, 3))
        rows = [builder.load(at(builder, given, builder.mul(args[2], WORD(i)), vector), align=4) for i in range(8)]
        # Transpose: exchange blocks of 4, then of 2, then single numbers.
        for width in (4, 2, 1):
            low = [8 + i - width if i & width else i for i in range(8)]
            high = [8 + i if i & width else i + width for i in range(8)]
            for r in range(8):
                if not r & width:
                    a, b = rows[r], rows[r + width]
                    rows[r], rows[r + width] = swap(builder, a, b, low), swap(builder, a, b, high)
        zero = ir.Constant(vector, [0.0] * KEYS)
        total, fma_ = builder.load(at(builder, made, WORD(0), vector), align=4), multiply_add(builder, vector)
        for i, row in enumerate(rows):
            hit = builder.select(builder.fcmp_ordered(">", row, zero), row, zero)
            total = builder.call(fma_, [everywhere(builder, builder.gep(votes, [WORD(i)]), vector), hit, total])
        builder.store(total, at(builder, made, WORD(0), vector), align=4)
        return WORD(0)

    return types.int64(*[types.int64] * 4), build


_dots_4, _dots_8 = _dots(4), _dots(8)
_wide_4, _narrow_4, _wide_1, _narrow_1 = _mix(4, 2), _mix(4, 1), _mix(1, 2), _mix(1, 1)


@plain
def multiply_listed(out: int, x: int, rows: int, num: int, heads: int, size: int, tile: int) -> None:
    """out [num, heads] becomes the listed rows [num, size] times x [size, heads], in sums of `tile` addends that are
    added in order. heads: a multiple of 4. The list has a multiple of KEYS addresses; out has a row for each."""
    for start in range(0, size, tile):
        many = min(tile, size - start)
        for i in range(0, num, KEYS):
            to, given, listed = out + 4 * i * heads, x + 4 * start * heads, rows + 8 * i
            whole = heads // 8 * 8
            for h in range(0, whole, 8):
                _dots_8(to + 4 * h, heads, given + 4 * h, heads, listed, start, many, start)
            if whole < heads:
                _dots_4(to + 4 * whole, heads, given + 4 * whole, heads, listed, start, many, start)


@plain
def mix_listed(out: int, x: int, step: int, rows: int, heads: int, size: int, many: int, adds: int) -> None:
    """out [heads, size] becomes, or is increased by, x [heads, many], whose rows are `step` numbers apart, times the
    listed rows [many, size]: one chain per element."""
    h = 0
    while h < heads:
        count = 4 if heads - h >= 4 else 1
        to, given, whole = out + 4 * h * size, x + 4 * h * step, size // 16 * 16
        for c in range(0, whole, 16):
            if count == 4:
                _wide_4(to + 4 * c, size, given, step, rows, c, many, adds)
            else:
                _wide_1(to + 4 * c, size, given, step, rows, c, many, adds)
        if size - whole >= 8:
            if count == 4:
                _narrow_4(to + 4 * whole, size, given, step, rows, whole, many, adds)
            else:
                _narrow_1(to + 4 * whole, size, given, step, rows, whole, many, adds)
        if size % 8:
            _last_columns(to, given, step, rows, count, size, many, adds)
        h += count


@plain
def _last_columns(out: int, x: int, step: int, rows: int, heads: int, size: int, many: int, adds: int) -> None:
    """The columns beyond whole vectors."""
    listed = integers(rows, 0, many)
    for h in range(heads):
        row = floats(x, h * step, many)
        for c in range(size // 8 * 8, size):
            total = f32(0)
            for k in range(many):
                total = fma(row[k], floats(listed[k], c, 1)[0], total)
            made = floats(out, h * size + c, 1)
            made[0] = made[0] + total if adds else total
