"""Muon for matrices, AdamW for the rest, as V4 was trained (V4 report, section 2.4)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from models.training.parameters import Parameters

# What AdamW moves although it is a matrix: lookup tables, gates with few rows, mixing maps, biases by position.
_ADAMW_MATRICES = (
    "embed_tokens.weight",
    "lm_head.weight",
    "mlp.gate.weight",
    "weights_proj.weight",
    "_hc.fn",
    "hc_fn",
    "position_bias",
)
# The quintic iteration's coefficients: Jordan et al., "Muon", 2024.
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def is_muon(name: str, value: Tensor) -> bool:
    return value.ndim >= 2 and not name.endswith(_ADAMW_MATRICES)


def orthogonalise(update: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices to update [..., rows, cols], roughly, in bfloat16."""
    a, b, c = _NEWTON_SCHULZ
    x = update.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return torch.transpose(x, -2, -1) if tall else x


class Muon:
    """Momentum whose update is made orthogonal. Matrices of the same shape are handled as one batch."""

    def __init__(self, parameters: Iterable[Tensor], *, momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        self.groups: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
        for parameter in parameters:
            self.groups[tuple(parameter.shape)].append(parameter)
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.buffers = {shape: torch.zeros_like(torch.stack(group)) for shape, group in self.groups.items()}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for shape, group in self.groups.items():
            gradients = torch.stack([_gradient(parameter) for parameter in group])
            buffer = self.buffers[shape]
            buffer.lerp_(gradients, 1 - self.momentum)
            update = orthogonalise(gradients.lerp(buffer, self.momentum)).float()
            scale = lr * max(1.0, shape[-2] / shape[-1]) ** 0.5
            torch._foreach_mul_(group, 1 - lr * self.weight_decay)
            torch._foreach_add_(group, list(update.unbind()), alpha=-scale)


def _gradient(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        raise RuntimeError("a parameter got no gradient")
    return parameter.grad


class Optimizer:
    """Both optimisers under one schedule: `step(scale)` multiplies every learning rate."""

    def __init__(self, parameters: Parameters, *, muon_lr: float, adam_lr: float) -> None:
        self.muon_lr = muon_lr
        self.muon = Muon(value for name, value in parameters.items() if is_muon(name, value))
        rest = {name: value for name, value in parameters.items() if not is_muon(name, value)}
        groups = [
            {"params": [value], "lr": adam_lr * _relative_rate(name), "name": name} for name, value in rest.items()
        ]
        fused = next(iter(rest.values())).device.type == "cuda"
        merged = _merge_groups(groups)
        self.adam = torch.optim.AdamW(merged, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0, fused=fused)
        self.base_rates = [group["lr"] for group in self.adam.param_groups]

    def step(self, scale: float) -> None:
        self.muon.step(self.muon_lr * scale)
        for group, rate in zip(self.adam.param_groups, self.base_rates, strict=True):
            group["lr"] = rate * scale
        self.adam.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        self.adam.zero_grad(set_to_none=True)
        for group in self.muon.groups.values():
            for parameter in group:
                parameter.grad = None


def _relative_rate(name: str) -> float:
    """Embeddings start at unit scale and bear larger steps; the other tables are small."""
    return 3.0 if name.endswith("embed_tokens.weight") else 1.0


def _merge_groups(groups: list[dict[str, object]]) -> list[dict[str, object]]:
    """One group a learning rate: fused AdamW launches a kernel a group."""
    merged: dict[object, list[object]] = defaultdict(list)
    for group in groups:
        params = group["params"]
        assert isinstance(params, list)
        merged[group["lr"]].extend(params)
    return [{"params": params, "lr": rate} for rate, params in merged.items()]
