"""The released KV rounding with straight-through gradients, for training.

Forward gives the values that the FP8 format can hold; backward is the identity, so that weights learn to live
with them.
Source: V4 report, sections 2.3.4 and 3.5; the formats are in antefix.layout.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from antefix.layout import FP4_GROUP, FP8_GROUP

_FP8_MAX, _FP4_MAX = 448.0, 6.0


def round_entries(x: Tensor, rope_dim: int, *, enabled: bool) -> Tensor:
    """Entries [..., C]: FP8 E4M3 with power-of-two scales a group for the plain dims, BF16 for the RoPE dims."""
    if not enabled:
        return x
    plain, turned = x[..., :-rope_dim].float(), x[..., -rope_dim:]
    groups = [_fp8(group) for group in plain.split(FP8_GROUP, dim=-1)]
    rounded = torch.cat([*groups, turned.to(torch.bfloat16).float()], dim=-1).to(x.dtype)
    return x + (rounded - x).detach()


def round_keys(x: Tensor, *, enabled: bool) -> Tensor:
    """Indexer keys or queries [..., C]: Hadamard-rotated, then FP4 E2M1 with power-of-two scales a group.

    Without rounding nothing needs to be done, because the rotation leaves dot products as they are.
    """
    if not enabled:
        return x
    rotated = torch.matmul(x, hadamard(x.shape[-1], x.device).to(x.dtype))
    groups = rotated.float().split(FP4_GROUP, dim=-1)
    rounded = torch.cat([_fp4(group) for group in groups], dim=-1).to(x.dtype)
    return rotated + (rounded - rotated).detach()


def hadamard(size: int, device: torch.device) -> Tensor:
    """The orthonormal Hadamard matrix [size, size], in Sylvester's order."""
    index = torch.arange(size, device=device)
    both = index[:, None] & index[None, :]
    parity = torch.zeros_like(both)
    for bit in range(max(size.bit_length() - 1, 1)):
        parity = parity ^ (both >> bit & 1)
    return (1.0 - 2.0 * parity) / math.sqrt(size)


def _power_of_two_scale(group: Tensor, largest: float, floor: float) -> Tensor:
    """The smallest power of two s with max |group| <= largest * s."""
    amax = group.abs().amax(dim=-1, keepdim=True).clamp(min=floor)
    return torch.exp2(torch.ceil(torch.log2(amax / largest)))


def _fp8(group: Tensor) -> Tensor:
    scale = _power_of_two_scale(group, _FP8_MAX, 1e-4)
    return (group / scale).clamp(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn).float() * scale


def _fp4(group: Tensor) -> Tensor:
    """E2M1 holds 0, 0.5, 1, 1.5, 2, 3, 4 and 6; halves go to the even code."""
    scale = _power_of_two_scale(group, _FP4_MAX, _FP4_MAX * 2.0**-126)
    scaled = (group / scale).clamp(-_FP4_MAX, _FP4_MAX)
    size = scaled.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return torch.round(scaled / step) * step * scale
