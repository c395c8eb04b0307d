"""A replay runs only what window state depends on. The bits equal those of running every token; nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from antefix.errors import InternalError
from antefix.layout import KVFormat
from antefix.model import BlockPool, Model, Sequence, WindowState, forward, load_model
from antefix.model.ops import TorchOps
from antefix.model.replay import needed_from, replay
from tests.slow_cases import slow_but

Checkpoint = Callable[[str], Path]
PLANS = ("flash", "pro", "small_ratios", "odd_ratios", "coprime_ratios", "wide_overlap")
FORMATS = (KVFormat.FP8, KVFormat.FLOAT32)


class ReadingOps(TorchOps):
    """Operations in which writing to a pool is an error."""

    def compress_and_pack(self, *_: object) -> None:
        raise AssertionError("a replay wrote global KV")


@dataclass(frozen=True, slots=True)
class Case:
    """A model with a document in its pool, and the cold run's window state at every block boundary."""

    model: Model
    pool: BlockPool
    table: list[int]
    tokens: np.ndarray
    states: tuple[bytes, ...]

    @property
    def block_size(self) -> int:
        return self.model.layout.geometry.block_size


@pytest.fixture(scope="module")
def case(checkpoint: Checkpoint) -> Callable[[str, KVFormat], Case]:
    made: dict[tuple[str, KVFormat], Case] = {}

    def make(plan: str, kv_format: KVFormat) -> Case:
        if (plan, kv_format) not in made:
            made[plan, kv_format] = build(load_model(checkpoint(plan), kv_format=kv_format))
        return made[plan, kv_format]

    return make


def build(model: Model) -> Case:
    geometry = model.layout.geometry
    # The document is one block longer than two replays, so that most replays start inside it.
    num_blocks = 2 * geometry.replay_tokens // geometry.block_size + 1
    tokens = np.random.default_rng(7).integers(0, model.config.vocab_size, num_blocks * geometry.block_size)
    pool = BlockPool(model.layout, num_blocks)
    cold = Sequence(pool.allocate(num_blocks), WindowState.zeros(model.layout, 0))
    states = []
    for piece in np.split(tokens, num_blocks):
        forward(model, pool, [(cold, piece)])
        states.append(cold.window.to_bytes())
    return Case(model, pool, cold.block_table, tokens.astype("<u4"), tuple(states))


def start_state(case: Case, start: int, *, cut: bool, garbage: bool) -> WindowState:
    make = WindowState.cut_at if cut else WindowState.zeros
    state = make(case.model.layout, start)
    if garbage:
        generator = torch.Generator().manual_seed(start)
        state.window.copy_(torch.randn(state.window.shape, generator=generator))
        for part in (*state.main.values(), *state.indexer.values()):
            part.tail.copy_(torch.randn(part.tail.shape, generator=generator))
    return state


@pytest.mark.slow
@pytest.mark.parametrize("kv_format", FORMATS)
@pytest.mark.parametrize("plan", PLANS)
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_it_gives_the_bits_of_running_every_token(
    case: Callable[[str, KVFormat], Case], plan: str, kv_format: KVFormat, data: st.DataObject
) -> None:
    """From any token a block or more before, cut anywhere: long enough to be exact or not, bounded or not."""
    one = case(plan, kv_format)
    stop = data.draw(st.integers(1, len(one.table)), label="blocks") * one.block_size
    start = data.draw(st.integers(0, stop - one.block_size), label="start")
    cuts = data.draw(st.lists(st.integers(start + 1, stop), max_size=3), label="cuts")
    cut, garbage = data.draw(st.booleans(), label="bounded"), data.draw(st.booleans(), label="garbage")
    whole = Sequence(one.table, start_state(one, start, cut=cut, garbage=garbage))
    forward(one.model, one.pool, [(whole, one.tokens[start:stop])], write_global_kv=False)
    before = one.pool.rows.clone()
    trimmed = Sequence(one.table, start_state(one, start, cut=cut, garbage=garbage))
    for end in sorted({*cuts, stop}):
        piece = one.tokens[trimmed.position : end]
        replay(one.model, one.pool, trimmed, piece, stop=stop, ops=ReadingOps())
    assert trimmed.position == stop
    assert trimmed.window.to_bytes() == whole.window.to_bytes()
    assert torch.equal(one.pool.rows, before)


@pytest.mark.parametrize("kv_format", FORMATS)
@pytest.mark.parametrize("plan", slow_but(["odd_ratios", "coprime_ratios"], PLANS))
def test_at_every_boundary_it_gives_the_cold_runs_bits(
    case: Callable[[str, KVFormat], Case], plan: str, kv_format: KVFormat
) -> None:
    one = case(plan, kv_format)
    for block, want in enumerate(one.states, 1):
        stop = block * one.block_size
        start = max(needed_from(one.model.layout.geometry, 0, stop), 0)
        replayed = Sequence(one.table, start_state(one, start, cut=False, garbage=start > 0))
        replay(one.model, one.pool, replayed, one.tokens[start:stop], stop=stop, ops=ReadingOps())
        assert replayed.window.to_bytes() == want, f"at {stop}"


@pytest.mark.parametrize("plan", PLANS)
def test_one_token_less_is_not_enough(case: Callable[[str, KVFormat], Case], plan: str) -> None:
    """The set of needed tokens is minimal: without its first token some state differs."""
    one = case(plan, KVFormat.FLOAT32)
    stop = len(one.table) * one.block_size
    start = needed_from(one.model.layout.geometry, 0, stop) + 1
    replayed = Sequence(one.table, start_state(one, start, cut=False, garbage=True))
    replay(one.model, one.pool, replayed, one.tokens[start:stop], stop=stop)
    assert replayed.window.to_bytes() != one.states[-1]


def test_the_guard_against_writing_can_fail(case: Callable[[str, KVFormat], Case]) -> None:
    one = case("pro", KVFormat.FP8)
    state = Sequence(one.table, WindowState.zeros(one.model.layout, 0))
    with pytest.raises(AssertionError, match="wrote global KV"):
        forward(one.model, one.pool, [(state, one.tokens[: one.block_size])], ops=ReadingOps())


def test_what_makes_no_sense_is_refused(case: Callable[[str, KVFormat], Case]) -> None:
    one = case("small_ratios", KVFormat.FP8)
    size = one.block_size
    other = case("pro", KVFormat.FP8)
    fresh = WindowState.zeros(one.model.layout, 0)
    for sequence, tokens, stop, text in (
        (Sequence(one.table, fresh), one.tokens[:3], size + 1, "multiple"),
        (Sequence(one.table, fresh), one.tokens[:0], size, "cannot replay 0"),
        (Sequence(one.table, fresh), one.tokens[: size + 1], size, "cannot replay"),
        (Sequence(one.table[:1], fresh), one.tokens[:size], 2 * size, "more blocks"),
        (Sequence(other.table, WindowState.zeros(other.model.layout, 0)), one.tokens[:size], size, "another layout"),
    ):
        with pytest.raises(InternalError, match=text):
            replay(one.model, one.pool, sequence, tokens, stop=stop)
    assert fresh.position == 0
