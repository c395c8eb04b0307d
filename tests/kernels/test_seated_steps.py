"""Decode steps of many sequences on a card, with seats, give the results of each sequence alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Many
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from triton.runtime import interpreter

from antefix.model import (
    Model,
    Sequence,
    WindowState,
    forward,
    mhc,
    moe,
    norms_rope,
    numerics,
    seated_steps,
    triton_ops,
)
from antefix.model.card_pool import CardPool
from antefix.model.seated_steps import NUM_COLUMNS, SeatedSteps
from antefix.model.seats import Seats
from antefix.model.step_runner import run_step
from antefix.model.triton_ops import TritonOps
from tests.kernels.test_triton_ops import build
from tests.no_waiting import Watched

LENGTHS = (1, 5, 8)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    # In the interpreter 256 queries would take too long.
    monkeypatch.setattr(triton_ops, "REPRODUCIBLE_QUERIES_MIN", 16)


def outcome(
    model: Model, ops: TritonOps, *, num_steps: int, lengths: Many[int] = LENGTHS, longer: bool = False
) -> tuple[torch.Tensor, list[bytes], torch.Tensor]:
    """Sequences of several lengths, prefilled alone, then run together: logits, states, and the pool's rows."""
    random = np.random.default_rng(2)
    size = model.config.geometry.block_size
    needed = [-(-(length + 2 * num_steps) // size) for length in lengths]
    pool = CardPool(model.layout, sum(needed), model.device)
    ids = [int(block) for block in random.permutation(pool.allocate(pool.num_blocks))]
    sequences = []
    for length, blocks in zip(lengths, needed, strict=True):
        table = [ids.pop() for _ in range(blocks)]
        sequences.append(Sequence(table, WindowState.zeros(model.layout, 0, model.device)))
        forward(model, pool, [(sequences[-1], random.integers(0, 64, length).astype("<u4"))], ops=ops)
    logits = []
    for step in range(num_steps):
        counts = [2 if longer and step == 1 and i == 1 else 1 for i in range(len(lengths))]
        batch = [(s, random.integers(0, 64, n).astype("<u4")) for s, n in zip(sequences, counts, strict=True)]
        logits.append(forward(model, pool, batch, logits="all", ops=ops).cpu())
    return torch.cat(logits), [sequence.window.to_bytes() for sequence in sequences], pool.rows.cpu()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("longer", "num_steps", "lengths"),
    # In the short form, one sequence completes entries of both ratios in the first step and one ratio's in the second.
    [(True, 2, (1, 7)), *(pytest.param(longer, 4, LENGTHS, marks=pytest.mark.long) for longer in (False, True))],
)
def test_reproducible_steps_have_the_bits_of_each_sequence_alone(device, longer, num_steps, lengths, monkeypatch):
    if longer:
        # As with sequences whose decoded entries together exceed the memory for them.
        monkeypatch.setattr(seated_steps, "_DECODED_BYTES_MAX", 1)
    model = build(device)
    given = {"num_steps": num_steps, "longer": longer, "lengths": lengths}
    alone = outcome(model, TritonOps(model.layout, reproducible=True), **given)
    ops = TritonOps(model.layout, reproducible=True, batched=True)
    together = outcome(model, ops, **given)
    assert torch.equal(alone[0], together[0])
    assert alone[1] == together[1]
    assert torch.equal(alone[2], together[2])


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts launches by kernel. No kernel runs, and per-token steps are kernels, as on a card."""
    found: Counter[str] = Counter()

    def launch(executor: Any, *args: Any, **kwargs: Any) -> None:
        found[executor.fn.__name__] += 1

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)
    for module in (numerics, norms_rope, mhc, moe):
        monkeypatch.setattr(module, "has_kernels", lambda _: True)
    return found


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts what the interpreter would run")
@pytest.mark.parametrize("reproducible", [False, True])
def test_a_step_waits_for_nothing_and_launches_as_much_for_one_as_for_many(launches, reproducible):
    model = build(torch.device("cpu")).to(torch.float32)
    pool, seats = CardPool(model.layout, 8, "cpu"), Seats(model.layout, model.device)
    counted = []
    for num_sequences, num_blocks in ((1, 2), (7, 8)):
        launches.clear()
        integers = torch.zeros(num_sequences, NUM_COLUMNS + num_blocks, dtype=torch.int32)
        with torch.inference_mode(), Watched() as watched:
            steps = SeatedSteps(model, pool, seats, integers, write=True, reproducible=reproducible)
            run_step(model, steps)
            steps.keep_all()
        counted.append((watched.counts, Counter(launches)))
    assert counted[0] == counted[1]
    assert counted[0][1]["_tails_kernel"] == 3


def test_seats_of_which_only_some_could_move_count_as_moved(monkeypatch):
    """Recorded graphs read the old memory, which is given to others."""
    seats = Seats(build(torch.device("cpu")).layout, torch.device("cpu"))
    before, rings = seats.generation, seats.rings

    def grow(more):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(seats, "hca", SimpleNamespace(grow=grow))
    with pytest.raises(RuntimeError):
        seats.reserve(100)
    assert seats.rings is not rings and seats.generation != before


def test_a_state_comes_out_of_its_seat_as_it_went_in():
    model = build(torch.device("cpu"))
    layout, seats = model.layout, Seats(model.layout, torch.device("cpu"))
    states = []
    for number in range(9):
        state = WindowState.zeros(layout, 20 + number)
        state.window.normal_()
        state = WindowState.from_bytes(layout, state.position, state.to_bytes())
        for part in (*state.main.values(), *state.indexer.values()):
            part.tail.normal_()
            if part.overlap is not None:
                part.overlap.normal_()
        states.append(state)
    want = [state.to_bytes() for state in states]
    numbers = seats.take(states)
    assert sorted(numbers) == list(range(1, 10))
    assert seats.generation == 1
    # Copying a state or getting its bytes leaves it in its seat. Access to its tensors moves it out.
    assert [state.to_bytes() for state in states] == want
    assert [state.clone().to_bytes() for state in states] == want
    assert seats.take(states) == numbers
    assert states[3].window.shape[0] == layout.geometry.num_layers
    assert states[3].seat is None
    assert states[3].to_bytes() == want[3]
    # The seat of that state, and the seat of a deleted state, are free again.
    del state, states[5]
    more = [WindowState.zeros(layout, 0), WindowState.zeros(layout, 0)]
    assert sorted(seats.take(more)) == sorted((numbers[3], numbers[5]))
    assert not torch.count_nonzero(more[0].window)
