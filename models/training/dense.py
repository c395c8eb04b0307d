"""The whole-sequence forward for training: batched, differentiable, without a cache.

The same function as the runner's prefill from an empty cache, computed in one go: window attention by bands, compressed
entries behind masks (dense_attention.py), every expert for every token. The forward pass reads a flat dict of
parameters with transformers' names. Rounding is straight-through: forward sees the released FP8 and FP4 values,
backward the identity.

Legend:  B = sequences, T = tokens (a multiple of n_win and of both ratios), D = hidden size, N = streams (hc_mult),
         M = B * T, E = experts, R = queries on which the indexer is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from antefix.layout import LayerKind
from antefix.model.model_config import ModelConfig
from antefix.model.norms_rope import inverse_frequencies, rms_norm, rope_table
from models.training.dense_attention import DenseOptions, Rope, Shape, attention

Weights = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseLayer:
    """What a layer gives. `index_loss` is zero outside CSA layers; `load` [E] is each expert's share of the tokens."""

    streams: Tensor
    index_loss: Tensor
    load: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerParts:
    """The pieces of a layer, so that a trainer can put compiled ones in their place.

    All but attention work on flat tokens [B * T]: compiled once, they serve every sequence length.
    """

    read: Callable[..., tuple[Tensor, Tensor, Tensor]]
    attention: Callable[..., tuple[Tensor, Tensor]]
    write: Callable[..., Tensor]
    experts: Callable[..., tuple[Tensor, Tensor]]


def rope_tables(config: ModelConfig, num_tokens: int, device: torch.device) -> dict[LayerKind, Rope]:
    """cos and sin [T, R / 2] in float32 for each kind of layer; only window-only layers use the plain one."""
    positions = torch.arange(num_tokens, device=device)
    dim = config.geometry.rope_dim
    tables = {}
    for label, rope in (("main", config.rope_main), ("compress", config.rope_compress)):
        frequencies = inverse_frequencies(rope, dim).to(device)
        tables[label] = rope_table(positions, frequencies, rope.attention_factor, torch.float32)
    return {kind: tables["main" if kind is LayerKind.WINDOW else "compress"] for kind in LayerKind}


def forward(
    parameters: Weights,
    config: ModelConfig,
    tokens: Tensor,
    *,
    options: DenseOptions,
    rope: Mapping[LayerKind, Rope],
    rows: Tensor,
    parts: LayerParts | None = None,
) -> tuple[Tensor, list[DenseLayer]]:
    """Logits [B, T, vocab] of tokens [B, T] int64, and what each layer reports.

    `rows` [B, R] int64 are the queries on which the indexer's loss is taken; R may be 0.
    Raises:  ValueError: T is no multiple of the window or of a compression ratio.
    """
    shape = Shape.from_config(config)
    if any(tokens.shape[1] % unit for unit in (shape.window, shape.csa_ratio, shape.hca_ratio)):
        raise ValueError(
            f"{tokens.shape[1]} tokens are no multiple of the window {shape.window} and of the compression ratios"
        )
    embedded = parameters["model.embed_tokens.weight"][tokens.flatten()]
    streams = embedded.unsqueeze(1).expand(-1, shape.streams, -1).contiguous()
    layers: list[DenseLayer] = []
    for layer, kind in enumerate(config.geometry.layers):
        weights = layer_weights(parameters, layer)
        layers.append(_layer(weights, streams, tokens, rope[kind], rows, kind, shape, options, parts or PLAIN_PARTS))
        streams = layers[-1].streams
    return output_logits(parameters, streams, shape).unflatten(0, tokens.shape), layers


def layer_weights(parameters: Weights, layer: int) -> dict[str, Tensor]:
    """One layer's parameters, their prefix taken off."""
    prefix = f"model.layers.{layer}."
    return {name.removeprefix(prefix): value for name, value in parameters.items() if name.startswith(prefix)}


def output_logits(parameters: Weights, streams: Tensor, shape: Shape) -> Tensor:
    """Collapse the streams, normalise, project: [M, N, D] to [M, vocab]."""
    mixes = _normed_linear(streams.flatten(1), parameters["model.hc_head.hc_fn"], shape.norm_eps)
    mixes = mixes * parameters["model.hc_head.hc_scale"].float() + parameters["model.hc_head.hc_base"].float()
    hidden = ((torch.sigmoid(mixes) + shape.hc_eps).unsqueeze(-1) * streams).sum(dim=1).to(streams.dtype)
    return F.linear(rms_norm(hidden, parameters["model.norm.weight"], shape.norm_eps), parameters["lm_head.weight"])


def _layer(
    weights: Weights,
    streams: Tensor,
    tokens: Tensor,
    rope: Rope,
    rows: Tensor,
    kind: LayerKind,
    shape: Shape,
    options: DenseOptions,
    parts: LayerParts,
) -> DenseLayer:
    """One block on streams [M, N, D], M = B * T: attention, then experts, each between a read and a write."""
    # 1. Attention over the window and the compressed entries.
    norm = weights["input_layernorm.weight"]
    write, mix, hidden = parts.read(_under(weights, "attn_hc."), norm, streams, shape)
    own = _under(weights, "self_attn.")
    attended, index_loss = parts.attention(own, hidden.view(*tokens.shape, -1), rope, rows, kind.value, shape, options)
    streams = parts.write(write, mix, streams, attended.flatten(0, 1))
    # 2. Experts.
    norm = weights["post_attention_layernorm.weight"]
    write, mix, hidden = parts.read(_under(weights, "ffn_hc."), norm, streams, shape)
    mixed, load = parts.experts(_under(weights, "mlp."), hidden, tokens.flatten(), shape)
    return DenseLayer(streams=parts.write(write, mix, streams, mixed), index_loss=index_loss, load=load)


def _under(weights: Weights, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _normed_linear(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """linear(x / rms(x), weight) in float32. Scaling comes after the product: one pass over x less."""
    scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    return F.linear(x, weight).float() * scale


def hyper_read(w: Weights, norm: Tensor, streams: Tensor, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Write weights [M, N], mixing matrix [M, N, N] and the streams' weighted sum, normed [M, D]. V4 report, 2.2."""
    count = shape.streams
    raw = _normed_linear(streams.flatten(1), w["fn"], shape.norm_eps)
    read, write, mix = torch.split(raw, [count, count, count * count], dim=-1)
    base = torch.split(w["base"].float(), [count, count, count * count])
    scale = w["scale"].float()
    read = torch.sigmoid(read * scale[0] + base[0]) + shape.hc_eps
    write = 2 * torch.sigmoid(write * scale[1] + base[1])
    mix = (mix * scale[2] + base[2]).view(-1, count, count).softmax(-1) + shape.hc_eps
    # Sinkhorn-Knopp: columns first, then rows and columns in turn.
    mix = mix / (mix.sum(-2, keepdim=True) + shape.hc_eps)
    for _ in range(shape.sinkhorn_iters - 1):
        mix = mix / (mix.sum(-1, keepdim=True) + shape.hc_eps)
        mix = mix / (mix.sum(-2, keepdim=True) + shape.hc_eps)
    hidden = (read.unsqueeze(-1) * streams).sum(dim=1).to(streams.dtype)
    return write, mix, rms_norm(hidden, norm, shape.norm_eps)


def hyper_write(write: Tensor, mix: Tensor, streams: Tensor, update: Tensor) -> Tensor:
    """New stream k: write[k] * update + sum over j of mix[j, k] * stream j. Unrolled, so that it fuses."""
    count = streams.shape[1]
    rows = []
    for k in range(count):
        row = write[:, k, None] * update
        for j in range(count):
            row = row + mix[:, j, k, None] * streams[:, j]
        rows.append(row)
    return torch.stack(rows, dim=1).to(streams.dtype)


def experts(w: Weights, hidden: Tensor, tokens: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """The gated experts and the shared one for hidden [M, D], and each expert's share of the tokens [E].

    All experts run for all tokens: at these widths that beats sorting tokens by expert.
    """
    gates = _expert_gates(w, hidden, tokens, shape)
    raw = F.linear(hidden, w["experts.gate_up_proj"].flatten(0, 1)).view(hidden.shape[0], shape.experts, 2, -1)
    inner = _swiglu(raw[:, :, 0], raw[:, :, 1], shape.swiglu_limit) * gates.unsqueeze(-1).to(hidden.dtype)
    routed = F.linear(inner.flatten(1), w["experts.down_proj"].permute(1, 0, 2).flatten(1))
    gate = F.linear(hidden, w["shared_experts.gate_proj.weight"])
    up = F.linear(hidden, w["shared_experts.up_proj.weight"])
    shared = F.linear(_swiglu(gate, up, shape.swiglu_limit), w["shared_experts.down_proj.weight"])
    return routed + shared, (gates > 0).float().mean(dim=0).detach()


def _expert_gates(w: Weights, hidden: Tensor, tokens: Tensor, shape: Shape) -> Tensor:
    """Each expert's weight [M, E] for each token, zero where it is not chosen. V4 report, 2.1."""
    scores = torch.sqrt(F.softplus(F.linear(hidden, w["gate.weight"]).float()))
    if "gate.tid2eid" in w:
        chosen = w["gate.tid2eid"][tokens]
    else:
        chosen = (scores + w["gate.e_score_correction_bias"].float()).topk(shape.experts_per_token, dim=-1).indices
    kept = torch.zeros_like(scores).scatter(-1, chosen, 1.0) * scores
    return kept / (kept.sum(-1, keepdim=True) + 1e-20) * shape.routed_scale


def _swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    return F.silu(gate.clamp(max=limit)) * up.clamp(min=-limit, max=limit)


PLAIN_PARTS = LayerParts(read=hyper_read, attention=attention, write=hyper_write, experts=experts)
