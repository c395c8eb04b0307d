"""A restored window state gets its seat while blocks are read, and the prompt's rest gives a cold run's bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from antefix.model import WindowState, seated_chunks, step_runner, triton_ops
from antefix.model.card_pool import CardPool
from antefix.model.step_runner import StepRunner
from antefix.model.triton_ops import TritonOps
from antefix.model_dir import ModelIdentity
from antefix.window import PlanKind
from antefix_console.verify.models import Subject
from antefix_console.verify.paired_runs import WorkerPair, run
from antefix_console.verify.stores import EmptyStore, MemoryStore
from antefix_prefill.worker.compute_thread import ComputeThread
from tests.kernels.test_triton_ops import build


class CardPair(WorkerPair):
    """Workers with the kernels, whose short calls share launches."""

    def backend(self, num_blocks):
        model = self.subject.model
        ops = TritonOps(model.layout, reproducible=True, batched=True, chunks=True)
        return CardPool(model.layout, num_blocks, model.device), ops


@pytest.mark.slow
async def test_a_restored_state_has_its_seat_before_its_tokens_run(device, monkeypatch):
    monkeypatch.setattr(triton_ops, "REPRODUCIBLE_QUERIES_MIN", 16)
    for module in (step_runner, seated_chunks):
        monkeypatch.setattr(module, "TOKENS_MAX", 16)
    monkeypatch.setattr(seated_chunks, "SEQUENCES_MAX", 4)
    model, seated, ran = build(device), [], []
    plain, plain_chunk = StepRunner.seat_early, StepRunner.run_chunk

    def seat_early(runner, model, window, num_tokens):
        plain(runner, model, window, num_tokens)
        seated.append(window.seat)

    def run_chunk(runner, model, pool, batch, *, write):
        ran.extend(sequence.window.seat for sequence, _ in batch)
        return plain_chunk(runner, model, pool, batch, write=write)

    monkeypatch.setattr(StepRunner, "seat_early", seat_early)
    monkeypatch.setattr(StepRunner, "run_chunk", run_chunk)
    identity = ModelIdentity(
        path=Path("random"), geometry=model.config.geometry, weights_revision="random", tokenizer_revision="",
        vocab_size=model.config.vocab_size, max_tokens=4096,
    )  # fmt: skip
    workers = CardPair(Subject(name="random", identity=identity, model=model), ComputeThread("test"), 16)
    tokens = (np.arange(2 * model.config.geometry.block_size + 5, dtype=np.uint32) * 7) % model.config.vocab_size
    store = MemoryStore()
    await run(workers.new(store, len(tokens)), tokens[: 2 * model.config.geometry.block_size])
    cold = await run(workers.new(EmptyStore(), len(tokens)), tokens)
    del ran[:], seated[:]
    hit = await run(workers.new(store, len(tokens), kind=PlanKind.CHECKPOINT), tokens)
    assert hit.plan == "checkpoint" and hit.hit_tokens == len(tokens) - 5
    assert len(seated) == 1 and seated[0] is not None and ran == seated
    assert np.array_equal(hit.outcome.logits, cold.outcome.logits)
    workers.compute.close()


def test_no_seat_is_taken_for_tokens_that_need_none(device):
    model = build(device)
    runner = TritonOps(model.layout, batched=True, chunks=True).step_runner
    window = WindowState.zeros(model.layout, 0, device)
    runner.seat_early(model, window, step_runner.TOKENS_MAX + 1)
    assert window.seat is None
    before = window.to_bytes()
    runner.seat_early(model, window, 2)
    assert window.seat is not None and window.to_bytes() == before
    assert torch.equal(window.window, WindowState.zeros(model.layout, 0, device).window) and window.seat is None
