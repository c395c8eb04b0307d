"""Traces of each step's result for each token of one sequence, which show the first step where two runs differ.

A trace maps (place in the pass, name of the step) to the rows of all tokens, by their position.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Many
from typing import Any

import numpy as np
import torch
from torch import Tensor

from antefix.model import Model, Sequence, WindowState, forward
from antefix.model.backend import make_backend
from antefix.model.ops import Entries, Ops
from antefix.model.pool import BlockPool

Trace = dict[str, dict[int, Tensor]]


class Tracer:
    """Records steps by name, in the order in which a forward pass runs them. `start` is the piece's first position."""

    def __init__(self) -> None:
        self.steps: Trace = {}
        self.start, self.count, self.layer = 0, 0, 0
        self._undo: list[Callable[[], object]] = []

    def note(self, name: str, rows: Tensor, dim: int = 0) -> None:
        """Record a step. The rows of the piece's tokens lie along `dim`; further rows are padding."""
        kept = self.steps.setdefault(name, {})
        for offset, row in enumerate(rows.movedim(dim, 0)[: self.count].detach().cpu().unbind(0)):
            kept[self.start + offset] = row

    def note_entries(self, name: str, first: int, records: Tensor) -> None:
        kept = self.steps.setdefault(name, {})
        for offset, row in enumerate(records.cpu().unbind(0)):
            kept[first + offset] = row

    def watch(self, model: Model) -> None:
        for index, layer in enumerate(model.model.layers):
            label = f"layer {index} "
            self._hook(layer.attn_hc, label + "attention's mixing", at_entry=index)
            self._hook(layer.input_layernorm, label + "norm")
            attention: Any = layer.self_attn
            for method in ("query_residual", "queries", "window_entries"):
                self._wrap(attention, method, label + method)
            if attention.compressor is not None:
                self._wrap(attention.compressor, "project", label + "compressor rows", dim=1)
                if indexer := getattr(attention.compressor, "indexer", None):
                    self._wrap(indexer, "project", label + "indexer rows", dim=1)
                    self._wrap(indexer, "queries", label + "indexer queries")
                    self._wrap(indexer, "head_weights", label + "indexer weights")
            self._wrap(attention, "output", label + "output")
            self._hook(layer.ffn_hc, label + "experts' mixing")
            self._hook(layer.post_attention_layernorm, label + "experts' norm")
            self._hook(layer.mlp.gate, label + "routing")
            self._hook(layer.mlp.shared_experts, label + "shared expert")
            self._hook(layer.mlp, label + "experts")
        self._hook(model.model.hc_head, "last mixing")
        self._hook(model.model.norm, "last norm")

    def stop(self) -> None:
        for undo in reversed(self._undo):
            undo()

    def _hook(self, module: torch.nn.Module, name: str, at_entry: int | None = None) -> None:
        def noted(_: object, inputs: tuple[Tensor, ...], output: Any) -> None:
            if at_entry is not None:
                self.layer = at_entry
                self.note(f"layer {at_entry} streams", inputs[0])
            for number, rows in enumerate(output if isinstance(output, tuple) else (output,)):
                self.note(f"{name} {number}" if isinstance(output, tuple) else name, rows)

        self._undo.append(module.register_forward_hook(noted).remove)

    def _wrap(self, owner: Any, method: str, name: str, dim: int = 0) -> None:
        plain = getattr(owner, method)

        def noted(*args: Any) -> Any:
            result = plain(*args)
            self.note(name, result, dim)
            return result

        owner.__dict__[method] = noted
        self._undo.append(lambda: owner.__dict__.pop(method))


class TracedOps:
    """Runs the steps that use cached KV, and records their results."""

    steps_together = False
    step_runner = None

    def __init__(self, ops: Ops, tracer: Tracer) -> None:
        self._ops, self._tracer = ops, tracer

    def window_pack(self, entries: Tensor, layout: Any) -> Tensor:
        return self._ops.window_pack(entries, layout)

    def compress_and_pack(
        self, compressor: Any, rows: Tensor, overlap: Any, cos: Tensor, sin: Tensor, to: Entries, first: int
    ) -> None:
        self._ops.compress_and_pack(compressor, rows, overlap, cos, sin, to, first)
        at = torch.arange(first, first + rows.shape[1], device=rows.device)
        name = f"layer {self._tracer.layer} entries, {to.part.kind.value}"
        self._tracer.note_entries(name, first, to.pool.records(to.part)[to.locate(at)])

    def indexer_topk(self, q: Tensor, weights: Tensor, keys: Entries, visible: Tensor, k: int) -> Tensor:
        return self._noted("picked", self._ops.indexer_topk(q, weights, keys, visible, k))

    def sparse_attention(self, *args: Any) -> Tensor:
        return self._noted("attention", self._ops.sparse_attention(*args))

    def full_attention(self, *args: Any) -> Tensor:
        return self._noted("attention", self._ops.full_attention(*args))

    def _noted(self, name: str, rows: Tensor) -> Tensor:
        self._tracer.note(f"layer {self._tracer.layer} {name}", rows)
        return rows


def trace(model: Model, tokens: np.ndarray, cuts: Many[int], *, kernels: str = "auto", reproducible: bool = True,
          backend: tuple[BlockPool, Ops] | None = None) -> Trace:  # fmt: skip
    """The trace of one sequence whose tokens run in pieces that end at `cuts`."""
    num_blocks = -(-len(tokens) // model.config.geometry.block_size)
    pool, ops = backend or make_backend(kernels, model.layout, num_blocks, model.device, reproducible=reproducible)
    sequence = Sequence(pool.allocate(num_blocks), WindowState.zeros(model.layout, 0, model.device))
    tracer = Tracer()
    tracer.watch(model)
    try:
        for stop in (*cuts, len(tokens)):
            tracer.start, tracer.count = sequence.position, stop - sequence.position
            logits = forward(model, pool, [(sequence, tokens[tracer.start : stop])], logits="all",
                             ops=TracedOps(ops, tracer))  # fmt: skip
            tracer.note("logits", logits)
    finally:
        tracer.stop()
    return tracer.steps


def first_difference(one: Trace, other: Trace) -> str:
    """The first step, in the order of the pass, that gave a token different bits, or ""."""
    for name, rows in one.items():
        assert rows.keys() == other[name].keys(), name
        if places := [at for at, row in rows.items() if not torch.equal(row, other[name][at])]:
            return f"{name} at {places[:6]} ({len(places)} of {len(rows)})"
    return ""
