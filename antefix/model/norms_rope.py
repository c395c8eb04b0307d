"""RMS norms and rotary positions. V4's RoPE rotates adjacent pairs of the last R dims of a head.

Shapes:  N = rows, C = channels, R = RoPE dims, P = positions; leading dims are free.
Source:  V4 report, section 2.3.3; frequencies as in transformers' deepseek_v4, the oracle of tests/model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from antefix.model.compiled.switch import is_compiled
from antefix.model.model_config import RopeConfig
from antefix.model.numerics import has_kernels, wide
from antefix.model.side_streams import is_recording


class RMSNorm(nn.Module):
    """Holds the weight [C] of a norm; `eps` is the config's value."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x [..., C] divided by the root mean square of its last dim, times weight [C] if there is one."""
    if has_kernels(x):
        from antefix_kernels.tokens import norm_turn

        return norm_turn(x.reshape(-1, 1, x.shape[-1]), weight=weight, eps=eps).view(x.shape)
    if is_compiled(x):
        from antefix.model.compiled import tokens as compiled

        return compiled.norm_rotate(x, weight, eps)
    work = wide(x.dtype)
    wide_x = x if x.dtype is work else x.to(work)
    normed = wide_x * (wide_x.square().mean(-1, keepdim=True) + eps).rsqrt_()
    if weight is not None:
        normed = weight * normed
    return normed if x.dtype is work else normed.to(x.dtype)


def inverse_frequencies(rope: RopeConfig, rope_dim: int) -> Tensor:
    """float32 angles per position [R / 2], with YaRN's interpolation (arXiv 2309.00071, section 3)."""
    # On the CPU even for a model without memory: for tensors on no device, PyTorch's compiler would compute them.
    steps = torch.arange(0, rope_dim, 2, dtype=torch.float32, device="cpu") / rope_dim
    plain = 1.0 / (rope.theta**steps)
    if rope.yarn is None:
        return plain
    yarn = rope.yarn
    stretched = 1.0 / (yarn.factor * rope.theta**steps)

    def dim_of(rotations: float) -> float:
        # The pair of dims that turns `rotations` times over the original context.
        turns = math.log(yarn.original_max_positions / (rotations * 2 * math.pi))
        return rope_dim * turns / (2 * math.log(rope.theta))

    low = max(math.floor(dim_of(yarn.beta_fast)), 0)
    high = min(math.ceil(dim_of(yarn.beta_slow)), rope_dim - 1)
    # 0.001 keeps the ramp finite if both ends are equal, as in the reference.
    span = high - low if high != low else 0.001
    ramp = ((torch.arange(rope_dim // 2, dtype=torch.float32, device="cpu") - low) / span).clamp(0, 1)
    keep = 1 - ramp
    return stretched * (1 - keep) + plain * keep


def rope_table(positions: Tensor, inv_freq: Tensor, factor: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [P, R / 2] of integer positions [P]. Angles are float32: their rounding is part of the model."""
    work = wide(dtype)
    angles = positions.to(work)[:, None] * inv_freq.to(work)
    return angles.cos() * factor, angles.sin() * factor


def turn_tables(angles_KPR: Tensor, factors: Sequence[float]) -> tuple[Tensor, Tensor]:
    """cos and sin of K tables of float32 angles, each times its factor: the bits of `rope_table`, in few launches."""
    cos, sin = angles_KPR.cos(), angles_KPR.sin()
    if len(set(factors)) == 1:
        return (cos, sin) if factors[0] == 1.0 else (cos.mul_(factors[0]), sin.mul_(factors[0]))
    for number, factor in enumerate(factors):
        if factor != 1.0:
            cos[number].mul_(factor)
            sin[number].mul_(factor)
    return cos, sin


def wide_weight(norm: RMSNorm) -> Tensor:
    """The norm's weight as float32, kept for the next call. A recording makes no copy that outlives it, because that
    would hold numbers only after the recorded graph has run.
    """
    weight = norm.weight
    if weight.dtype is torch.float32:
        return weight
    made_of = weight.data_ptr(), weight._version if not weight.is_inference() else 0
    kept: tuple[tuple[int, int], Tensor] | None = getattr(norm, "_antefix_wide", None)
    if kept is not None and kept[0] == made_of:
        return kept[1]
    wider = weight.detach().float()
    if not is_recording(weight.device):
        norm._antefix_wide = made_of, wider  # type: ignore[assignment]
    return wider


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the last R dims of x [..., C] by cos, sin [..., R / 2] (broadcast against x's leading dims)."""
    if has_kernels(x):
        return _on_card(x, None, None, cos, sin, 1.0)
    if is_compiled(x):
        from antefix.model.compiled import tokens as compiled

        return compiled.rotate(x, cos, sin)
    if x.dtype is cos.dtype and not x.requires_grad:
        return _turn(x.clone(), cos, sin)
    rope_dim = 2 * cos.shape[-1]
    head, tail = x[..., :-rope_dim], x[..., -rope_dim:]
    pairs = torch.unflatten(tail.to(cos.dtype), -1, (-1, 2))
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
    return torch.cat((head, turned.to(x.dtype)), dim=-1)


def rotate_back(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The opposite rotation, as V4 does with attention outputs."""
    return _on_card(x, None, None, cos, sin, 1.0, back=True) if has_kernels(x) else rotate(x, cos, -sin)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate` in place."""
    even, odd = x[..., -2 * cos.shape[-1] :].unflatten(-1, (-1, 2)).unbind(-1)
    turned = even * cos - odd * sin
    torch.add(odd * cos, even * sin, out=odd)
    even.copy_(turned)
    return x


def norm_rotate(
    x: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor, *, scale: float = 1.0, halves: bool = False
) -> Tensor:
    """RMS norm, rotation and multiplication by `scale`; on a GPU in one pass over x.

    halves: the result, rounded to x's type, is then rounded to float16.
    """
    if has_kernels(x):
        return _on_card(x, weight, eps, cos, sin, scale, halves=halves)
    if halves:
        return norm_rotate(x, weight, eps, cos, sin, scale=scale).half()
    if is_compiled(x):
        from antefix.model.compiled import tokens as compiled

        return compiled.norm_rotate(x, weight, eps, cos, sin, scale)
    normed = rms_norm(x, weight, eps)
    turned = rotate(normed, cos, sin) if normed.requires_grad or x.dtype is not cos.dtype else _turn(normed, cos, sin)
    return turned if scale == 1.0 else turned * scale


def _on_card(
    x: Tensor,
    weight: Tensor | None,
    eps: float | None,
    cos: Tensor,
    sin: Tensor,
    scale: float,
    *,
    back: bool = False,
    halves: bool = False,
) -> Tensor:
    """x [N, C] with angles [N, R / 2], or x [N, H, C] with angles [N, 1, R / 2]."""
    from antefix_kernels.tokens import norm_turn

    rows = x if x.dim() == 3 else x.unsqueeze(1)
    cos, sin = (table.reshape(len(x), -1) for table in (cos, sin))
    return norm_turn(rows, weight=weight, eps=eps, cos=cos, sin=sin, scale=scale, back=back, halves=halves).view(
        x.shape
    )
