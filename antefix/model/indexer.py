"""The lightning indexer: which compressed entries a query attends to.

Shapes:  N = queries, I = indexer heads, C = indexer dim, E = entries, k = entries kept, Q = q rank, D = hidden size.
Source:  V4 report, section 2.3.1; oracle: transformers' DeepseekV4Indexer.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from antefix.layout import LayerKind
from antefix.model.compressor import Compressor
from antefix.model.config import ModelConfig
from antefix.model.norms_rope import rotate
from antefix.model.numerics import linear


class Scorer(nn.Module):
    """Weights of the heads' votes: `weights_proj` [I, D]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weights_proj = nn.Linear(config.hidden_size, config.index_num_heads, bias=False)


class Indexer(Compressor):
    """The indexer's own compressor (at its width), queries and scorer."""

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

    def head_weights(self, x_ND: Tensor) -> Tensor:
        """[N, I], with both of the scorer's constant factors (heads^-1/2, dim^-1/2) folded in."""
        factor = math.pow(self.num_heads * self.width, -0.5)
        return linear(x_ND, self.scorer.weights_proj.weight) * factor


def index_scores(q_NIC: Tensor, weights_NI: Tensor, keys_EC: Tensor) -> Tensor:
    """Scores [N, E]: over heads, the weighted sum of ReLU(query times key)."""
    hits = linear(q_NIC, keys_EC).relu()
    return torch.bmm(weights_NI.unsqueeze(1), hits).squeeze(1)


def top_entries(scores_NE: Tensor, num_visible_N: Tensor, k: int) -> Tensor:
    """The k best visible entries [N, k], ascending, -1 where a query sees fewer. Ties go to the lowest index.

    scores_NE: entries from num_visible_N on must be -inf.
    The kept set is unique unless the k-th and the next score are equal; only such rows pay for an exact sort, so the
    choice never depends on how many entries were scored.
    """
    num_scored = scores_NE.shape[1]
    if num_scored <= k:
        picked = torch.arange(k, device=scores_NE.device).expand(len(scores_NE), k)
        return torch.where(picked < num_visible_N.unsqueeze(1), picked, -1)
    best, picked = scores_NE.topk(k + 1, dim=-1)
    # Rows that see at most k entries keep them all; what fills them up at -inf is invisible whichever it is.
    tied = ((best[:, k - 1] == best[:, k]) & (num_visible_N > k)).nonzero().squeeze(1)
    picked = picked[:, :k]
    if len(tied):
        exact = scores_NE[tied].sort(dim=-1, descending=True, stable=True).indices[:, :k]
        picked = picked.index_copy(0, tied, exact)
    # Invisible picks sort to the end before they become -1, so that visible ones lie side by side.
    picked = torch.where(picked < num_visible_N.unsqueeze(1), picked, num_scored).sort(-1).values
    return torch.where(picked < num_scored, picked, -1)
