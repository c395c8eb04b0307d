"""Baselines: the cache path in plain torch on the GPU, eager or under torch.compile.

The code is written as one would write it without kernels: decode the records with tensor operations, then multiply.
Shapes as in the kernels' modules.
"""

from __future__ import annotations

import torch
from torch import Tensor


def decode_entries(records: Tensor, dim: int, rope: int) -> Tensor:
    """Entries [..., R] uint8 to bfloat16 [..., dim]."""
    nope = dim - rope
    codes = records[..., :nope].view(torch.float8_e4m3fn).to(torch.bfloat16)
    scales = torch.exp2(records[..., nope + 2 * rope : nope + 2 * rope + nope // 64].float() - 127.0)
    values = codes.unflatten(-1, (-1, 64)) * scales.bfloat16().unsqueeze(-1)
    tail = records[..., nope : nope + 2 * rope].contiguous().view(torch.bfloat16)
    return torch.cat([values.flatten(-2), tail], dim=-1)


def decode_keys(records: Tensor, dim: int, levels: Tensor) -> Tensor:
    """Keys [..., R] uint8 to bfloat16 [..., dim]; levels [16] bfloat16."""
    pairs = records[..., : dim // 2]
    codes = torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(-2).int()
    scales = torch.exp2(records[..., dim // 2 :].float() - 127.0).bfloat16()
    return (levels[codes].unflatten(-1, (-1, 32)) * scales.unsqueeze(-1)).flatten(-2)


def pack_entries(x: Tensor, rope: int) -> Tensor:
    """x [N, dim] float32 to records [N, R] uint8."""
    nope = x.shape[1] - rope
    groups = x[:, :nope].unflatten(1, (-1, 64))
    k = torch.ceil(torch.log2(groups.abs().amax(2).clamp_min(1e-4) / 448.0))
    codes = (groups * torch.exp2(-k).unsqueeze(2)).clamp(-448.0, 448.0).to(torch.float8_e4m3fn).flatten(1)
    scales = torch.nn.functional.pad((k + 127).to(torch.uint8), (0, -k.shape[1] % 8))
    return torch.cat([codes.view(torch.uint8), x[:, nope:].bfloat16().view(torch.uint8), scales], dim=1)


def norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RMSNorm and RoPE (adjacent pairs, last dims) in float32."""
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight
    rope = 2 * cos.shape[-1]
    even, odd = x[..., -rope:].unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
    return torch.cat([x[..., :-rope], turned], dim=-1)


def pool_csa(kv: Tensor, gate: Tensor, bias: Tensor) -> Tensor:
    """All groups of one sequence from its start: [N / m, c] from kv and gate [N, 2c]."""
    m, dim = bias.shape[0], bias.shape[1] // 2
    kv, gate = kv.unflatten(0, (-1, m)), gate.unflatten(0, (-1, m)) + bias
    before_kv = torch.nn.functional.pad(kv[:-1, :, :dim], (0, 0, 0, 0, 1, 0))
    before_gate = torch.nn.functional.pad(gate[:-1, :, :dim], (0, 0, 0, 0, 1, 0), value=float("-inf"))
    weights = torch.cat([before_gate, gate[..., dim:]], dim=1).softmax(1)
    return (weights * torch.cat([before_kv, kv[..., dim:]], dim=1)).sum(1)


def pool_hca(kv: Tensor, gate: Tensor, bias: Tensor) -> Tensor:
    """Entries of disjoint groups: [N / m, c] from kv and gate [N, c]."""
    m = bias.shape[0]
    return ((gate.unflatten(0, (-1, m)) + bias).softmax(1) * kv.unflatten(0, (-1, m))).sum(1)


def attend(q: Tensor, kv: Tensor, sinks: Tensor, cos: Tensor, sin: Tensor, scale: float) -> Tensor:
    """q [T, H, D], kv [T, N, D] bfloat16, all visible; float32 softmax with sink; output rotated back."""
    logits = torch.matmul(q, kv.transpose(1, 2)).float() * scale
    sink = sinks.view(1, -1, 1).expand(q.shape[0], -1, 1)
    weights = torch.cat([logits, sink], dim=-1).softmax(-1)[..., :-1]
    out = torch.matmul(weights.bfloat16(), kv)
    rope = 2 * cos.shape[-1]
    even, odd = out[..., -rope:].float().unflatten(-1, (-1, 2)).unbind(-1)
    c, s = cos.unsqueeze(1), sin.unsqueeze(1)
    turned = torch.stack([even * c + odd * s, odd * c - even * s], dim=-1).flatten(-2)
    return torch.cat([out[..., :-rope], turned.bfloat16()], dim=-1)


def sparse_attention(
    records: Tensor, slots: Tensor, ring: Tensor, q: Tensor, sinks: Tensor, cos: Tensor, sin: Tensor, scale: float
) -> Tensor:
    """records [P, E, R], slots [T, K], ring [S, W, R]: one query per sequence, or one sequence with all queries."""
    per_block = records.shape[1]
    picked = records[slots // per_block, slots % per_block]
    both = torch.cat([picked, ring.expand(q.shape[0], -1, -1)], dim=1)
    return attend(q, decode_entries(both, q.shape[2], 2 * cos.shape[1]), sinks, cos, sin, scale)


def hca_attention(
    records: Tensor, table: Tensor, ring: Tensor, q: Tensor, sinks: Tensor, cos: Tensor, sin: Tensor, scale: float
) -> Tensor:
    """Attend to all entries of each query's own sequence: table [T, B]."""
    both = torch.cat([records[table].flatten(1, 2), ring.expand(q.shape[0], -1, -1)], dim=1)
    return attend(q, decode_entries(both, q.shape[2], 2 * cos.shape[1]), sinks, cos, sin, scale)


def index_topk(records: Tensor, table: Tensor, q: Tensor, weights: Tensor, levels: Tensor, k: int) -> Tensor:
    """Score all keys of S sequences: table [S, B], q [S, Q, H, d] bfloat16, weights [S, Q, H] float32.

    Returns indices [S, Q, k].
    """
    keys = decode_keys(records[table].flatten(1, 2), q.shape[3], levels)
    logits = torch.matmul(q.flatten(1, 2), keys.transpose(1, 2)).relu_().unflatten(1, q.shape[1:3])
    scores = torch.matmul(weights.bfloat16().unsqueeze(2), logits).squeeze(2)
    return scores.topk(min(k, scores.shape[2]), dim=2).indices
