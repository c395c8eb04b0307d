"""Layers as three compiled calls each, with attention between the first and the second: decode steps and prefills.

This works for models whose weights are all plain, small matrices held by this process, and only if MKL's exponential
can be called at its address. The bits equal those of `layer_loop.run_layers` and `runner`, which define the
computation.

Shapes:  N = rows, a token each; M = streams, D = hidden size, H = heads, C = head dim, E = experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

from antefix.layout import KVFormat
from antefix.model.attention import Attention, CSACompressor
from antefix.model.compiled import layer_kernels as kernels
from antefix.model.compiled.layer_kernels import Field, Number
from antefix.model.compiled.products import turned
from antefix.model.compiled.switch import exponential_address
from antefix.model.compiled.tokens import lanes
from antefix.model.mhc import HyperConnection, scale_numbers
from antefix.model.model import DecoderLayer, Model
from antefix.model.moe import takes_compiled
from antefix.model.numerics import SUM_TILE, matrices_of, softplus
from antefix.model.packed import PackedMatrix
from antefix.model.steps import TokenRows

_Integers = np.ndarray[Any, np.dtype[np.int64]]


class AttendRows(Protocol):
    """Computes a layer's attention before its output projection: [N, H, C]."""

    def __call__(self, layer: int, attention: Attention, rows: TokenRows) -> Tensor: ...


@dataclass(slots=True)
class LayerPlan:
    """One layer's weights in the form that the kernels need. held: tensors whose addresses are in `fields`; keeping
    them here keeps them alive.
    """

    layer: DecoderLayer
    fields: _Integers
    numbers: np.ndarray[Any, np.dtype[np.float32]]
    held: list[Tensor]
    work_size: int

    @property
    def rounds(self) -> bool:
        """Whether window entries are rounded to the FP8 format."""
        return bool(self.fields[Field.ROUNDS])

    @property
    def addresses(self) -> tuple[int, int]:
        return self.fields.ctypes.data, self.numbers.ctypes.data


def layer_rows(model: Model, tokens_N: Tensor, positions_N: Tensor) -> LayerRows | None:
    """The object that runs the layers for these rows; None if the layers must be run call by call."""
    if model.ranks is not None or model.offload is not None:
        return None
    plans = plans_of(model)
    return None if plans is None else LayerRows(model, plans, tokens_N, positions_N)


@dataclass(slots=True)
class _Kept:
    """A model's plans, with the versions and addresses of the weights that they were made from."""

    places: list[tuple[dict[str, Any], str]]
    made_of: list[tuple[int, int]]
    plans: list[LayerPlan] | None


def plans_of(model: Model) -> list[LayerPlan] | None:
    """Each layer's plan, kept with the model until a weight changes. Returns None if the compiled kernels cannot run
    this model.

    Each step compares every weight's version and address with the plan's. The comparison does not notice if a module
    was replaced by another module.
    """
    kept: _Kept | None = getattr(model, "_antefix_plans", None)
    if kept is None:
        modules = list(model.model.layers.modules())
        named: list[tuple[dict[str, Any], str]] = [
            (module._parameters, name) for module in modules for name in module._parameters
        ]
        named += [(module._buffers, name) for module in modules for name in module._buffers]
        kept = _Kept([place for place in named if place[0][place[1]] is not None], [], None)
        model._antefix_plans = kept  # type: ignore[assignment]
    weights = [tensors[name] for tensors, name in kept.places]
    if any(map(torch.is_inference, weights)):
        return None  # Nobody counts their versions.
    made_of = [(weight._version, weight.data_ptr()) for weight in weights]
    if kept.made_of != made_of:
        # The plans first: another thread of this pass must not take the old ones for those of these weights.
        kept.plans, kept.made_of = _make_plans(model), made_of
    return kept.plans


def _make_plans(model: Model) -> list[LayerPlan] | None:
    if not exponential_address():
        return None
    plans = []
    for module in model.model.layers:
        layer = cast(DecoderLayer, module)
        plan = _Maker(model, layer).plan() if takes_compiled(layer.mlp) and layer.self_attn.ranks is None else None
        if plan is None:
            return None
        plans.append(plan)
    return plans


class _Maker:
    """Fills in the arrays of one layer's plan."""

    def __init__(self, model: Model, layer: DecoderLayer) -> None:
        self.model, self.layer = model, layer
        self.held: list[Tensor] = []
        self.is_whole = True
        experts = layer.mlp.experts.num_experts
        self.fields: _Integers = np.zeros(Field.O_A + layer.self_attn.o_groups + 2 * experts, np.int64)
        self.numbers = np.zeros(len(Number), np.float32)

    def plan(self) -> LayerPlan | None:
        """Returns None if a weight is not a plain float32 matrix, or is too large to keep a transposed copy of it."""
        self._sizes()
        self._attention(self.layer.self_attn)
        self._mixing(Field.MIX, self.layer.attn_hc)
        self._mixing(Field.EXPERT_MIX, self.layer.ffn_hc)
        self._experts()
        if not self.is_whole:
            return None
        return LayerPlan(self.layer, self.fields, self.numbers, self.held, kernels.work_size(self.fields, 1))

    def _hold(self, field: int, tensor: Tensor) -> None:
        self.is_whole &= tensor.is_contiguous() and tensor.dtype in (torch.float32, torch.long)
        self.held.append(tensor)
        self.fields[field] = tensor.data_ptr()

    def _matrix(self, field: int, weight: Tensor | nn.Module) -> None:
        matrix = turned(weight) if isinstance(weight, Tensor) else None
        if matrix is None:
            self.is_whole = False
        else:
            self._hold(field, matrix)

    def _sizes(self) -> None:
        config, attention, f = self.model.config, self.layer.self_attn, self.fields
        f[Field.EXP], f[Field.LANES], f[Field.TILE] = exponential_address(), lanes(), SUM_TILE
        f[Field.STREAMS], f[Field.SIZE] = config.hc_mult, config.hidden_size
        f[Field.HEADS], f[Field.HEAD_DIM] = attention.num_heads, attention.head_dim
        f[Field.RANK], f[Field.ROPE] = config.q_lora_rank, config.geometry.rope_dim
        f[Field.GROUPS], f[Field.GROUP_COLUMNS] = attention.o_groups, config.o_lora_rank
        f[Field.ROUNDS] = self.model.layout.kv_format is KVFormat.FP8
        f[Field.ITERS] = config.hc_sinkhorn_iters
        f[Field.INNER] = config.moe_intermediate_size
        n = self.numbers
        n[Number.EPS], n[Number.LIMIT] = config.rms_norm_eps, config.swiglu_limit
        n[Number.MIX_EPS], n[Number.MIX_NORM_EPS] = config.hc_eps, config.rms_norm_eps
        n[Number.Q_SCALE] = attention.head_dim**-0.5

    def _mixing(self, first: Field, mixing: HyperConnection) -> None:
        self._matrix(first, mixing.fn)
        scale = mixing.scale.data.index_select(0, scale_numbers(self.model.config.hc_mult, mixing.scale.device))
        self._hold(first + 1, scale)
        self._hold(first + 2, mixing.base.data)

    def _attention(self, attention: Attention) -> None:
        self._hold(Field.NORM, self.layer.input_layernorm.weight.data)
        self._hold(Field.Q_A_NORM, attention.q_a_norm.weight.data)
        self._hold(Field.KV_NORM, attention.kv_norm.weight.data)
        for field, module in ((Field.Q_A, attention.q_a_proj), (Field.Q_B, attention.q_b_proj),
                              (Field.KV, attention.kv_proj), (Field.O_B, attention.o_b_proj)):  # fmt: skip
            self._matrix(field, module.weight)
        output: Tensor | PackedMatrix = attention.o_a_proj.weight
        for number in range(attention.o_groups if isinstance(output, Tensor) else 0):
            self._matrix(Field.O_A + number, matrices_of(cast(Tensor, output), attention.o_groups)[number])
        self.is_whole &= isinstance(output, Tensor)
        compressor = attention.compressor
        if compressor is None:
            return
        self.fields[Field.RATIO], self.fields[Field.COLUMNS] = compressor.position_bias.shape
        self._matrix(Field.MAIN_KV, compressor.kv_proj.weight)
        self._matrix(Field.MAIN_GATE, compressor.gate_proj.weight)
        self._hold(Field.MAIN_BIAS, compressor.position_bias.data)
        if isinstance(compressor, CSACompressor):
            indexer = compressor.indexer
            self.fields[Field.INDEX_HEADS], self.fields[Field.INDEX_DIM] = indexer.num_heads, indexer.width
            self.fields[Field.INDEX_COLUMNS] = indexer.position_bias.shape[1]
            self._matrix(Field.INDEX_KV, indexer.kv_proj.weight)
            self._matrix(Field.INDEX_GATE, indexer.gate_proj.weight)
            self._hold(Field.INDEX_BIAS, indexer.position_bias.data)
            self._matrix(Field.INDEX_Q, indexer.q_b_proj.weight)
            self._matrix(Field.INDEX_WEIGHTS, indexer.scorer.weights_proj.weight)
            self.numbers[Number.INDEX_FACTOR] = (indexer.num_heads * indexer.width) ** -0.5

    def _experts(self) -> None:
        mlp, f = self.layer.mlp, self.fields
        self._hold(Field.EXPERT_NORM, self.layer.post_attention_layernorm.weight.data)
        self._matrix(Field.ROUTER, mlp.gate.weight)
        if mlp.gate.hash_routed:
            self._hold(Field.ROUTER_TABLE, mlp.gate.tid2eid)
        else:
            self._hold(Field.ROUTER_BIAS, mlp.gate.e_score_correction_bias)
        num = mlp.experts.num_experts
        f[Field.NUM_EXPERTS], f[Field.NUM_PICKED] = num, mlp.gate.num_picked
        self.numbers[Number.SCALING] = mlp.gate.scaling
        shared, first = mlp.shared_experts, Field.O_A + self.layer.self_attn.o_groups
        for field, module in ((Field.SHARED_GATE, shared.gate_proj), (Field.SHARED_UP, shared.up_proj),
                              (Field.SHARED_DOWN, shared.down_proj)):  # fmt: skip
            self._matrix(field, module.weight)
        for start, stack in ((first, mlp.experts.gate_up_proj), (first + num, mlp.experts.down_proj)):
            for number, matrix in enumerate(matrices_of(cast(Tensor, stack), num)):
                self._matrix(start + number, matrix)


class LayerRows:
    """Runs the layers over N rows of one token each. All layers use the same buffers."""

    def __init__(self, model: Model, plans: list[LayerPlan], tokens_N: Tensor, positions_N: Tensor) -> None:
        self._model, self.plans = model, plans
        self._tokens, self._positions = tokens_N.contiguous(), positions_N.contiguous()
        num, config = len(tokens_N), model.config
        self._num = num
        new = model.lm_head.weight.new_empty
        streams = (num, config.hc_mult, config.hidden_size)
        self._streams = [new(streams) for _ in range(2)]
        self._mixes = [(new(num, config.hc_mult), new(num, config.hc_mult, config.hc_mult)) for _ in range(2)]
        self._x, self._normed = new(num, config.hidden_size), new(num, config.hidden_size)
        self._work = new(num * max(plan.work_size for plan in plans) + 2 * config.num_experts)

    def run(self, attend: AttendRows, after_layer: Callable[[], None] | None = None) -> Tensor:
        """Run all layers. Returns the residual streams [N, M, D] after the last layer. after_layer: called after each
        layer (`antefix.model.pauses`).
        """
        model = self._model
        ropes = {kind: model.rope(kind, self._positions) for kind in set(model.config.geometry.layers)}
        embedded = model.model.embed_tokens(self._tokens).unsqueeze(1)
        self._streams[0].copy_(embedded.expand_as(self._streams[0]))
        for index, plan in enumerate(self.plans):
            cos, sin = ropes[plan.layer.self_attn.kind]
            rows = self.before(plan, cos, sin)
            self.feed(plan, attend(index, plan.layer.self_attn, rows), cos, sin)
            if after_layer is not None:
                after_layer()
        return self.streams

    @property
    def streams(self) -> Tensor:
        """The residual streams [N, M, D] between two layers."""
        return self._streams[0]

    def before(self, plan: LayerPlan, cos: Tensor, sin: Tensor) -> TokenRows:
        """Compute the inputs of attention across tokens from the streams."""
        f, num, new = plan.fields, self._num, self._x.new_empty
        q, window = new(num, f[Field.HEADS], f[Field.HEAD_DIM]), new(num, f[Field.HEAD_DIM])
        compressed = new(2, num, f[Field.COLUMNS]) if f[Field.MAIN_KV] else None
        index = None
        if f[Field.INDEX_KV]:
            heads = f[Field.INDEX_HEADS]
            index = new(2, num, f[Field.INDEX_COLUMNS]), new(num, heads, f[Field.INDEX_DIM]), new(num, heads)
        parts = (self._streams[0], *self._mixes[0], q, window, compressed, *(index or (None, None, None)))
        places = _places(parts)
        kernels.before_attention(
            *plan.addresses, places.ctypes.data, self._positions.data_ptr(), cos.data_ptr(), sin.data_ptr(),
            num, self._work.data_ptr(),
        )  # fmt: skip
        return TokenRows(q=q, window=window, compressed=compressed, index=index)

    def feed(self, plan: LayerPlan, attended: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Add attention's output [N, H, C] and then the feed-forward part to the streams."""
        # torch's square root and logarithm are not always the nearest floats, so torch computes them here as well.
        self._experts(plan, torch.sqrt_(softplus(self._router_logits(plan, attended, cos, sin))))

    def _router_logits(self, plan: LayerPlan, attended: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The router's logits [N, E] for the experts, after attention's output projection and the second mixing."""
        logits = self._x.new_empty(self._num, plan.fields[Field.NUM_EXPERTS])
        attended = attended.contiguous()
        parts = (attended, self._streams[0], *self._mixes[0], self._streams[1], *self._mixes[1], self._normed, logits)
        places = _places(parts)
        kernels.after_attention(
            *plan.addresses, places.ctypes.data, cos.data_ptr(), sin.data_ptr(), self._num,
            self._work.data_ptr(),
        )  # fmt: skip
        return logits

    def _experts(self, plan: LayerPlan, scores: Tensor) -> None:
        parts = self._streams[1], *self._mixes[1], self._normed, scores, self._streams[0]
        places = _places(parts)
        kernels.run_experts(
            *plan.addresses, places.ctypes.data, self._tokens.data_ptr(), self._num, self._work.data_ptr()
        )


def _places(tensors: tuple[Tensor | None, ...]) -> _Integers:
    """The tensors' addresses. The caller must hold the returned array during the call: a kernel runs without Python's
    lock, so if the array were freed, other threads could get its memory.
    """
    return np.array([0 if each is None else each.data_ptr() for each in tensors], np.int64)
