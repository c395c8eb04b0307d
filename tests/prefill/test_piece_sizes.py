"""Pieces of prompts are short while decode steps run on the same thread, and as long as they like otherwise."""

import asyncio
import threading

import numpy as np
import pytest

from antefix_prefill.run_prompt import run_prompt
from antefix_prefill.worker.compute_thread import TOGETHER_TOKENS, ComputeThread
from antefix_prefill.worker.piece_sizes import STEPS_PER_PIECE, TOKENS_MIN, PieceSizes

FIXED_S, EACH_S = 0.02, 0.0004


@pytest.mark.parametrize("step_s", [0.03, 0.1, 0.4])
def test_a_piece_takes_no_longer_than_its_steps(step_s):
    sizes = PieceSizes()
    for num_tokens in (64, 100, 256, 512) * 5:
        sizes.observe_piece(num_tokens, FIXED_S + EACH_S * num_tokens)
    for _ in range(100):
        sizes.observe_step(step_s)
    took = FIXED_S + EACH_S * sizes.tokens_max
    assert sizes.tokens_max == TOKENS_MIN or 0.8 * STEPS_PER_PIECE * step_s < took <= STEPS_PER_PIECE * step_s * 1.01


def test_quick_steps_leave_pieces_their_least_length():
    sizes = PieceSizes()
    sizes.observe_step(0.001)
    assert sizes.tokens_max == TOKENS_MIN


async def test_a_prompt_is_cut_into_short_pieces_while_steps_run_with_the_same_bits(make_engine, make_prompt, store):
    tokens = np.arange(500, dtype=np.uint32) % 251
    whole, cut = [], []
    for stepping, seen in ((False, whole), (True, cut)):
        store.records.clear()
        engine = make_engine("boundary")
        submit = engine.compute.run_piece

        async def run_piece(*args, seen=seen, submit=submit):
            seen.append(args[-1])
            return await submit(*args)

        engine.compute.run_piece = run_piece
        if stepping:
            engine.compute.stepping_for({"tenant": 1})
        computed = await run_prompt(engine, make_prompt(engine, tokens))
        seen.append(computed.logits)
        engine.blocks.release(computed.sequence.block_table)
    assert max(whole[:-1]) == 256 and sum(whole[:-1]) == sum(cut[:-1]) == 500
    assert max(cut[:-1]) <= TOKENS_MIN
    assert np.array_equal(whole[-1], cut[-1])


async def test_fewer_rests_run_together_while_steps_run():
    for stepping, num_calls in ((False, 1), (True, 4)):
        thread, let_go, calls = ComputeThread("test"), threading.Event(), []

        def run(pieces, calls=calls):
            calls.append(pieces)
            return pieces

        busy = asyncio.create_task(thread.run(let_go.wait))
        await asyncio.sleep(0)
        if stepping:
            thread.stepping_for({"": 1})
        asked = [asyncio.create_task(thread.run_piece(40, 0.0, run, name, 40)) for name in range(4)]
        await asyncio.sleep(0)
        let_go.set()
        await asyncio.gather(busy, *asked)
        thread.close()
        assert TOGETHER_TOKENS > 4 * 40 and len(calls) == num_calls
