"""Manifold-constrained hyper-connections: M residual streams, mixed by doubly stochastic matrices.

Shapes:  N = tokens, M = streams (hc_mult), D = hidden size, J = (2 + M) * M mixing logits a token.
Source:  V4 report, section 2.2; oracle: transformers' DeepseekV4HyperConnection and DeepseekV4HyperHead.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from antefix.model.config import ModelConfig
from antefix.model.numerics import has_kernels, linear, sigmoid, wide


class HyperConnection(nn.Module):
    """Weights of one mixing: `fn` [J, M * D], `base` [J], `scale` [3] for collapse, expand and mix."""

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

    def forward(self, streams_NMD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Collapse the streams: returns the block's input [N, D], and post [N, M] and comb [N, M, M] for `expand`."""
        num_streams = streams_NMD.shape[1]
        if has_kernels(streams_NMD):
            return self._on_card(streams_NMD)
        sizes = [num_streams, num_streams, num_streams * num_streams]
        logits = mixing_logits(streams_NMD, self.fn, self.norm_eps)
        pre_w, post_w, comb_w = torch.split(logits, sizes, dim=-1)
        pre_b, post_b, comb_b = torch.split(self.base, sizes)
        pre = sigmoid(pre_w * self.scale[0] + pre_b) + self.eps
        post = 2 * sigmoid(post_w * self.scale[1] + post_b)
        comb = sinkhorn((comb_w * self.scale[2] + comb_b).view(-1, num_streams, num_streams), self.num_iters, self.eps)
        dtype = streams_NMD.dtype
        return collapse(streams_NMD, pre), post.to(dtype), comb.to(dtype)

    def _on_card(self, streams_NMD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same; post and comb stay float32."""
        from antefix_kernels import tokens

        logits = tokens.mixing_logits(streams_NMD, self.fn, self.norm_eps)
        num_streams = streams_NMD.shape[1]
        pre, post, comb = tokens.mixing_gates(logits, self.base, self.scale, num_streams, self.num_iters, self.eps)
        return tokens.collapse(streams_NMD, pre), post, comb


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
    """RMS-normed streams [N, M * D] times fn [J, M * D]: [N, J]. The norm is a factor a row, so it goes last."""
    if has_kernels(streams_NMD):
        from antefix_kernels.tokens import mixing_logits as card_logits

        return card_logits(streams_NMD, fn, eps)
    flat = streams_NMD.flatten(1).to(wide(streams_NMD.dtype))
    return linear(flat, fn.to(flat.dtype)) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + eps)


def collapse(streams_NMD: Tensor, pre_NM: Tensor) -> Tensor:
    """The streams' weighted sum, [N, D]."""
    if has_kernels(streams_NMD):
        from antefix_kernels.tokens import collapse as card_collapse

        return card_collapse(streams_NMD, pre_NM.float().contiguous())
    return torch.bmm(pre_NM.to(streams_NMD.dtype).unsqueeze(1), streams_NMD).squeeze(1)


def expand(streams_NMD: Tensor, output_ND: Tensor, post_NM: Tensor, comb_NMM: Tensor) -> Tensor:
    """New streams: the old ones mixed (over comb's first axis) plus the block's output, spread by `post`."""
    if has_kernels(streams_NMD):
        from antefix_kernels.tokens import expand as card_expand

        return card_expand(streams_NMD, output_ND, post_NM, comb_NMM)
    # contiguous: bmm runs strided batches one by one.
    mixed = torch.bmm(comb_NMM.transpose(1, 2).contiguous(), streams_NMD)
    return mixed + post_NM.unsqueeze(-1) * output_ND.unsqueeze(1)


def sinkhorn(logits_NMM: Tensor, num_iters: int, eps: float) -> Tensor:
    """Softmax over columns, then columns and rows normalised in turn: nearly doubly stochastic [N, M, M].

    A product with a 0/1 matrix gives every element the sum of its row, or column: two operations a step instead of
    the four that M by M reductions take, which is most of a decode step's overhead.
    """
    num_streams = logits_NMM.shape[1]
    ones, eye = logits_NMM.new_ones(num_streams, num_streams), torch.eye(num_streams, device=logits_NMM.device)
    row_sums, column_sums = torch.kron(eye.to(ones.dtype), ones), torch.kron(ones, eye.to(ones.dtype))
    floor = ones.new_tensor(eps)
    x = torch.exp(logits_NMM - logits_NMM.amax(-1, keepdim=True)).flatten(1)
    x = x / torch.mm(x, row_sums) + eps
    x = x / torch.addmm(floor, x, column_sums)
    for _ in range(num_iters - 1):
        x = x / torch.addmm(floor, x, row_sums)
        x = x / torch.addmm(floor, x, column_sums)
    return x.view_as(logits_NMM)
