"""Matrix products in MKL's order of addition, but without the padding rows of MKL's tiles.

MKL adds each element's products in one chain of fused multiply-adds, but only if there is at least a whole tile of rows
(`numerics`). For one row, padding to a whole tile would cost sixteen times the arithmetic. These kernels spell that
chain of additions out, over transposed weights.

Shapes:  N = rows, K = addends, O = columns.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from antefix.model.compiled import row_tiles as tiles
from antefix.model.compiled.intrinsics import f32, floats, fma, kernel, plain
from antefix.model.compiled.row_tiles import LANES, ROWS_MAX

# Weights are kept a second time, transposed, so this is done for small matrices only: up to 4 MiB.
_NUMBERS_MAX = 1 << 20


@plain
def _chain(made: Any, row: Any, weights: int, O: int) -> None:  # noqa: E741
    """made [O] becomes row [K] times weights [K, O]; the sums start at 0."""
    for c in range(O):
        made[c] = f32(0)
    whole = len(row) // 4 * 4
    for k in range(0, whole, 4):
        a0, a1, a2, a3 = row[k], row[k + 1], row[k + 2], row[k + 3]
        w0, w1 = floats(weights, k * O, O), floats(weights, (k + 1) * O, O)
        w2, w3 = floats(weights, (k + 2) * O, O), floats(weights, (k + 3) * O, O)
        for c in range(O):
            made[c] = fma(a3, w3[c], fma(a2, w2[c], fma(a1, w1[c], fma(a0, w0[c], made[c]))))
    for k in range(whole, len(row)):
        a0, w0 = row[k], floats(weights, k * O, O)
        for c in range(O):
            made[c] = fma(a0, w0[c], made[c])


@plain
def _wide(out: int, step: int, x: int, K: int, weights: int, O: int, num: int, many: int, adds: int) -> None:  # noqa: E741
    """A tile of two vectors of columns, of at most `tiles.ROWS_MAX` rows."""
    if num == 6:
        tiles.tile_6(out, step, x, K, weights, O, many, adds)
    elif num == 5:
        tiles.tile_5(out, step, x, K, weights, O, many, adds)
    elif num == 4:
        tiles.tile_4(out, step, x, K, weights, O, many, adds)
    elif num == 3:
        tiles.tile_3(out, step, x, K, weights, O, many, adds)
    elif num == 2:
        tiles.tile_2(out, step, x, K, weights, O, many, adds)
    else:
        tiles.tile_1(out, step, x, K, weights, O, many, adds)


@plain
def _narrow(out: int, step: int, x: int, K: int, weights: int, O: int, num: int, many: int, adds: int) -> None:  # noqa: E741
    """A tile of one vector of columns, of at most `tiles.ROWS_MAX` rows."""
    if num == 6:
        tiles.narrow_6(out, step, x, K, weights, O, many, adds)
    elif num == 5:
        tiles.narrow_5(out, step, x, K, weights, O, many, adds)
    elif num == 4:
        tiles.narrow_4(out, step, x, K, weights, O, many, adds)
    elif num == 3:
        tiles.narrow_3(out, step, x, K, weights, O, many, adds)
    elif num == 2:
        tiles.narrow_2(out, step, x, K, weights, O, many, adds)
    else:
        tiles.narrow_1(out, step, x, K, weights, O, many, adds)


@plain
def _columns(out: int, step: int, x: int, K: int, weights: int, O: int, num: int, many: int, adds: int) -> None:  # noqa: E741
    """The columns beyond whole vectors."""
    for n in range(num):
        row = floats(x, n * K, many)
        for c in range(O // LANES * LANES, O):
            total = f32(0)
            for k in range(many):
                total = fma(row[k], floats(weights, k * O + c, 1)[0], total)
            made = floats(out, n * step + c, 1)
            made[0] = made[0] + total if adds else total


@plain
def _sums(out: int, step: int, x: int, K: int, weights: int, O: int, num: int, many: int, adds: int) -> None:  # noqa: E741
    """out [N, O] becomes, or is increased by, `many` addends of each row of x times weights [many, O]."""
    whole = O // (2 * LANES) * 2 * LANES
    # Rows inside, so that the columns' weights are still in the cache for the next rows.
    for c in range(0, whole, 2 * LANES):
        for n in range(0, num, ROWS_MAX):
            _wide(out + 4 * (n * step + c), step, x + 4 * n * K, K, weights + 4 * c, O, min(num - n, ROWS_MAX), many,
                  adds)  # fmt: skip
    if O - whole >= LANES:
        for n in range(0, num, ROWS_MAX):
            _narrow(out + 4 * (n * step + whole), step, x + 4 * n * K, K, weights + 4 * whole, O,
                    min(num - n, ROWS_MAX), many, adds)  # fmt: skip
    if O % LANES:
        _columns(out, step, x, K, weights, O, num, many, adds)


@kernel("void(int64, int64, int64, int64, int64, int64, int64, int64)")
def multiply_rows(out: int, x: int, weights: int, num: int, K: int, O: int, step: int, tile: int) -> None:  # noqa: E741
    """out [N, O], with rows `step` numbers apart: x [N, K] times weights [K, O]. Sums are cut into parts of `tile`
    addends; the parts are added up in order.
    """
    if num > 1:
        for start in range(0, K, tile):
            _sums(out, step, x + 4 * start, K, weights + 4 * start * O, O, num, min(tile, K - start), start)
        return
    piece = np.empty(O, np.float32)
    for start in range(0, K, tile):
        many = min(tile, K - start)
        for n in range(num):
            made, row = floats(out, n * step, O), floats(x, n * K + start, many)
            if start == 0:
                _chain(made, row, weights, O)
            else:
                _chain(piece, row, weights + 4 * start * O, O)
                for c in range(O):
                    made[c] += piece[c]


def multiply(x: Tensor, weight: Tensor, tile: int, out: Tensor | None = None) -> Tensor | None:
    """x [N, K] times weight [O, K] transposed, to `out`, whose rows may be apart. Returns None if the weight is too
    large to keep a transposed copy.
    """
    columns, addends = weight.shape
    matrix = turned(weight)
    if matrix is None:
        return None
    x = x.contiguous()
    made = x.new_empty(x.shape[0], columns) if out is None else out
    multiply_rows(
        made.data_ptr(), x.data_ptr(), matrix.data_ptr(), x.shape[0], addends, columns, made.stride(0), tile
    )  # fmt: skip
    return made


def turned(weight: Tensor) -> Tensor | None:
    """The weights transposed [K, O]. The transposed copy is kept with the weights, and made again if the weights were
    changed or moved.
    """
    if weight.numel() > _NUMBERS_MAX or weight.dtype is not torch.float32:
        return None
    if weight.is_inference():
        return weight.T.contiguous()
    kept: tuple[tuple[int, int], Tensor] | None = getattr(weight, "_antefix_turned", None)
    made_of = weight._version, weight.data_ptr()
    if kept is None or kept[0] != made_of:
        kept = made_of, weight.data.T.contiguous()
        weight._antefix_turned = kept  # type: ignore[attr-defined]
    return kept[1]
