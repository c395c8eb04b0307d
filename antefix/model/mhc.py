"""Manifold-constrained hyper-connections: M residual streams, mixed by doubly stochastic matrices.

Shapes:  N = tokens, M = streams (hc_mult), D = hidden size, J = (2 + M) * M mixing logits per token.
Source:  V4 report, section 2.2; oracle: transformers' DeepseekV4HyperConnection and DeepseekV4HyperHead.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from antefix.model.compiled.switch import is_compiled
from antefix.model.model_config import ModelConfig
from antefix.model.norms_rope import RMSNorm
from antefix.model.numerics import ALIGN, ROW_TILE, has_kernels, linear, multiply_each, multiply_tiles, sigmoid, wide


class HyperConnection(nn.Module):
    """Weights of one mixing: `fn` [J, M * D], `base` [J], and `scale` [3], which has one number each for collapse,
    expand and mix.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        num_streams = config.hc_mult
        num_logits = (2 + num_streams) * num_streams
        self.fn = nn.Parameter(torch.empty(num_logits, num_streams * config.hidden_size))
        self.base = nn.Parameter(torch.empty(num_logits))
        self.scale = nn.Parameter(torch.empty(3))
        self.num_iters = config.hc_sinkhorn_iters
        self.eps = config.hc_eps
        self.norm_eps = config.rms_norm_eps

    def normed(self, streams_NMD: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor, Tensor]:
        """`forward`, with the norm of the block's input; on a GPU in the same launch."""
        if has_kernels(streams_NMD):
            return self._on_card(streams_NMD, (norm.weight, norm.eps))
        x, post, comb = self(streams_NMD)
        return norm(x), post, comb

    def forward(self, streams_NMD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Collapse the streams. Returns the block's input [N, D], and post [N, M] and comb [N, M, M] for `expand`."""
        num_streams = streams_NMD.shape[1]
        if has_kernels(streams_NMD):
            return self._on_card(streams_NMD, None)
        if is_compiled(streams_NMD):
            from antefix.model.compiled import tokens as compiled

            return compiled.mix(self, streams_NMD)
        scale = self.scale.index_select(0, scale_numbers(num_streams, streams_NMD.device))
        logits = mixing_logits(streams_NMD, self.fn, self.norm_eps) * scale + self.base
        gates = sigmoid(logits[:, : 2 * num_streams])
        pre, post = gates[:, :num_streams] + self.eps, 2 * gates[:, num_streams:]
        comb = sinkhorn(logits[:, 2 * num_streams :].unflatten(1, (num_streams, -1)), self.num_iters, self.eps)
        dtype = streams_NMD.dtype
        return collapse(streams_NMD, pre), post.to(dtype), comb.to(dtype)

    def _on_card(self, streams_NMD: Tensor, norm: tuple[Tensor, float] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Like `forward`, but on a GPU; post and comb stay float32."""
        from antefix_kernels import tokens

        return tokens.mixed(
            streams_NMD, self.fn, self.base, self.scale, iterations=self.num_iters, eps=self.eps,
            norm_eps=self.norm_eps, norm=norm,
        )  # fmt: skip


class HyperHead(nn.Module):
    """The last collapse, before the final norm: `hc_fn` [M, M * D], `hc_base` [M], `hc_scale` [1]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.hc_fn = nn.Parameter(torch.empty(config.hc_mult, config.hc_mult * config.hidden_size))
        self.hc_base = nn.Parameter(torch.empty(config.hc_mult))
        self.hc_scale = nn.Parameter(torch.empty(1))
        self.eps = config.hc_eps
        self.norm_eps = config.rms_norm_eps

    def forward(self, streams_NMD: Tensor) -> Tensor:
        logits = mixing_logits(streams_NMD, self.hc_fn, self.norm_eps)
        return collapse(streams_NMD, sigmoid(logits * self.hc_scale + self.hc_base) + self.eps)


def mixing_logits(streams_NMD: Tensor, fn: Tensor, eps: float) -> Tensor:
    """RMS-normed streams [N, M * D] times fn [J, M * D]: [N, J]. The norm is one factor per row, and is applied after
    the product.
    """
    if has_kernels(streams_NMD):
        from antefix_kernels.tokens import mixing_logits as card_logits

        return card_logits(streams_NMD, fn, eps)
    flat = streams_NMD.flatten(1).to(wide(streams_NMD.dtype))
    if fn.dtype is not flat.dtype:
        fn = fn.to(flat.dtype)
    return linear(flat, fn) * (flat.square().mean(-1, keepdim=True) + eps).rsqrt_()


def collapse(streams_NMD: Tensor, pre_NM: Tensor) -> Tensor:
    """The weighted sum of the streams, [N, D]."""
    if has_kernels(streams_NMD):
        from antefix_kernels.tokens import collapse as card_collapse

        return card_collapse(streams_NMD, pre_NM.float().contiguous())
    return multiply_each(pre_NM.to(streams_NMD.dtype).unsqueeze(1), streams_NMD).squeeze(1)


def expand(streams_NMD: Tensor, output_ND: Tensor, post_NM: Tensor, comb_NMM: Tensor) -> Tensor:
    """The new streams: the old streams, mixed over comb's first axis, plus the block's output, weighted by `post`."""
    if has_kernels(streams_NMD):
        from antefix_kernels.tokens import expand as card_expand

        return card_expand(streams_NMD, output_ND, post_NM, comb_NMM)
    if is_compiled(streams_NMD):
        from antefix.model.compiled.tokens import expand as compiled_expand

        return compiled_expand(streams_NMD, output_ND, post_NM, comb_NMM)
    # contiguous: torch runs a batched product with strides pair by pair.
    mixed = multiply_each(comb_NMM.transpose(1, 2).contiguous(), streams_NMD)
    return mixed + post_NM.unsqueeze(-1) * output_ND.unsqueeze(1)


def sinkhorn(logits_NMM: Tensor, num_iters: int, eps: float) -> Tensor:
    """Softmax over columns, then columns and rows normalised in turn: nearly doubly stochastic [N, M, M].

    A product with a 0/1 matrix gives every element the sum of its row or column. The product takes two operations per
    step, where M by M reductions would take four; those reductions would be most of a decode step's overhead.
    """
    num_streams = logits_NMM.shape[1]
    row_sums, column_sums = _sum_matrices(num_streams, logits_NMM.dtype, logits_NMM.device)
    floor = _floor(eps, row_sums.dtype, row_sums.device)
    x = torch.exp(logits_NMM - logits_NMM.amax(-1, keepdim=True)).flatten(1)
    # From here on rows fill whole tiles, so that no step has to pad and cut. Padding is 1; its sums are about 1.
    num_tokens, num_cells = x.shape
    if num_cells % ALIGN or num_tokens % ROW_TILE:
        x = F.pad(x, (0, len(row_sums) - num_cells, 0, -num_tokens % ROW_TILE), value=1.0)
    x = x / multiply_tiles(x, row_sums) + eps
    if x.requires_grad:
        x = x / multiply_tiles(x, column_sums, floor)
        for _ in range(num_iters - 1):
            x = x / multiply_tiles(x, row_sums, floor)
            x = x / multiply_tiles(x, column_sums, floor)
        return x[:num_tokens, :num_cells].reshape(logits_NMM.shape)
    sums = torch.empty_like(x)
    x.div_(multiply_tiles(x, column_sums, floor, out=sums))
    for _ in range(num_iters - 1):
        x.div_(multiply_tiles(x, row_sums, floor, out=sums))
        x.div_(multiply_tiles(x, column_sums, floor, out=sums))
    return x[:num_tokens, :num_cells].reshape(logits_NMM.shape)


@functools.cache
def scale_numbers(num_streams: int, device: torch.device) -> Tensor:
    """Which of the three scales each mixing logit uses: [J]."""
    with torch.inference_mode(False):
        sizes = torch.tensor([num_streams, num_streams, num_streams * num_streams])
        return torch.arange(3).repeat_interleave(sizes).to(device)


@functools.cache
def _floor(eps: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(eps, dtype=dtype, device=device)


@functools.cache
def _sum_matrices(num_streams: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """0/1 matrices that give each of M * M cells the sum of its row, and of its column. The matrices are padded to
    ALIGN, with ones on the diagonal.
    """
    with torch.inference_mode(False):
        ones, eye = torch.ones(num_streams, num_streams), torch.eye(num_streams)
        rest = torch.eye(-(num_streams * num_streams) % ALIGN)
        row_sums, column_sums = torch.kron(eye, ones), torch.kron(ones, eye)
        row_sums, column_sums = (torch.block_diag(cells, rest) for cells in (row_sums, column_sums))
        return row_sums.to(device, dtype), column_sums.to(device, dtype)
