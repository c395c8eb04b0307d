"""PyTorch oracles of the kernels: short, slow, in whatever floating dtype they are given (float64 for tests).

Written from the V4 report (sections 2.3, 3.5) and the released rounding rules, not from the kernels. Rounded values
come back as records (uint8), which `read_entries` and `read_keys` decode exactly. `eager_*` callers time these.
Shapes:  T queries, H heads, D head_dim, G groups, m ratio, K selected, W window rows, R record bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from antefix_kernels.number_formats import FP4_AMAX_MIN, FP4_GROUP, FP8_AMAX_MIN, FP8_GROUP, EntryFormat, KeyFormat

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def scale_exponent(amax: Tensor, top: float) -> Tensor:
    """Smallest k with amax <= 2^k * top, exactly (frexp, no logarithm), as int32."""
    mantissa, exponent = torch.frexp(amax)
    top_mantissa, top_exponent = torch.frexp(torch.tensor(top, dtype=amax.dtype))
    return (exponent - int(top_exponent) + (mantissa > float(top_mantissa))).to(torch.int32)


def _group_exponents(x: Tensor, group: int, amax_min: float, top: float) -> tuple[Tensor, Tensor]:
    """x [..., n] padded to [..., groups, group], and its scale exponents [..., groups]."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % group)).unflatten(-1, (-1, group))
    return padded, scale_exponent(padded.abs().amax(-1).clamp_min(amax_min), top)


def e4m3_codes(x: Tensor) -> Tensor:
    """FP8 E4M3 codes (uint8) of x, to nearest, ties to even, saturating at 448."""
    x = x.clamp(-448.0, 448.0)
    exponent = torch.frexp(x)[1].clamp_min(-5)
    quantum = torch.ldexp(torch.ones_like(x), exponent - 4)
    return ((x / quantum).round() * quantum).float().to(torch.float8_e4m3fn).view(torch.uint8)


def e2m1_codes(x: Tensor) -> Tensor:
    """FP4 E2M1 codes (uint8, 0 to 15) of x, to nearest, ties to even, saturating at 6."""
    levels = torch.tensor(_E2M1, dtype=x.dtype, device=x.device)
    distance = (x.abs().clamp_max(6.0).unsqueeze(-1) - levels).abs()
    nearest = distance == distance.amin(-1, keepdim=True)
    # Of two equally near levels the even code wins; scores 1 and 2 make argmax pick it.
    even = torch.tensor([2, 1] * 4, dtype=torch.uint8, device=x.device)
    return (nearest * even).argmax(-1).to(torch.uint8) | (torch.signbit(x).to(torch.uint8) << 3)


def pack_entries(x: Tensor, rope_dim: int) -> Tensor:
    """Round x [..., D] to entry records [..., R] uint8."""
    fmt = EntryFormat(head_dim=x.shape[-1], rope_dim=rope_dim)
    groups, k = _group_exponents(x[..., : fmt.nope_dim], FP8_GROUP, FP8_AMAX_MIN, 448.0)
    codes = e4m3_codes(torch.ldexp(groups, -k.unsqueeze(-1))).flatten(-2)[..., : fmt.nope_dim]
    rope = x[..., fmt.nope_dim :].to(torch.bfloat16).contiguous().view(torch.uint8)
    scales = torch.nn.functional.pad((k + 127).to(torch.uint8), (0, fmt.nbytes - fmt.scale_offset - fmt.num_scales))
    return torch.cat([codes, rope, scales], dim=-1)


def read_entries(records: Tensor, head_dim: int, rope_dim: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Values [..., D] of entry records [..., R]."""
    fmt = EntryFormat(head_dim=head_dim, rope_dim=rope_dim)
    codes = records[..., : fmt.nope_dim].contiguous().view(torch.float8_e4m3fn).to(dtype)
    k = records[..., fmt.scale_offset : fmt.scale_offset + fmt.num_scales].to(torch.int32) - 127
    nope = torch.ldexp(codes, k.repeat_interleave(FP8_GROUP, -1)[..., : fmt.nope_dim])
    rope = records[..., fmt.nope_dim : fmt.scale_offset].contiguous().view(torch.bfloat16).to(dtype)
    return torch.cat([nope, rope], dim=-1)


def pack_keys(x: Tensor) -> Tensor:
    """Round x [..., d], already rotated, to key records [..., R] uint8."""
    groups, k = _group_exponents(x, FP4_GROUP, FP4_AMAX_MIN, 6.0)
    codes = e2m1_codes(torch.ldexp(groups, -k.unsqueeze(-1))).flatten(-2)[..., : x.shape[-1]]
    return torch.cat([codes[..., ::2] | codes[..., 1::2] << 4, (k + 127).to(torch.uint8)], dim=-1)


def read_keys(records: Tensor, dim: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The numbers [..., d] that packed key records [..., R bytes] hold."""
    fmt = KeyFormat(dim=dim)
    levels = torch.tensor([*_E2M1, *(-v for v in _E2M1)], dtype=dtype, device=records.device)
    pairs = records[..., : dim // 2]
    codes = torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(-2).long()
    k = records[..., dim // 2 : fmt.nbytes].to(torch.int32) - 127
    return torch.ldexp(levels[codes], k.repeat_interleave(FP4_GROUP, -1)[..., :dim])


def hadamard(x: Tensor) -> Tensor:
    """Walsh-Hadamard rotation of the last dim (a power of two), natural order, scaled by d^-1/2."""
    dim = x.shape[-1]
    matrix = torch.ones(1, 1, dtype=x.dtype, device=x.device)
    while matrix.shape[0] < dim:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    rotated: Tensor = x @ matrix * dim**-0.5
    return rotated


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the last 2 * cos.shape[-1] dims of x [..., D], adjacent pairs; -sin undoes it."""
    rope_dim = 2 * cos.shape[-1]
    nope, pairs = x[..., :-rope_dim], x[..., -rope_dim:].unflatten(-1, (-1, 2))
    even, odd = pairs.unbind(-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([nope, torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)], -1)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dim."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(x.dtype)


def pool_groups(kv: Tensor, gate: Tensor, bias: Tensor, first_rows: Tensor) -> Tensor:
    """HCA: softmax-gated sums [G, c] of the m rows from each first row of kv and gate [N, c]; bias [m, c]."""
    rows = first_rows.long().unsqueeze(1) + torch.arange(bias.shape[0], device=kv.device)
    weights = (gate[rows].to(kv.dtype) + bias.to(kv.dtype)).softmax(1)
    return (weights * kv[rows]).sum(1)


def pool_overlapped(
    kv: Tensor,
    gate: Tensor,
    bias: Tensor,
    first_rows: Tensor,
    prior_rows: Tensor,
    overlap_kv: Tensor,
    overlap_gate: Tensor,
) -> Tensor:
    """CSA: pool each group's second series with the group before's first series; kv and gate [N, 2c], bias [m, 2c].

    prior_rows [G]: first row of the group before, or -1 - s for slot s of overlap_kv and overlap_gate [S, m, c], whose
    gates hold their bias already (-inf where nothing came before).
    """
    m, dim = bias.shape[0], bias.shape[1] // 2
    steps = torch.arange(m, device=kv.device)
    rows, before = first_rows.long().unsqueeze(1) + steps, prior_rows.long().clamp_min(0).unsqueeze(1) + steps
    stored, slot = (prior_rows < 0).view(-1, 1, 1), (-1 - prior_rows.long()).clamp_min(0)
    bias = bias.to(kv.dtype)
    ca_kv = torch.where(stored, overlap_kv.to(kv.dtype)[slot], kv[before][..., :dim])
    ca_gate = torch.where(stored, overlap_gate.to(kv.dtype)[slot], gate[before][..., :dim] + bias[:, :dim])
    both_kv = torch.cat([ca_kv, kv[rows][..., dim:]], 1)
    both_gate = torch.cat([ca_gate, gate[rows][..., dim:] + bias[:, dim:]], 1)
    return (both_gate.softmax(1) * both_kv).sum(1)


def prepare_queries(q: Tensor) -> Tensor:
    """Index queries [T, H, d] as they are multiplied: rotated, rounded to FP4, decoded."""
    return read_keys(pack_keys(hadamard(q)), q.shape[-1], q.dtype)


def index_scores(q: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    """sum_h weights[t, h] * relu(q[t, h] . keys[n]): [T, N] from q [T, H, d], weights [T, H], keys [N, d]."""
    return (torch.einsum("thd,nd->thn", q, keys).relu() * weights.to(q.dtype).unsqueeze(-1)).sum(1)


def topk_lowest(scores: Tensor, lens: Tensor, k: int) -> Tensor:
    """Indices [T, k] int32, ascending, of each row's k largest among its first lens[t]; ties to the lowest; -1 pads."""
    picked = torch.full((scores.shape[0], k), -1, dtype=torch.int32, device=scores.device)
    for row, (values, length) in enumerate(zip(scores, lens.tolist(), strict=True)):
        order = torch.sort(values[:length], descending=True, stable=True).indices[:k]
        picked[row, : len(order)] = order.sort().values.to(torch.int32)
    return picked


def attention(q: Tensor, kv: Tensor, mask: Tensor, sinks: Tensor, cos: Tensor, sin: Tensor, scale: float) -> Tensor:
    """One KV head, K = V: [T, H, D] from q [T, H, D], kv [T, N, D], mask [T, N] (True is seen), sinks [H].

    The sink joins the softmax's denominator; the output's RoPE dims are rotated back by cos, sin [T, rope / 2].
    """
    logits = torch.einsum("thd,tnd->thn", q, kv) * scale
    logits = logits.masked_fill(~mask.unsqueeze(1), float("-inf"))
    sink = sinks.to(q.dtype).view(1, -1, 1).expand(q.shape[0], -1, 1)
    weights = torch.cat([logits, sink], -1).softmax(-1)[..., :-1]
    out = torch.einsum("thn,tnd->thd", weights, kv)
    return rope(out, cos.unsqueeze(1), -sin.unsqueeze(1))


def decode_weight(codes: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """A packed weight [O, K] in float64.

    Shapes:  codes [O, K] float8_e4m3fn or [O, K / 2] uint8, the even addend's E2M1 code in the low nibble; scales
             [ceil(O / block[0]), ceil(K / block[1])] float8_e8m0fnu or float32.
    """
    if codes.dtype is torch.uint8:
        table = torch.tensor((0, 0.5, 1, 1.5, 2, 3, 4, 6), dtype=torch.float64, device=codes.device)
        nibbles = torch.stack((codes & 15, codes >> 4), 2).flatten(1).long()
        values = table[nibbles & 7] * (1.0 - 2.0 * (nibbles >> 3))
    else:
        values = codes.float().double()
    spread = scales.float().double().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return values * spread[: values.shape[0], : values.shape[1]]
