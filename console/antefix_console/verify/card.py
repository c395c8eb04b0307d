"""Compares a prompt on a GPU (GPU) with the same prompt on the CPU. Sums run in another order, so bits may differ
within bounds.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from antefix.clients import Tokens
from antefix.layout import KVFormat
from antefix.model import BlockPool, Model, Sequence, WindowState, forward
from antefix.model.ops import Ops, TorchOps
from antefix.model.packed import PackedLinear, PackedStack
from antefix_console.verify.compare import Difference
from antefix_console.verify.paired_runs import WorkerPair

# How far embeddings are moved to measure what a model makes of rounding: one step of BF16.
_BF16_STEP = 2.0**-8


@dataclass(frozen=True, slots=True, kw_only=True)
class AgainstCpu:
    """One comparison of a GPU with the CPU. bound: the largest error that is allowed. problem: why the comparison says
    nothing; empty if it does.
    """

    what: str
    difference: Difference
    bound: float
    problem: str = ""


def against_cpu(workers: WorkerPair, tokens: Tokens, bound: float) -> list[AgainstCpu]:
    """The largest logit difference of each token, relative to the largest logit; the median over tokens.

    bound: the largest error that is allowed if products do not round their inputs. Rounding to FP8 turns a difference
    in the last bit into a step of up to an eighth, which the next layers carry on. So a model that rounds inputs is
    compared twice: without the rounding, by `bound`; and as it is, by what the CPU's own logits differ if each number
    of the embeddings moves by one BF16 step. Over several ranks, rounding cannot be turned off, so only the second
    comparison is made.
    """
    model = workers.subject.model
    alone = workers.subject.alone
    twin = (copy.deepcopy(model) if alone is None else alone().model).to("cpu")
    pair = _Pair(workers, twin, tokens)
    if not rounds_inputs(twin):
        return [AgainstCpu(what="cold", difference=typical_difference(pair.on_cpu(), pair.on_card()), bound=bound)]
    found = []
    if model.lead is None:
        with plain_inputs(model), plain_inputs(twin):
            difference = typical_difference(pair.on_cpu(), pair.on_card())
        found.append(AgainstCpu(what="cold, inputs not rounded", difference=difference, bound=bound))
    return [*found, _as_it_is(pair, bound)]


def _as_it_is(pair: _Pair, bound: float) -> AgainstCpu:
    on_cpu = pair.on_cpu()
    difference = typical_difference(on_cpu, pair.on_card())
    if pair.workers.subject.kv_format is not KVFormat.FP8:
        return AgainstCpu(what="cold", difference=difference, bound=bound)
    move_embeddings(pair.twin)
    moved = typical_difference(on_cpu, pair.on_cpu()).error
    unrelated = typical_difference(on_cpu, on_cpu.roll(1, 0)).error
    told = f"{difference.where}; one BF16 step of the embeddings: {moved:.2g}; unrelated tokens: {unrelated:.2g}"
    return AgainstCpu(
        what="cold",
        difference=replace(difference, where=told),
        bound=max(bound, moved),
        problem=""
        if moved <= unrelated / 2
        else f"rounding turns this model's logits into noise, so nothing is proved: {told}",
    )


@dataclass(frozen=True, slots=True)
class _Pair:
    """A prompt on the workers' device, and by the model's twin on the CPU: logits [T, V]."""

    workers: WorkerPair
    twin: Model
    tokens: Tokens

    def on_card(self) -> Tensor:
        pool, ops = self.workers.backend(self._num_blocks)
        return _logits(self.workers.subject.model, pool, ops, self.tokens, self.workers.prefill_chunk)

    def on_cpu(self) -> Tensor:
        pool = BlockPool(self.twin.layout, self._num_blocks)
        return _logits(self.twin, pool, TorchOps(), self.tokens, self.workers.prefill_chunk)

    @property
    def _num_blocks(self) -> int:
        return -(-len(self.tokens) // self.workers.subject.block_size)


@contextmanager
def plain_inputs(model: Model) -> Iterator[None]:
    """Inside this context, products do not round their inputs."""
    packed = _packed(model)
    forms = [module.form for module in packed]
    try:
        for module in packed:
            module.form = module.form.plain_inputs()
        yield
    finally:
        for module, form in zip(packed, forms, strict=True):
            module.form = form


def _packed(model: Model) -> list[PackedLinear | PackedStack]:
    return [module for module in model.modules() if isinstance(module, PackedLinear | PackedStack)]


def rounds_inputs(model: Model) -> bool:
    """Whether products of this model round their inputs to FP8."""
    return any(module.form.rounds_inputs for module in _packed(model))


@torch.no_grad()
def move_embeddings(model: Model) -> None:
    """Multiply each number of the embeddings by 1 + 2^-8 or 1 - 2^-8, the same ones every time."""
    weight = model.model.embed_tokens.weight
    signs = torch.randint(0, 2, weight.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    weight.mul_(1 + _BF16_STEP * signs.to(weight.dtype))


def typical_difference(cpu: Tensor, card: Tensor) -> Difference:
    """The largest relative difference, for logits [T, V]. In this comparison, NaN counts as the largest difference."""
    errors = torch.nan_to_num((card - cpu).abs().amax(1) / cpu.abs().max(), nan=float("inf"))
    if not errors.any():
        return Difference(identical=True)
    where = f"median over {len(errors)} tokens; worst token {errors.max():.2g}"
    # If the median is exactly zero but some tokens differ, the outcomes are not identical.
    return Difference(identical=False, error=max(float(errors.median()), 1e-12), where=where)


def _logits(model: Model, pool: BlockPool, ops: Ops, tokens: Tokens, chunk: int) -> Tensor:
    table = pool.allocate(pool.num_blocks)
    sequence = Sequence(table, WindowState.zeros(model.layout, 0, model.device))
    pieces = np.split(tokens, range(chunk, len(tokens), chunk))
    return torch.cat([forward(model, pool, [(sequence, piece)], logits="all", ops=ops).cpu() for piece in pieces])
