"""Short prefills, drafted tokens and decode steps in shared launches give the results of each sequence alone."""

from __future__ import annotations

import functools
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from antefix.model import Model, Sequence, WindowState, forward, run_tokens, seated_chunks, step_runner, triton_ops
from antefix.model.card_pool import CardPool
from antefix.model.seated_chunks import ChunkShape, NewRows, SeatedChunks
from antefix.model.seats import Seats
from antefix.model.step_runner import StepRunner, chunk_bucket, run_rows
from antefix.model.triton_ops import TritonOps
from tests.kernels.recorded import captured
from tests.kernels.test_seated_steps import launches  # noqa: F401 - a fixture
from tests.kernels.test_triton_ops import build
from tests.no_waiting import Watched

LENGTHS = (3, 9)
# For each call and sequence: the number of new tokens, and how many of them are kept.
CALLS: tuple[tuple[tuple[int, int], ...], ...] = (((3, 3), (1, 1)), ((2, 1), (6, 6)))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    # In the interpreter 256 queries would take too long, and so would a line of 8,832 records.
    monkeypatch.setattr(triton_ops, "REPRODUCIBLE_QUERIES_MIN", 16)
    monkeypatch.setattr(step_runner, "TOKENS_MAX", 16)
    monkeypatch.setattr(seated_chunks, "TOKENS_MAX", 16)
    monkeypatch.setattr(seated_chunks, "SEQUENCES_MAX", 4)


def outcome(model: Model, ops: TritonOps) -> tuple[list[torch.Tensor], list[bytes], torch.Tensor]:
    """Logits of each call, states and the pool's rows after calls of several tokens per sequence."""
    random = np.random.default_rng(2)
    size = model.config.geometry.block_size
    needed = [-(-(length + 20) // size) for length in LENGTHS]
    pool = CardPool(model.layout, sum(needed), model.device)
    ids = [int(block) for block in random.permutation(pool.allocate(pool.num_blocks))]
    sequences = []
    prompt = TritonOps(model.layout, reproducible=True)
    for length, blocks in zip(LENGTHS, needed, strict=True):
        table = [ids.pop() for _ in range(blocks)]
        sequences.append(Sequence(table, WindowState.zeros(model.layout, 0, model.device)))
        forward(model, pool, [(sequences[-1], random.integers(0, 64, length).astype("<u4"))], ops=prompt)
    logits = []
    for call in CALLS:
        batch = [
            (s, random.integers(0, 64, count).astype("<u4")) for s, (count, _) in zip(sequences, call, strict=True)
        ]
        ran = run_tokens(model, pool, batch, logits="all", ops=ops)
        for number, (_, kept) in enumerate(call):
            ran.keep(number, kept)
        logits.append(ran.logits.cpu())
    return logits, [sequence.window.to_bytes() for sequence in sequences], pool.rows.cpu()


@functools.cache
def alone(device: torch.device) -> Any:
    """The results of each sequence alone."""
    model = build(device)
    return outcome(model, TritonOps(model.layout, reproducible=True))


def assert_same(one: Any, other: Any) -> None:
    assert all(torch.equal(a, b) for a, b in zip(one[0], other[0], strict=True))
    assert one[1] == other[1]
    assert torch.equal(one[2], other[2])


@pytest.mark.long
def test_calls_of_several_tokens_have_the_bits_of_each_sequence_alone(device: torch.device) -> None:
    model = build(device)
    ops = TritonOps(model.layout, reproducible=True, batched=True, chunks=True)
    assert_same(outcome(model, ops), alone(device))
    assert ops.step_runner is not None
    assert ops.step_runner.counters.steps_launched == len(CALLS)


@pytest.mark.long
def test_replayed_calls_have_the_bits_of_each_sequence_alone(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(device)
    if device.type == "cpu":
        monkeypatch.setattr(StepRunner, "_captured", captured)
        monkeypatch.setattr(StepRunner, "_may_record", lambda *_: True)
        monkeypatch.setattr(step_runner, "_BLOCKS_MIN", 8)
        monkeypatch.setattr(step_runner, "_ROWS_MIN", 8)
    ops = TritonOps(model.layout, reproducible=True, batched=True, graphs=True, chunks=True)
    assert_same(outcome(model, ops), alone(device))
    assert ops.step_runner is not None
    assert ops.step_runner.counters.steps_replayed == len(CALLS)
    assert ops.step_runner.counters.steps_launched == 0


@pytest.mark.slow
def test_a_drafted_token_may_be_kept_after_the_next_call(device: torch.device) -> None:
    model = build(device)
    found = []
    for settings in ({}, {"batched": True, "chunks": True}):
        ops = TritonOps(model.layout, reproducible=True, **settings)
        pool = CardPool(model.layout, 8, model.device)
        ids = pool.allocate(8)
        one, other = (Sequence(ids[at : at + 4], WindowState.zeros(model.layout, 0, model.device)) for at in (0, 4))
        tokens = np.arange(6, dtype="<u4")
        ran = run_tokens(model, pool, [(one, tokens)], ops=ops)
        ran.keep(0, 5)
        between = forward(model, pool, [(other, tokens[1:4])], ops=ops)
        ran.keep(0, 6)
        after = forward(model, pool, [(one, tokens[:1]), (other, tokens[:2])], ops=ops)
        found.append(([ran.logits, between, after], [each.window.to_bytes() for each in (one, other)], pool.rows))
    assert_same(*found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts what the interpreter would run")
@pytest.mark.parametrize("reproducible", [False, True])
def test_a_call_waits_for_nothing_and_launches_as_much_for_one_as_for_many(launches: Any, reproducible: bool) -> None:  # noqa: F811
    model = build(torch.device("cpu")).to(torch.float32)
    pool, seats = CardPool(model.layout, 8, "cpu"), Seats(model.layout, model.device)
    counted = []
    new = NewRows(seats, 16)
    for shape in (ChunkShape(2, 2, 2), ChunkShape(11, 4, 8)):
        launches.clear()
        integers = torch.zeros(shape.num_integers, dtype=torch.int32)
        with torch.inference_mode(), Watched() as watched:
            settings = {"write": True, "reproducible": reproducible, "shape": shape, "new": new}
            run_rows(model, SeatedChunks(model, pool, seats, integers, **settings))
        counted.append((watched.counts, dict(launches)))
    assert counted[0] == counted[1]
    assert counted[0][1]["_lines_kernel"] == 3


def test_seats_are_taken_before_a_recording_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """If seats moved to get more room after that, a recording would use memory that is no longer written."""
    model = build(torch.device("cpu"))
    pool, runner = CardPool(model.layout, 1, "cpu"), StepRunner(reproducible=True, graphs=True, chunks=True)
    batch = [(Sequence([0], WindowState.zeros(model.layout, 0)), np.zeros(1, "<u4")) for _ in range(9)]
    found = []

    def recorded(_: StepRunner, __: Model, ___: CardPool, seats: Seats, shape: ChunkShape) -> None:
        found.append((seats.generation, seats.take([sequence.window for sequence, _ in batch]), seats.generation))
        raise RuntimeError("enough")

    monkeypatch.setattr(StepRunner, "_recorded_chunk", recorded)
    with pytest.raises(RuntimeError, match="enough"), torch.inference_mode():
        runner.run_chunk(model, pool, batch, write=True)
    assert found == [(1, list(range(1, 10)), 1)]


def test_a_bucket_holds_its_call_and_a_row_of_nobody() -> None:
    for rows, live, blocks in ((1, 1, 1), (16, 4, 64), (17, 5, 65), (512, 64, 4000)):
        shape = ChunkShape(rows, live + 1, blocks)
        bucket = chunk_bucket(shape)
        assert bucket.rows >= rows
        assert bucket.sequences > live
        assert bucket.blocks >= blocks
        assert bucket == chunk_bucket(bucket)


def test_a_recording_more_than_fits_drops_the_one_not_used_for_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(torch.device("cpu"))
    pool, runner = CardPool(model.layout, 1, "cpu"), StepRunner(reproducible=True, graphs=True, chunks=True)
    seats, made = runner.seats(model), []

    def record(_: StepRunner, __: Model, seats: Seats, shape: ChunkShape, ___: Any, *, is_warm: bool) -> Any:
        made.append((shape.rows, is_warm))
        return mock.Mock(generation=seats.generation)

    monkeypatch.setattr(StepRunner, "_may_record", lambda *_: True)
    monkeypatch.setattr(StepRunner, "_record", record)
    monkeypatch.setattr(step_runner, "_GRAPHS_MAX", 2)
    for rows in (16, 32, 16, 64, 16, 32):
        runner._recorded_chunk(model, pool, seats, ChunkShape(rows, 2, 1))
    assert made == [(16, False), (32, False), (64, False), (32, False)]
