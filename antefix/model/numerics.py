"""Row-invariant building blocks: a token's numbers do not depend on how many tokens are computed beside it.

A cache hit must equal a cold run to the bit, though the two cut a prompt into different pieces. On a CPU two things
break that, and both are handled here and nowhere else:
    GEMMs       MKL picks another kernel, with another order of sums, for very few rows (measured: 1 and 2 rows, on
                some shapes up to 7 with two threads), so `linear` never runs fewer than ROW_TILE rows. And from 8
                threads on it splits long sums between threads when there are few rows (measured on a 16-core Xeon:
                from 384 addends on), so `linear` cuts sums into pieces of SUM_TILE itself. ALIGN says the rest.
    sigmoid     PyTorch's vector body and scalar tail of sigmoid, silu and softplus round differently (about 4% of
                values), so an element's result depends on its place. exp, log1p and division do not.
`row_invariant_ok` checks the premises on the machine at hand.
On a card libraries choose by shape as well; there `antefix_kernels.linear` and `antefix_kernels.tokens` take over
(`has_kernels`), in which a row's work is the same whatever else is computed.

Shapes:  N = rows, K = input width, O = output width.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

# Fewest rows that any GEMM runs, and what row counts are padded to. 8 was enough for every shape tried; 16 has margin.
ROW_TILE = 16
# Most addends in one product; none of up to 256 was split, on any shape, with 1 to 16 threads.
SUM_TILE = 256
# Addends are filled up to a multiple of this. Where rows do not all start at aligned addresses, a row's bits hung on
# its place among them (measured: widths of 5, 10, 30, 33, 250, 257 with up to 8 columns; never multiples of 16).
ALIGN = 16


def pad_rows(x: Tensor, multiple: int = ROW_TILE) -> Tensor:
    """[N, ...] with zero rows appended until N is a multiple; `x` itself when it is one already."""
    missing = -x.shape[0] % multiple
    if not missing:
        return x
    return torch.cat((x, x.new_zeros(missing, *x.shape[1:])))


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def has_kernels(x: Tensor) -> bool:
    """Whether per-token steps on `x` run as kernels: on a card with Triton, without gradients, not in float64."""
    return (
        x.device.type == "cuda"
        and x.dtype in (torch.float32, torch.bfloat16)
        and not torch.is_grad_enabled()
        and _has_triton()
    )


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., K] times weight [O, K] transposed, each row's bits independent of the other rows.

    Gradients, float64 on a card and other devices take the plain product, without that promise.
    """
    if has_kernels(x):
        from antefix_kernels.linear import multiply as card_multiply

        rows = x.reshape(-1, x.shape[-1])
        return card_multiply(rows, weight).view(*x.shape[:-1], weight.shape[0])
    if x.device.type != "cpu" or x.requires_grad:
        return F.linear(x, weight)
    rows = x.reshape(-1, x.shape[-1])
    num_rows = rows.shape[0]
    return multiply(pad_rows(rows), weight.T)[:num_rows].view(*x.shape[:-1], weight.shape[0])


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """a [N, K] times b [K, O], N a multiple of ROW_TILE: sums of at most SUM_TILE addends, added up in order."""
    if missing := -a.shape[1] % ALIGN:
        a, b = F.pad(a, (0, missing)), F.pad(b, (0, 0, 0, missing))
    if a.shape[1] <= SUM_TILE:
        return torch.mm(a, b)
    product = torch.mm(a[:, :SUM_TILE], b[:SUM_TILE])
    for start in range(SUM_TILE, a.shape[1], SUM_TILE):
        product.addmm_(a[:, start : start + SUM_TILE], b[start : start + SUM_TILE])
    return product


def multiply_each(a: Tensor, b: Tensor) -> Tensor:
    """a [N, R, K] times b [N, K, O], pair by pair: sums of at most SUM_TILE addends, added up in order.

    MKL runs one pair as a plain product, and was seen to split sums of 1,024 addends there, and nowhere else; with one
    column it is a product with a vector, summed in yet another order, so there is a second one.
    """
    if b.shape[2] == 1:
        return multiply_each(a, F.pad(b, (0, 1)))[:, :, :1]
    product = torch.bmm(a[:, :, :SUM_TILE], b[:, :SUM_TILE])
    for start in range(SUM_TILE, a.shape[2], SUM_TILE):
        product.baddbmm_(a[:, :, start : start + SUM_TILE], b[:, start : start + SUM_TILE])
    return product


def grouped_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Block-diagonal product: x [N, G, K] times weight [G * O, K], group by group, to [N, G, O]."""
    num_groups = x.shape[1]
    per_group = weight.view(num_groups, -1, weight.shape[1])
    if has_kernels(x):
        from antefix_kernels.linear import multiply_groups

        return multiply_groups(x, per_group)
    if x.device.type != "cpu" or x.requires_grad:
        return torch.einsum("ngk,gok->ngo", x, per_group)
    return torch.stack([linear(x[:, g], per_group[g]) for g in range(num_groups)], dim=1)


def sigmoid(x: Tensor) -> Tensor:
    """Logistic function from exp and a division, which round alike in vector body and scalar tail."""
    if x.device.type != "cpu" or x.requires_grad:
        return torch.sigmoid(x)
    return 1.0 / (1.0 + torch.exp(-x))


def silu(x: Tensor) -> Tensor:
    return x * sigmoid(x)


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x); from 20 on it is x itself, as in torch.nn.functional.softplus."""
    if x.device.type != "cpu" or x.requires_grad:
        return F.softplus(x)
    return torch.where(x > 20.0, x, torch.log1p(torch.exp(x.clamp(max=20.0))))


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type that norms, gates and rotations compute in: float32, or float64 for float64 models."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def row_invariant_ok(hidden_sizes: tuple[int, ...] = (16, 64, 192, 384, 1024)) -> bool:
    """Whether this machine's GEMMs and elementwise functions keep the premises above. A few milliseconds."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1024, generator=generator) * 4
    for function in (torch.exp, torch.log1p, torch.cos, torch.sin, torch.rsqrt):
        x = values.abs() if function in (torch.log1p, torch.rsqrt) else values
        pieces = torch.cat([function(part) for part in torch.split(x, 7)])
        if not torch.equal(function(x), pieces):
            return False
    return all(_linear_ok(k, o, generator) and _bmm_ok(k, o, generator) for k in hidden_sizes for o in (16, 24, 128))


@torch.inference_mode()
def card_invariant_ok(device: str = "cuda") -> bool:
    """The same of the products that run on a card, in both of a model's types. Compiles them first."""
    generator = torch.Generator().manual_seed(0)
    types = torch.float32, torch.bfloat16
    return all(_linear_ok(k, 128, generator, device, dtype) for k in (64, 4096) for dtype in types)


def _linear_ok(
    k: int, o: int, generator: torch.Generator, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> bool:
    x, weight, more = (torch.randn(n, k, generator=generator).to(device, dtype) for n in (272, o, 512 - o))
    whole = linear(x, weight)
    wide = torch.cat((weight, more))
    narrow = torch.cat([linear(x, part) for part in torch.split(wide, 64)], dim=1)
    return torch.equal(linear(x, wide), narrow) and all(
        torch.equal(linear(x[start : start + n], weight), whole[start : start + n])
        for start, n in ((0, 1), (5, 3), (0, 16), (3, 17), (100, 128), (9, 200))
    )


def _bmm_ok(k: int, o: int, generator: torch.Generator) -> bool:
    a = torch.randn(33, 4, k, generator=generator)
    b = torch.randn(33, k, o, generator=generator)
    whole = multiply_each(a, b)
    return all(
        torch.equal(multiply_each(a[s : s + n], b[s : s + n]), whole[s : s + n]) for s, n in ((0, 1), (5, 2), (7, 16))
    )
