"""The compiled kernels as functions of tensors, called by `mhc`, `norms_rope`, `quant` and `compressor`.

Each function gives the same bits as the torch code that calls it; `enable` has compared the two. Inputs: float32 on a
CPU.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from antefix.model.compiled import expert_kernels, rounding_kernels, token_kernels
from antefix.model.mhc import scale_numbers
from antefix.model.numerics import linear, linear_into, matrices_of

if TYPE_CHECKING:
    from antefix.model.attention import Attention
    from antefix.model.compressor import Compressor
    from antefix.model.mhc import HyperConnection


@functools.cache
def lanes() -> int:
    """How many float32 numbers one vector of torch's sums holds: 8 or 16.

    Found by a sum that only vectors of 8 get right. The processor does not decide it: some builds of torch have no
    sums for AVX-512, and use vectors of 8 where other operations use 16.
    """
    probe = torch.zeros(16)
    probe[0], probe[1], probe[8] = 1, 2**-30, -1
    return 8 if probe.sum() else 16


def mix(module: HyperConnection, streams_NMD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`HyperConnection.forward`."""
    num, streams, size = streams_NMD.shape
    streams_NMD = streams_NMD.contiguous()
    scale = module.scale.index_select(0, scale_numbers(streams, streams_NMD.device))
    raw = linear(streams_NMD.view(num, -1), module.fn).contiguous()
    powers = torch.empty_like(raw)
    token_kernels.mix_logits(
        powers.data_ptr(), raw.data_ptr(), streams_NMD.data_ptr(), scale.data_ptr(), module.base.data_ptr(),
        num, streams, size, lanes(), module.norm_eps,
    )  # fmt: skip
    powers.exp_()
    x, post, comb = raw.new_empty(num, size), raw.new_empty(num, streams), raw.new_empty(num, streams, streams)
    token_kernels.mix_gates(
        x.data_ptr(), post.data_ptr(), comb.data_ptr(), powers.data_ptr(), streams_NMD.data_ptr(),
        num, streams, size, module.num_iters, module.eps,
    )  # fmt: skip
    return x, post, comb


def expand(streams_NMD: Tensor, output_ND: Tensor, post_NM: Tensor, comb_NMM: Tensor) -> Tensor:
    """`mhc.expand`."""
    streams, output, post, comb = (x.contiguous() for x in (streams_NMD, output_ND, post_NM, comb_NMM))
    made = torch.empty_like(streams)
    token_kernels.expand(
        made.data_ptr(), streams.data_ptr(), output.data_ptr(), post.data_ptr(), comb.data_ptr(), *streams.shape
    )
    return made


def norm_rotate(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """`norms_rope.norm_rotate` of x [N, C] or [N, H, C]. Without cos and sin: `norms_rope.rms_norm`, any shape of x."""
    x = x.contiguous()
    made, size = torch.empty_like(x), x.shape[-1]
    heads, rope, angles = 1, 0, (0, 0)
    if cos is not None and sin is not None:
        heads, rope = (x.shape[1] if x.dim() == 3 else 1), 2 * cos.shape[-1]
        cos, sin = cos.contiguous(), sin.contiguous()
        angles = cos.data_ptr(), sin.data_ptr()
    token_kernels.norm_rotate(
        made.data_ptr(), x.data_ptr(), 0 if weight is None else weight.data_ptr(), *angles,
        x.numel() // (size * heads), heads, size, heads * size, rope, lanes(), eps, scale,
    )  # fmt: skip
    return made


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`norms_rope.rotate` of x [N, C], or [N, H, C] with one angle per N."""
    x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
    heads = x.shape[1] if x.dim() == 3 else 1
    made, size = torch.empty_like(x), x.shape[-1]
    token_kernels.rotate(
        made.data_ptr(), x.data_ptr(), cos.data_ptr(), sin.data_ptr(), x.shape[0], heads, size, heads * size,
        2 * cos.shape[-1], 1, 1.0,
    )  # fmt: skip
    return made


def grouped_back(attention: Attention, attended_NHC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The input of `Attention.output`'s last projection: values rotated back, then the groups' products, [N, G * O]."""
    num, heads, size = attended_NHC.shape
    groups, weight = attention.o_groups, attention.o_a_proj.weight
    turned = attended_NHC.new_empty(groups, num, heads // groups * size)
    x, cos, sin = attended_NHC.contiguous(), cos.contiguous(), sin.contiguous()
    token_kernels.rotate(
        turned.data_ptr(), x.data_ptr(), cos.data_ptr(), sin.data_ptr(), num, heads, size, heads * size,
        2 * cos.shape[-1], groups, -1.0,
    )  # fmt: skip
    low = turned.new_empty(num, weight.shape[0])
    columns = low.chunk(groups, 1)
    for rows, matrix, column in zip(turned.unbind(0), matrices_of(weight, groups), columns, strict=True):
        linear_into(rows, matrix, column)
    return low


def round_entries(x: Tensor, rope_dim: int) -> Tensor:
    """`quant.round_entries` in the FP8 format."""
    made = x.clone(memory_format=torch.contiguous_format)
    size = x.shape[-1]
    rounding_kernels.round_entries(made.data_ptr(), x.numel() // size, size, rope_dim)
    return made


def round_queries(q: Tensor) -> Tensor:
    """`quant.round_queries` in the FP8 format."""
    q = q.contiguous()
    made, size = torch.empty_like(q), q.shape[-1]
    rounding_kernels.round_queries(made.data_ptr(), q.data_ptr(), q.numel() // size, size)
    return made


def project(compressor: Compressor, x_ND: Tensor, positions_N: Tensor) -> Tensor:
    """`Compressor.project`."""
    bias = compressor.position_bias
    ratio, width = bias.shape
    rows = x_ND.new_empty(2, x_ND.shape[0], width)
    linear_into(x_ND, compressor.kv_proj.weight, rows[0])
    linear_into(x_ND, compressor.gate_proj.weight, rows[1])
    positions = positions_N.contiguous()
    expert_kernels.add_places(rows[1].data_ptr(), bias.data_ptr(), positions.data_ptr(), x_ND.shape[0], ratio, width)
    return rows
