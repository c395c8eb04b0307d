"""Reproducible mode for arithmetic that depends on shapes: a hit resumes only where a cold run starts a chunk."""

from dataclasses import replace

import numpy as np
import pytest

from antefix.model import Arithmetic
from antefix.record import RecordKind
from antefix.window import RestorePlanner
from antefix_decode.store_output import store_token
from antefix_prefill import restore as restore_module
from antefix_prefill import run_prompt as prompt_module
from antefix_prefill.leave_handoff import leave_handoff
from antefix_prefill.run_prompt import run_prompt
from antefix_prefill.worker.engine import ignores_shapes

CHUNK = 192
RNG = np.random.default_rng(31)
TURN = RNG.integers(0, 256, 1000)
NEXT = np.concatenate((TURN, RNG.integers(0, 256, 300)))


@pytest.fixture
def make_aligned(make_engine):
    def make(strategy):
        engine = make_engine(strategy, prefill_chunk=CHUNK)
        engine.align_tokens = CHUNK
        engine.planner = RestorePlanner(engine.sizes, engine.rates, align_tokens=CHUNK)
        return engine

    return make


async def answer(engine, prompt):
    computed = await run_prompt(engine, prompt)
    engine.blocks.release(computed.sequence.block_table)
    return computed


@pytest.fixture
def shapes(monkeypatch):
    """Every model call as (position, number of tokens, sequences in the batch)."""
    seen = []

    def noting(run):
        def noted(model, pool, batch, **kwargs):
            seen.append((batch[0][0].position, len(batch[0][1]), len(batch)))
            return run(model, pool, batch, **kwargs)

        return noted

    monkeypatch.setattr(prompt_module, "run_tokens", noting(prompt_module.run_tokens))
    monkeypatch.setattr(restore_module, "forward", noting(restore_module.forward))
    return seen


def test_on_a_cpu_it_holds_by_construction():
    measured = Arithmetic(name="cpu-float32", setup="", failed=("24 x 16: depends on the number of threads",))
    assert ignores_shapes(measured, "cpu")
    assert not ignores_shapes(measured, "cuda")
    assert ignores_shapes(measured, "cuda", reproducible_kernels=True)
    seen = replace(measured, failed=("24 x 16: depends on a row's place",))
    assert not ignores_shapes(seen, "cpu")
    assert not ignores_shapes(seen, "cuda", reproducible_kernels=True)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["full", "boundary", "auto", "periodic(100)", "zero"])
async def test_a_hit_runs_calls_of_the_very_shapes_of_a_cold_run(make_aligned, make_prompt, store, shapes, strategy):
    cold = make_aligned(strategy)
    await answer(cold, make_prompt(cold, NEXT))
    cold_shapes = set(shapes)
    store.records.clear()
    store.puts.clear()
    first = make_aligned(strategy)
    await answer(first, make_prompt(first, TURN))
    checkpoints = [position for kind, position in store.puts if kind is RecordKind.CHECKPOINT]
    assert all(position % CHUNK == 0 for position in checkpoints)
    assert bool(checkpoints) == (strategy != "zero")
    shapes.clear()
    second = make_aligned(strategy)
    hit = await answer(second, make_prompt(second, NEXT))
    assert hit.report.plan == ("replay" if strategy == "zero" else "checkpoint")
    assert hit.report.hit_tokens > 0 and hit.report.hit_tokens % CHUNK == 0
    assert set(shapes) <= cold_shapes
    assert all(num_sequences == 1 for _, _, num_sequences in shapes)


async def test_what_decode_computed_in_other_shapes_is_not_stored(make_aligned, make_prompt, store):
    engine = make_aligned("boundary")
    computed = await run_prompt(engine, make_prompt(engine, TURN[:63]))

    class Output:
        prompt, sequence, prompt_tokens, boundary_window, writer = computed.prompt, computed.sequence, 63, None, None

    computed.sequence.window.position += 1  # as if one more token had closed the block
    await store_token(engine, Output, 5)
    assert len(computed.prompt.chain) == 1
    assert engine.blocks.num_leading(computed.prompt.chain.hashes) == 0
    assert not store.puts


async def test_whole_blocks_of_an_unfinished_chunk_are_this_prompts_alone(make_aligned, make_prompt, store):
    engine = make_aligned("boundary")
    prompt = make_prompt(engine, TURN[: CHUNK + 2 * engine.block_size + 5])
    computed = await run_prompt(engine, prompt)
    # A longer prompt would run these two blocks in a whole chunk, so no prompt may hit them, in the store or in memory.
    assert [position for kind, position in store.puts if kind is RecordKind.BLOCK][-1] == CHUNK
    assert engine.blocks.num_leading(prompt.chain.hashes) == CHUNK // engine.block_size
    # A decode worker would look for these blocks, so no handoff is made.
    assert await leave_handoff(engine, computed) == b""
    engine.blocks.release(computed.sequence.block_table)
    short = make_prompt(engine, TURN[: CHUNK + 5])
    computed = await run_prompt(engine, short)
    assert await leave_handoff(engine, computed) != b""
    engine.blocks.release(computed.sequence.block_table)
