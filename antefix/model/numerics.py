"""Products and functions whose results for a row do not depend on the other rows, nor on the number of threads.

A cache hit must equal a cold run to the bit, though the two cut a prompt into different pieces, on workers with other
numbers of threads. On a CPU two things break that, and both are handled here and nowhere else:
    products    MKL has many kernels, and picks one by rows, columns, addends and threads. Most of them add up in one
    products    MKL has many kernels, and picks one by rows, columns, addends and threads. Most of them add up in one
                order: a chain of fused multiply-adds over the addends. Its kernels for few rows, for less than a tile
                of columns and for more than SUM_TILE addends use other orders, and where threads share a product, such
                remainders occur that one thread would not have. So every product of the model goes through `multiply`
                or `multiply_each`, which pad rows and columns to whole tiles and cut long sums themselves.
                Measured with 1 to 16 threads on an AMD EPYC (AVX2 kernels) and on Intel Xeons (AVX-512 kernels): plain
                products in whole tiles are such chains on all of them, so all give the same bits. Pairs with a
                transposed right side need more rows on a Xeon (TURNED_ROWS). A Xeon that is told to use MKL's AVX2
                kernels has products that are no such chains: there the probe says that rows depend on their place.
    sigmoid     PyTorch's vector body and scalar tail of sigmoid, silu and softplus round differently (about 4% of
                values), so an element's result depends on its place. exp, log1p and division do not.
    sums        PyTorch divides a sum over a middle dim between threads by columns, and its order of addition depends
                on where the parts begin; `sum_middle` adds in a fixed order. A sum over the last dim is computed by
                one thread.
`antefix.model.arithmetic` tests all of this on the machine where it runs, for the shapes of the loaded model.

On a GPU, libraries choose kernels by shape as well. So on a GPU (`has_kernels`) the model uses the kernels of
`antefix_kernels.linear` and `antefix_kernels.tokens`, which compute a row in the same way whatever else is computed.

Shapes:  N = rows, K = input width, O = output width, R = rows of one pair.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from antefix.model.compiled.switch import is_compiled
from antefix.model.packed import PackedMatrix, card_product, round_inputs

# Row counts are padded to a multiple of this. From 4 rows on every tried kernel is the chain; 16 leaves a margin.
ROW_TILE = 16
# Column counts are padded to a multiple of this. Three threads would share 24 columns as 8 each, and MKL's kernel for
# 8 columns adds in another order.
COLUMN_TILE = 16
# Most addends in one product: MKL's AVX2 kernels cut longer sums into halves, its AVX-512 kernels from 384 on.
SUM_TILE = 192
# Addends are padded to a multiple of this, so that all rows start at aligned addresses: under MKL_CBWR a row's bits
# depend on its alignment.
ALIGN = 16
# The rows of one pair of `multiply_each` are padded to a multiple of this: other counts select other kernels.
PAIR_ROWS = 4
# Pairs whose right side is transposed, with more addends than TURNED_ADDENDS, are padded to at least TURNED_ROWS rows.
# MKL's AVX-512 kernels add in another order with 4 rows from 96 addends on, and with 8 rows at 192.
TURNED_ADDENDS = 64
TURNED_ROWS = 16
# PyTorch runs pairs with fewer multiplications in a loop of its own, which rounds differently.
_PAIR_WORK_MIN = 400
# A matrix with more columns is not copied for padding: its columns beyond whole tiles are multiplied separately.
_PADDED_COLUMNS_MAX = 512
# How many rows of a packed matrix a CPU decodes at once: whole tiles, and 1 MiB of float32 for 1,024 addends.
DECODED_ROWS = 256
# Up to this many rows a compiled chain is faster than MKL with rows padded to a tile (antefix-tiny, AVX2).
ROWS_FEW = 8


def pad_rows(x: Tensor, multiple: int = ROW_TILE) -> Tensor:
    """[N, ...] with zero rows appended until N is a multiple of the given number; `x` itself if N is a multiple
    already.
    """
    missing = -x.shape[0] % multiple
    if not missing:
        return x
    return torch.cat((x, x.new_zeros(missing, *x.shape[1:])))


@functools.cache
def has_triton() -> bool:
    """Whether the package that compiles our kernels is installed."""
    return importlib.util.find_spec("triton") is not None


def has_kernels(x: Tensor) -> bool:
    """Whether per-token computations on `x` use our kernels: on a GPU with Triton, no gradients, not in float64."""
    # Called some hundred times per step, so the usual answer comes first.
    return x.is_cuda and x.dtype in (torch.float32, torch.bfloat16) and not torch.is_grad_enabled() and has_triton()


def is_plain(a: Tensor, b: Tensor) -> bool:
    """Whether PyTorch's own operations are used: with gradients and on other devices, equal bits are not promised."""
    return not a.is_cpu or (torch.is_grad_enabled() and (a.requires_grad or b.requires_grad))


def linear(x: Tensor, weight: Tensor | PackedMatrix, *, splits: int | None = None) -> Tensor:
    """x [..., K] times weight [O, K] transposed, each row's bits independent of the other rows.

    Gradients, float64 on a GPU and other devices use the plain product, for which equal bits are not promised.
    splits: see `packed.card_product`.
    """
    if isinstance(weight, PackedMatrix):
        if has_kernels(x):
            done = card_product(x.reshape(-1, 1, x.shape[-1]), weight, splits=splits)
            return done.view(*x.shape[:-1], weight.shape[0])
        return _packed_linear(x, weight, 0, weight.shape[0])
    if has_kernels(x):
        from antefix_kernels.linear import multiply as card_multiply

        rows = x.reshape(-1, x.shape[-1])
        return card_multiply(rows, weight).view(*x.shape[:-1], weight.shape[0])
    if is_plain(x, weight):
        return F.linear(x, weight)
    if few_rows(x) and (product := _few_rows_linear(x, weight)) is not None:
        return product
    if x.dim() == 2:
        return _multiply_prepared(x, _prepared(weight))
    rows = _multiply_prepared(x.reshape(-1, x.shape[-1]), _prepared(weight))
    return rows.view(*x.shape[:-1], weight.shape[0])


def few_rows(x: Tensor) -> bool:
    """Whether products of x [N, K] run with the compiled kernels, which need no padding to whole tiles."""
    return x.shape[0] <= ROWS_FEW and x.dim() == 2 and is_compiled(x)


def _few_rows_linear(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor | None:
    from antefix.model.compiled.products import multiply as multiply_few

    return multiply_few(x, weight, SUM_TILE, out)


def linear_into(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """`linear` of x [N, K], written to `out` [N, O], whose rows may be apart in memory. For the CPU."""
    if few_rows(x) and _few_rows_linear(x, weight, out) is not None:
        return
    prepared = _prepared(weight)
    if x.shape[0] % ROW_TILE or prepared.more_addends or prepared.more_columns or len(prepared.parts) > 1:
        out.copy_(_multiply_prepared(x, prepared))
    else:
        _chain(x, prepared.parts[0], out)


def _packed_linear(x: Tensor, weight: PackedMatrix, start: int, stop: int) -> Tensor:
    """x [..., K] times rows [start, stop) of a packed matrix, decoded tile by tile. The bits of the result do not
    depend on the size of tiles.
    """
    rows = x.reshape(-1, x.shape[-1])
    if weight.rounds_inputs:
        rows = round_inputs(rows)
    tiles = range(start, stop, DECODED_ROWS)
    products = [linear(rows, weight.decode(first, min(first + DECODED_ROWS, stop), x.dtype)) for first in tiles]
    return (products[0] if len(products) == 1 else torch.cat(products, 1)).view(*x.shape[:-1], stop - start)


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A weight matrix as `multiply` needs it: transposed, padded to whole tiles, and cut into sums.

    parts: for each run of columns, the pieces [at most SUM_TILE addends, columns]; views where nothing was padded.
    made_of: identifies the weights and the tile sizes that the matrix was prepared from.
    """

    parts: tuple[tuple[Tensor, ...], ...]
    num_columns: int
    more_addends: int
    more_columns: int
    made_of: tuple[int, int, int]


def _prepared(weight: Tensor) -> _Prepared:
    """The prepared matrix, kept with the weights, because preparing costs more than a small product. The matrix is
    prepared again if the weights were changed or moved.
    """
    if weight.is_inference():
        return _prepare(weight, (0, 0, COLUMN_TILE))
    kept: _Prepared | None = getattr(weight, "_antefix_prepared", None)
    made_of = weight._version, weight.data_ptr(), COLUMN_TILE
    if kept is None or kept.made_of != made_of:
        # `data`: a view of the weights tensor itself, kept as its attribute, would keep it alive for ever.
        kept = _prepare(weight.data, made_of)
        weight._antefix_prepared = kept  # type: ignore[attr-defined]
    return kept


def _prepare(weight: Tensor, made_of: tuple[int, int, int]) -> _Prepared:
    num_columns, num_addends = weight.shape
    more_addends, more_columns = -num_addends % ALIGN, -num_columns % COLUMN_TILE
    if more_columns and num_columns > _PADDED_COLUMNS_MAX:
        b = _pad_matrix(weight.T, more_addends, 0)
        whole = num_columns - num_columns % COLUMN_TILE
        matrices = [b[:, :whole], _pad_matrix(b[:, whole:], 0, more_columns)]
    else:
        matrices = [_pad_matrix(weight.T, more_addends, more_columns)]
    parts = tuple(tuple(matrix.split(SUM_TILE)) for matrix in matrices)
    return _Prepared(parts, num_columns, more_addends, more_columns, made_of)


def _multiply_prepared(a: Tensor, b: _Prepared) -> Tensor:
    """`multiply` by a prepared matrix, which calls the same products as `multiply` itself."""
    num_rows = a.shape[0]
    more_rows = -num_rows % ROW_TILE
    if more_rows or b.more_addends:
        a = torch.constant_pad_nd(a, (0, b.more_addends, 0, more_rows))
    product = _chain(a, b.parts[0]) if len(b.parts) == 1 else torch.cat([_chain(a, part) for part in b.parts], 1)
    if b.more_columns:
        return product[:num_rows, : b.num_columns].contiguous()
    return product[:num_rows] if more_rows else product


def _chain(a: Tensor, pieces: tuple[Tensor, ...], out: Tensor | None = None) -> Tensor:
    """a times b, where b is given as pieces of SUM_TILE addends whose sums are added in order.  out: where to write."""
    if len(pieces) == 1:
        return torch.mm(a, pieces[0], out=out)
    lefts = a.split(SUM_TILE, 1)
    product = torch.mm(lefts[0], pieces[0], out=out)
    for left, piece in zip(lefts[1:], pieces[1:], strict=True):
        product.addmm_(left, piece)
    return product


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """a [N, K] times b [K, O], contiguous. Each element of the product depends on its own row and column only.

    Sums of at most SUM_TILE addends are one chain of multiply-adds each; the chains' results are added in order.
    """
    if is_plain(a, b):
        return torch.mm(a, b)
    num_rows, num_addends = a.shape
    num_columns = b.shape[1]
    more_rows, more_addends, more_columns = -num_rows % ROW_TILE, -num_addends % ALIGN, -num_columns % COLUMN_TILE
    # A decode step has hundreds of products, most of them in whole tiles already. This is the fast path for them.
    if not (more_rows or more_addends or more_columns):
        return multiply_tiles(a, b)
    if more_rows or more_addends:
        a = torch.constant_pad_nd(a, (0, more_addends, 0, more_rows))
    if more_columns and num_columns > _PADDED_COLUMNS_MAX:
        whole = num_columns - num_columns % COLUMN_TILE
        b = _pad_matrix(b, more_addends, 0)
        return torch.cat((multiply(a, b[:, :whole]), multiply(a, b[:, whole:])), 1)[:num_rows]
    product = multiply_tiles(a, _pad_matrix(b, more_addends, more_columns))
    return product[:num_rows, :num_columns].contiguous() if more_columns else product[:num_rows]


def multiply_tiles(a: Tensor, b: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """`multiply` for operands that are whole tiles already, plus `bias`, a scalar.  out: where to write a sum that has
    only one tile.
    """
    if a.shape[1] <= SUM_TILE:
        return torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)
    product = multiply_tiles(a[:, :SUM_TILE], b[:SUM_TILE], bias)
    for start in range(SUM_TILE, a.shape[1], SUM_TILE):
        product.addmm_(a[:, start : start + SUM_TILE], b[start : start + SUM_TILE])
    return product


def multiply_each(a: Tensor, b: Tensor) -> Tensor:
    """a [N, R, K] times b [N, K, O], pair by pair; each pair's bits are independent of the other pairs."""
    if is_plain(a, b):
        return torch.bmm(a, b)
    rows, addends, columns = a.shape[1], a.shape[2], b.shape[2]
    more_rows, more_columns = -rows % PAIR_ROWS, -columns % COLUMN_TILE
    if addends > TURNED_ADDENDS and rows < TURNED_ROWS and _is_transposed(b):
        more_rows = TURNED_ROWS - rows
    more_addends = max(-(-_PAIR_WORK_MIN // ((rows + more_rows) * (columns + more_columns))) - addends, 0)
    if more_rows or more_addends:
        a = torch.constant_pad_nd(a, (0, more_addends, 0, more_rows))
    if more_columns or more_addends:
        b = _pad_matrix(b, more_addends, more_columns)
    if a.shape[2] <= SUM_TILE:
        product = torch.bmm(a, b)
    else:
        product = torch.bmm(a[:, :, :SUM_TILE], b[:, :SUM_TILE])
        for start in range(SUM_TILE, a.shape[2], SUM_TILE):
            product.baddbmm_(a[:, :, start : start + SUM_TILE], b[:, start : start + SUM_TILE])
    return product[:, :rows, :columns] if more_rows or more_columns else product


def _is_transposed(b: Tensor) -> bool:
    return b.stride(-2) == 1 and b.stride(-1) != 1


def _pad_matrix(b: Tensor, more_rows: int, more_columns: int) -> Tensor:
    """b [..., K, O] with zero rows and columns appended. A transposed matrix stays transposed, because MKL uses other
    kernels for transposed matrices.
    """
    if not more_rows and not more_columns:
        return b
    if _is_transposed(b):
        return torch.constant_pad_nd(b.mT, (0, more_rows, 0, more_columns)).mT
    return torch.constant_pad_nd(b, (0, more_columns, 0, more_rows))


def sum_middle(x: Tensor) -> Tensor:
    """x [G, m, C] summed over m: one half of the rows is added to the other half until one row is left."""
    while x.shape[1] > 1:
        half = x.shape[1] // 2
        folded = x[:, :half] + x[:, half : 2 * half]
        x = torch.cat((folded, x[:, 2 * half :]), 1) if x.shape[1] % 2 else folded
    return x[:, 0]


def grouped_linear(x: Tensor, weight: Tensor | PackedMatrix) -> Tensor:
    """Block-diagonal product: x [N, G, K] times weight [G * O, K], group by group, to [N, G, O]."""
    num_groups = x.shape[1]
    if isinstance(weight, PackedMatrix):
        if has_kernels(x):
            return card_product(x, weight)
        size = weight.shape[0] // num_groups
        return torch.stack([_packed_linear(x[:, g], weight, g * size, (g + 1) * size) for g in range(num_groups)], 1)
    per_group = weight.view(num_groups, -1, weight.shape[1])
    if has_kernels(x):
        from antefix_kernels.linear import multiply_groups

        return multiply_groups(x, per_group)
    if is_plain(x, weight):
        return torch.einsum("ngk,gok->ngo", x, per_group)
    groups = zip(x.unbind(1), matrices_of(weight, num_groups), strict=True)
    return torch.stack([linear(rows, matrix) for rows, matrix in groups], dim=1)


def matrices_of(stack: Tensor, count: int) -> tuple[Tensor, ...]:
    """The `count` matrices [O, K] of a stack [count, O, K] or [count * O, K]. Each call returns the same tensors, so
    that `linear` finds what it has prepared for them.
    """
    if stack.is_inference():
        return stack.view(count, -1, stack.shape[-1]).unbind(0)
    made_of = stack._version, stack.data_ptr(), count
    kept: tuple[tuple[int, int, int], tuple[Tensor, ...]] | None = getattr(stack, "_antefix_matrices", None)
    if kept is None or kept[0] != made_of:
        kept = made_of, stack.data.view(count, -1, stack.shape[-1]).unbind(0)
        stack._antefix_matrices = kept  # type: ignore[attr-defined]
    return kept[1]


def sigmoid(x: Tensor) -> Tensor:
    """The logistic function, from exp and a division, which round alike in the vector body and in the scalar tail."""
    if x.device.type != "cpu" or x.requires_grad:
        return torch.sigmoid(x)
    return torch.neg(x).exp_().add_(1.0).reciprocal_()


def silu(x: Tensor) -> Tensor:
    return x * sigmoid(x)


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x); for x of 20 and more it is x itself, as in torch.nn.functional.softplus."""
    if x.device.type != "cpu" or x.requires_grad:
        return F.softplus(x)
    return torch.where(x > 20.0, x, torch.log1p(torch.exp(x.clamp(max=20.0))))


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type that norms, gates and rotations compute in: float32, or float64 for float64 models."""
    return torch.float64 if dtype is torch.float64 else torch.float32
