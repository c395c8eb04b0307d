"""Steps that the probe of arithmetic runs on a GPU: a layer's per-token computations, whole and in pieces, in the
model's shapes.

A compiler may round the same expression in two ways within one kernel, depending on where a row lies in its tile. So
each step is tried with rows at many places. Products of weights are probed by `antefix.model.arithmetic`, as on a CPU.

Shapes:  N = tokens, H = heads, C = head dim, R = RoPE dims, M = streams, D = hidden size, P = picked experts.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from antefix.layout import LayerKind
from antefix.model.mhc import HyperConnection, HyperHead, expand
from antefix.model.model import Model
from antefix.model.model_config import ModelConfig
from antefix.model.norms_rope import RMSNorm, norm_rotate, rms_norm, rotate
from antefix.model.numerics import has_kernels
from antefix.model.probe_steps import ROW_CUTS, ROWS, Step, function_step, numbers


def card_steps(model: Model) -> Iterator[Step]:
    config, geometry, dtype = model.config, model.config.geometry, model.dtype
    for width in sorted({config.hidden_size, config.q_lora_rank}):
        norm = functools.partial(rms_norm, weight=None, eps=config.rms_norm_eps)
        yield function_step(f"norm of {width}", norm, width, dtype)
    heads = {(config.num_heads, geometry.head_dim), (1, geometry.head_dim)}
    for num_heads, width in sorted(heads):
        yield _turned(config, num_heads, width, dtype, is_normed=True)
    # Attention's outputs and the indexer's queries are rotated without a norm.
    plain = {(config.num_heads, geometry.head_dim)}
    if LayerKind.CSA in geometry.layers:
        plain.add((config.index_num_heads, geometry.indexer_dim))
    for num_heads, width in sorted(plain):
        yield _turned(config, num_heads, width, dtype, is_normed=False)
    yield from _mixing(config, dtype)
    yield _experts(config, dtype)


def _turned(config: ModelConfig, num_heads: int, width: int, dtype: torch.dtype, *, is_normed: bool) -> Step:
    """Heads rotated by angles that are given with each row; queries, window entries and outputs are rotated so."""
    columns, pairs = num_heads * width, config.geometry.rope_dim // 2

    def run(x: Tensor, _: int) -> Tensor:
        angles = x[:, columns:].float()
        heads = x[:, :columns].contiguous().view(-1, num_heads, width)
        cos, sin = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)
        if is_normed:
            return norm_rotate(heads, None, config.rms_norm_eps, cos, sin, scale=width**-0.5)
        return rotate(heads, cos, sin)

    label = f"{'norm and turn' if is_normed else 'turn'} of {num_heads} x {width}"
    return Step(label, dtype, (ROWS, columns + pairs), ROW_CUTS, run, is_product=False)


def _mixing(config: ModelConfig, dtype: torch.dtype) -> Iterator[Step]:
    """Residual streams collapsed into a block's input, the block's output expanded into the streams, and the last
    collapse.
    """
    streams, width = config.hc_mult, config.hidden_size

    def mix(x: Tensor, salt: int) -> Tensor:
        held = x[:, : streams * width].contiguous().view(-1, streams, width)
        update = x[:, streams * width :].contiguous()
        mixer = HyperConnection(config)
        _fill(mixer, salt, x.device)
        norm = RMSNorm(width, config.rms_norm_eps).to(x.device, dtype)
        collapsed, post, comb = mixer.normed(held, norm.requires_grad_(False))
        return torch.cat((collapsed, expand(held, update, post, comb).flatten(1)), 1)

    def end(x: Tensor, salt: int) -> Tensor:
        head = HyperHead(config)
        _fill(head, salt, x.device)
        collapsed: Tensor = head(x.view(-1, streams, width))
        return collapsed

    label = f"mixing of {streams} x {width}"
    yield Step(label, dtype, (ROWS, (streams + 1) * width), ROW_CUTS, mix, is_product=False)
    yield Step(f"last {label}", dtype, (ROWS, streams * width), ROW_CUTS, end, is_product=False)


def _experts(config: ModelConfig, dtype: torch.dtype) -> Step:
    """An expert's activation, and picked experts' rows weighted and added up."""
    inner, width, picked = config.moe_intermediate_size, config.hidden_size, config.num_experts_per_token

    def run(x: Tensor, _: int) -> Tensor:
        parts: list[Tensor] = list(x.split((2 * inner, picked * width, width, picked), 1))
        gates, rows, shared, weights = parts
        if not has_kernels(x):
            return gates
        from antefix_kernels import tokens

        place = torch.arange(len(x) * picked, device=x.device)
        operands = rows.reshape(-1, width), place, weights.contiguous(), shared.contiguous()
        return torch.cat((tokens.swiglu(gates.contiguous(), config.swiglu_limit), tokens.combine(*operands)), 1)

    label = f"{picked} experts of {inner} x {width}"
    shape = (ROWS, 2 * inner + (picked + 1) * width + picked)
    return Step(label, dtype, shape, ROW_CUTS, run, is_product=False)


def _fill(module: nn.Module, salt: int, device: torch.device) -> None:
    """Fixed numbers for weights, the same for every model of these shapes."""
    module.requires_grad_(False)
    for number, weight in enumerate(module.parameters()):
        # Scaled by the fan-in, so that the gates do not saturate.
        weight.data = numbers(tuple(weight.shape), salt + number, weight.dtype, device) * weight.shape[-1] ** -0.5
