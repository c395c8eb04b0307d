"""The lightning indexer: it chooses which compressed entries a query attends to.

Shapes:  N = queries, I = indexer heads, C = indexer dim, E = entries, k = entries kept, Q = q rank, D = hidden size.
Source:  V4 report, section 2.3.1; oracle: transformers' DeepseekV4Indexer.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from antefix.layout import LayerKind
from antefix.model.compressor import Compressor
from antefix.model.joined_weights import NO_PRODUCTS, Products, product_of
from antefix.model.model_config import ModelConfig
from antefix.model.norms_rope import rotate
from antefix.model.numerics import linear, multiply_each


class Scorer(nn.Module):
    """Weights of the heads in a score: `weights_proj` [I, D]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weights_proj = nn.Linear(config.hidden_size, config.index_num_heads, bias=False)


class Indexer(Compressor):
    """The indexer's own compressor (of the indexer's width), its query projection and its scorer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, LayerKind.CSA, config.geometry.indexer_dim)
        self.num_heads = config.index_num_heads
        self.topk = config.index_topk
        self.q_b_proj = nn.Linear(config.q_lora_rank, self.num_heads * self.width, bias=False)
        self.scorer = Scorer(config)

    def queries(self, q_residual_NQ: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotated queries [N, I, C]; cos, sin [N, R / 2] at the tokens' positions."""
        q = linear(q_residual_NQ, self.q_b_proj.weight).view(-1, self.num_heads, self.width)
        return rotate(q, cos.unsqueeze(1), sin.unsqueeze(1))

    def input_modules(self) -> list[nn.Linear]:
        return [*super().input_modules(), self.scorer.weights_proj]

    def head_weights(self, x_ND: Tensor, done: Products = NO_PRODUCTS) -> Tensor:
        """Weights [N, I], already multiplied by the scorer's two constant factors (heads^-1/2, dim^-1/2)."""
        factor = math.pow(self.num_heads * self.width, -0.5)
        return product_of(x_ND, self.scorer.weights_proj, done) * factor


def index_scores(q_NIC: Tensor, weights_NI: Tensor, keys_EC: Tensor) -> Tensor:
    """Scores [N, E]: the weighted sum over heads of ReLU(query times key)."""
    hits = linear(q_NIC, keys_EC).relu_()
    return multiply_each(weights_NI.unsqueeze(1), hits).squeeze(1)


def top_entries(scores_NE: Tensor, num_visible_N: Tensor, k: int) -> Tensor:
    """The k best visible entries [N, k], ascending, -1 where a query sees fewer. Of entries with equal scores, those
    with the lowest index are chosen.

    scores_NE: no NaN; entries from num_visible_N on must be -inf.  The result does not depend on E, the number of
    entries that were scored.
    """
    num_queries, num_scored = scores_NE.shape
    first = torch.arange(max(k, num_scored), device=scores_NE.device)
    if num_scored <= k:
        picked = first[:k].expand(num_queries, k)
    else:
        worst = _kth_best(scores_NE, k)
        keep = scores_NE >= worst
        crowded = (keep.sum(1) > k).nonzero().squeeze(1)
        if len(crowded):
            keep[crowded] = _keep_lowest(scores_NE[crowded], worst[crowded], k)
        # A query that sees at most k entries keeps them all. Its other slots become -1, whatever they hold here.
        few = num_visible_N <= k
        if few.any():
            keep[few] = first < k
        picked = keep.nonzero()[:, 1].view(num_queries, k)
    return torch.where(picked < num_visible_N.unsqueeze(1), picked, -1)


def _kth_best(scores_NE: Tensor, k: int) -> Tensor:
    """The k-th largest score of each row, [N, 1]. numpy's partition is ten times faster than topk on a CPU."""
    if scores_NE.device.type != "cpu":
        return scores_NE.topk(k, dim=1).values[:, -1:]
    place = scores_NE.shape[1] - k
    return torch.from_numpy(np.partition(scores_NE.numpy(), place, axis=1)[:, place : place + 1].copy())


def _keep_lowest(scores_NE: Tensor, worst_N1: Tensor, k: int) -> Tensor:
    """For rows where more than k scores are at least the k-th best: keep all better scores, and of the equal ones those
    with the lowest indices, until k are kept.
    """
    better, equal = scores_NE > worst_N1, scores_NE == worst_N1
    return better | (equal & (equal.cumsum(1) <= k - better.sum(1, keepdim=True)))
