"""Attention of the training forward: window, compressed entries and sink in one softmax, and the indexer's loss.

No gradient flows through the selection of entries. The indexer learns on a sample of queries: its scores, as a
distribution over the closed entries, follow the attention's own mass there (V3.2 report, section 2.1). The indexer's
inputs are cut off from the rest of the model, so that loss moves nothing but the indexer.

Legend:  B = sequences, T = tokens, H = heads, C = head dim, W = n_win, K = T / W bands, S = compressed entries,
         J = indexer heads, R = sampled queries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from antefix.layout import LayerKind
from antefix.model.model_config import ModelConfig
from antefix.model.norms_rope import rms_norm, rotate
from models.training.dense_rounding import round_entries, round_keys

Weights = Mapping[str, Tensor]
# cos and sin [T, R / 2], float32.
Rope = tuple[Tensor, Tensor]
# Scores of masked places. Finite, so that a row without any entry gives no NaN.
_MASKED = -1e9
# Largest score matrix of the indexer held at once when it selects, in elements.
_INDEX_ELEMENTS_MAX = 1 << 29


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What the forward needs of a config, as plain numbers, so that a compiled layer is specialised on them."""

    heads: int
    head_dim: int
    rope_dim: int
    window: int
    csa_ratio: int
    hca_ratio: int
    out_groups: int
    index_heads: int
    index_dim: int
    streams: int
    sinkhorn_iters: int
    hc_eps: float
    norm_eps: float
    experts: int
    experts_per_token: int
    routed_scale: float
    swiglu_limit: float

    @classmethod
    def from_config(cls, config: ModelConfig) -> Shape:
        geometry = config.geometry
        return cls(
            heads=config.num_heads,
            head_dim=geometry.head_dim,
            rope_dim=geometry.rope_dim,
            window=geometry.window,
            csa_ratio=geometry.csa_ratio,
            hca_ratio=geometry.hca_ratio,
            out_groups=config.o_groups,
            index_heads=config.index_num_heads,
            index_dim=geometry.indexer_dim,
            streams=config.hc_mult,
            sinkhorn_iters=config.hc_sinkhorn_iters,
            hc_eps=config.hc_eps,
            norm_eps=config.rms_norm_eps,
            experts=config.num_experts,
            experts_per_token=config.num_experts_per_token,
            routed_scale=config.routed_scaling_factor,
            swiglu_limit=config.swiglu_limit,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseOptions:
    """`topk` 0 shows every closed entry to every query: the indexer's warm-up."""

    topk: int
    quantise: bool
    # Hide all compressed entries, to measure what they are worth.
    drop_compressed: bool = False


def attention(
    w: Weights, hidden: Tensor, rope: Rope, rows: Tensor, kind: str, shape: Shape, options: DenseOptions
) -> tuple[Tensor, Tensor]:
    """The attention block's output [B, T, D] for its normed input, and the indexer's loss (zero outside CSA)."""
    cos, sin = rope
    # 1. Queries, and the window's entries as the pool would hold them.
    q_rank = rms_norm(F.linear(hidden, w["q_a_proj.weight"]), w["q_a_norm.weight"], shape.norm_eps)
    q = F.linear(q_rank, w["q_b_proj.weight"]).unflatten(-1, (shape.heads, shape.head_dim))
    q = rotate(rms_norm(q, None, shape.norm_eps), cos[:, None], sin[:, None]) * shape.head_dim**-0.5
    kv = rms_norm(F.linear(hidden, w["kv_proj.weight"]), w["kv_norm.weight"], shape.norm_eps)
    kv = round_entries(rotate(kv, cos, sin), shape.rope_dim, enabled=options.quantise)
    # 2. Compressed entries, and who sees which.
    entries, visible, index_loss = _compressed(w, hidden, q_rank, q, rope, rows, LayerKind(kind), shape, options)
    # 3. One softmax over both and the sink; then undo the values' rotation and project.
    out = _joint_attention(q, kv, entries, visible, w["sinks"], shape.window)
    grouped = rotate(out, cos[:, None], -sin[:, None]).flatten(2).unflatten(-1, (shape.out_groups, -1))
    low = torch.einsum("btgk,gok->btgo", grouped, w["o_a_proj.weight"].unflatten(0, (shape.out_groups, -1)))
    return F.linear(low.flatten(2), w["o_b_proj.weight"]), index_loss


def _compressed(
    w: Weights,
    hidden: Tensor,
    q_rank: Tensor,
    q: Tensor,
    rope: Rope,
    rows: Tensor,
    kind: LayerKind,
    shape: Shape,
    options: DenseOptions,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Entries [B, S, C], their visibility [1 or B, T, S] and the indexer's loss."""
    no_loss = hidden.new_zeros((), dtype=torch.float32)
    if kind is LayerKind.WINDOW or options.drop_compressed:
        return None, None, no_loss
    ratio = shape.csa_ratio if kind is LayerKind.CSA else shape.hca_ratio
    entries = compress(w, "compressor.", hidden, ratio, rope, shape.norm_eps)
    entries = round_entries(entries, shape.rope_dim, enabled=options.quantise)
    closed = closed_entries(hidden.shape[1], entries.shape[1], ratio, hidden.device)[None]
    if kind is LayerKind.HCA:
        return entries, closed, no_loss
    index_q, index_keys, index_w = _indexer(w, hidden.detach(), q_rank.detach(), rope, shape, options)
    loss = no_loss
    if rows.shape[1]:
        target = _attention_mass(q.detach(), entries.detach(), closed, rows)
        loss = _index_loss(index_q, index_keys, index_w, closed, rows, target)
    if 0 < options.topk < entries.shape[1]:
        with torch.no_grad():
            return entries, select(index_q, index_keys, index_w, closed, options.topk), loss
    return entries, closed, loss


def closed_entries(num_tokens: int, num_entries: int, ratio: int, device: torch.device) -> Tensor:
    """[T, S] bool: entry w is closed for the query at t when w < (t + 1) // ratio."""
    ready = (torch.arange(num_tokens, device=device) + 1) // ratio
    return torch.arange(num_entries, device=device)[None, :] < ready[:, None]


def compress(w: Weights, prefix: str, hidden: Tensor, ratio: int, rope: Rope, eps: float) -> Tensor:
    """Entries [B, T / ratio, C]: a softmax per channel over the group's rows, then norm and RoPE.

    Where the projections hold two series, group i mixes its own second series with group i - 1's first one.
    """
    dim = w[f"{prefix}kv_norm.weight"].shape[0]
    kv = F.linear(hidden, w[f"{prefix}kv_proj.weight"]).unflatten(1, (-1, ratio))
    gate = F.linear(hidden, w[f"{prefix}gate_proj.weight"]).unflatten(1, (-1, ratio)).float()
    gate = gate + w[f"{prefix}position_bias"].float()
    if kv.shape[-1] == 2 * dim:
        before_kv = F.pad(kv[:, :-1, :, :dim], (0, 0, 0, 0, 1, 0))
        before_gate = F.pad(gate[:, :-1, :, :dim], (0, 0, 0, 0, 1, 0), value=float("-inf"))
        kv = torch.cat([before_kv, kv[..., dim:]], dim=2)
        gate = torch.cat([before_gate, gate[..., dim:]], dim=2)
    mixed = (kv.float() * gate.softmax(dim=2)).sum(dim=2).to(hidden.dtype)
    return rotate(rms_norm(mixed, w[f"{prefix}kv_norm.weight"], eps), rope[0][::ratio], rope[1][::ratio])


def _indexer(
    w: Weights, hidden: Tensor, q_rank: Tensor, rope: Rope, shape: Shape, options: DenseOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """The indexer's queries [B, T, J, C], keys [B, S, C] and head weights [B, T, J], scales folded into the last."""
    cos, sin = rope
    keys = compress(w, "compressor.indexer.", hidden, shape.csa_ratio, rope, shape.norm_eps)
    q = F.linear(q_rank, w["compressor.indexer.q_b_proj.weight"]).unflatten(-1, (shape.index_heads, shape.index_dim))
    q = round_keys(rotate(q, cos[:, None], sin[:, None]), enabled=options.quantise)
    head_weights = F.linear(hidden, w["compressor.indexer.scorer.weights_proj.weight"]).float()
    scale = (shape.index_heads * shape.index_dim) ** -0.5
    return q, round_keys(keys, enabled=options.quantise), head_weights * scale


def index_scores(q: Tensor, keys: Tensor, head_weights: Tensor) -> Tensor:
    """sum over heads of weight * relu(q . key): [B, T, S] float32. V4 report, eq. 16."""
    dots = torch.matmul(q.flatten(1, 2), keys.transpose(1, 2)).unflatten(1, q.shape[1:3])
    return torch.sum(F.relu(dots).float() * head_weights.unsqueeze(-1), dim=2)


def select(q: Tensor, keys: Tensor, head_weights: Tensor, closed: Tensor, topk: int) -> Tensor:
    """Which entries each query attends to: [B, T, S] bool, at most `topk` a row, none that is open."""
    step = max(_INDEX_ELEMENTS_MAX // (q.shape[0] * q.shape[2] * keys.shape[1]), 1)
    parts = []
    for start in range(0, q.shape[1], step):
        piece = slice(start, start + step)
        scores = index_scores(q[:, piece], keys, head_weights[:, piece])
        scores = scores.masked_fill(~closed[:, piece], float("-inf"))
        chosen = scores.topk(topk, dim=-1, sorted=False).indices
        parts.append(torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, chosen, True) & closed[:, piece])
    return torch.cat(parts, dim=1)


def _rows_of(x: Tensor, rows: Tensor) -> Tensor:
    """x [B, T, ...] at rows [B, R]."""
    return x[torch.arange(x.shape[0], device=x.device)[:, None], rows]


@torch.no_grad()
def _attention_mass(q: Tensor, entries: Tensor, closed: Tensor, rows: Tensor) -> Tensor:
    """Mean over heads of the attention that the sampled queries pay to each closed entry: [B, R, S]; rows sum to 1."""
    picked = _rows_of(q, rows)
    scores = torch.matmul(picked.flatten(1, 2), entries.transpose(1, 2)).unflatten(1, picked.shape[1:3]).float()
    seen = closed[0][rows].unsqueeze(2)
    mass = scores.masked_fill(~seen, _MASKED).softmax(dim=-1).mean(dim=2)
    return torch.where(seen.squeeze(2), mass, 0.0)


def _index_loss(q: Tensor, keys: Tensor, head_weights: Tensor, closed: Tensor, rows: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy of the indexer's distribution against `target`, over queries that see an entry."""
    scores = index_scores(_rows_of(q, rows), keys, _rows_of(head_weights, rows))
    log_probabilities = scores.masked_fill(~closed[0][rows], _MASKED).log_softmax(dim=-1)
    # The target's own entropy is subtracted, so that zero means agreement.
    entropy = -(target * target.clamp(min=1e-9).log()).sum(-1)
    loss = -(target * log_probabilities).sum(-1) - entropy
    seen = closed[0][rows].any(-1)
    return torch.sum(loss * seen) / seen.sum().clamp(min=1)


def _joint_attention(
    q: Tensor, kv: Tensor, entries: Tensor | None, visible: Tensor | None, sinks: Tensor, window: int
) -> Tensor:
    """softmax over window, entries and sink, times the entries themselves: [B, T, H, C]."""
    heads = q.shape[2]
    # 1. Window scores by bands: a band of W queries sees its own and the previous W tokens.
    bands = kv.unflatten(1, (-1, window))
    pairs = torch.cat([F.pad(bands[:, :-1], (0, 0, 0, 0, 1, 0)), bands], dim=2)
    q_bands = q.unflatten(1, (-1, window)).flatten(2, 3)
    near = torch.matmul(q_bands, pairs.transpose(2, 3)).unflatten(2, (window, heads)).float()
    near = near.masked_fill(~_band_mask(bands.shape[1], window, q.device), _MASKED).flatten(1, 2)
    # 2. The row's maximum over everything, the sink included.
    sink = sinks.float().expand(q.shape[:3]).unsqueeze(-1)
    top = torch.maximum(near.detach().amax(-1, keepdim=True), sink.detach())
    far = None
    if entries is not None and visible is not None:
        far = torch.matmul(q.flatten(1, 2), entries.transpose(1, 2)).unflatten(1, q.shape[1:3]).float()
        far = far.masked_fill(~visible.unsqueeze(2), _MASKED)
        top = torch.maximum(top, far.detach().amax(-1, keepdim=True))
    # 3. Sums of exponentials and of weighted entries.
    near = (near - top).exp()
    total = near.sum(-1, keepdim=True) + (sink - top).exp()
    near_bands = near.to(kv.dtype).unflatten(1, (-1, window)).flatten(2, 3)
    out = torch.matmul(near_bands, pairs).unflatten(2, (window, heads)).flatten(1, 2).float()
    if far is not None and entries is not None:
        far = (far - top).exp()
        total = total + far.sum(-1, keepdim=True)
        out = out + torch.matmul(far.to(kv.dtype).flatten(1, 2), entries).unflatten(1, q.shape[1:3])
    return torch.div(out, total).to(q.dtype)


def _band_mask(num_bands: int, window: int, device: torch.device) -> Tensor:
    """[K, W, 1, 2W] bool: query i of a band sees places i + 1 .. i + W of the pair; the first band has no previous."""
    place = torch.arange(2 * window, device=device)
    query = torch.arange(window, device=device)[:, None]
    seen = (place > query) & (place <= query + window)
    first = torch.arange(num_bands, device=device)[:, None, None] == 0
    return (seen & ~(first & (place < window))).unsqueeze(2)
