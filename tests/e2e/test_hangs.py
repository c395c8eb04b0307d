"""Processes are stopped but not dead, so no connection closes. Nobody waits long for them."""

import contextlib
import os
import signal
import time

import numpy as np
import pytest

from antefix.errors import Unavailable
from antefix.sampling import Sampling
from antefix_billing.ledger_files import read_settled

pytestmark = [pytest.mark.services, pytest.mark.impatient]

# Twenty times the delay that a hang may cause, plus five times what work took before. Without checks for signs of life,
# each of these takes 61 to 92 s.
BOUND_S = 45.0


@contextlib.contextmanager
def stopped(*processes):
    for process in processes:
        os.kill(process.process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            os.kill(process.process.pid, signal.SIGCONT)


async def test_stopped_processes_cost_little_and_answers_and_bills_stay(
    deploy, ask, document, small_model, small_reference, busy_decode
):
    """All roles in turn in one deployment, because its start costs more than the rest of the test."""
    async with deploy(num_decode=2, model=small_model) as deployment:
        # This request lets the router measure speeds, and this test how busy the machine is.
        begun = time.monotonic()
        await ask(deployment, np.flip(document[:900]))
        bound_s = BOUND_S + 5 * (time.monotonic() - begun)
        num_asked = 1
        for role, start in (("prefill", 800), ("kvstore", 1100)):
            prompt = document[start : start + 1000]
            with stopped(deployment.one(role)):
                begun = time.monotonic()
                output, last = await ask(deployment, prompt)
                assert time.monotonic() - begun < bound_s, role
            assert output == small_reference.generate(prompt, 24)
            assert last.usage.cache_hit_tokens + last.usage.cache_miss_tokens == 1000
            num_asked += 1
        await a_stopped_decode_worker_is_left_in_mid_stream(deployment, busy_decode, document[:1000], small_reference)
        decode = [process for process in deployment.processes if process.role == "decode"]
        with stopped(*decode):
            begun = time.monotonic()
            with pytest.raises(Unavailable, match="does not answer"):
                await ask(deployment, document[:300])
            assert time.monotonic() - begun < bound_s + 10
        # Workers that answer again are used again.
        output, _ = await ask(deployment, document[:300])
        assert output == small_reference.generate(document[:300], 24)
        num_asked += 3
    keys = [settled.record.request_id for settled in read_settled(deployment.config.ledger_dir)]
    assert len(keys) == len(set(keys)) == num_asked


async def a_stopped_decode_worker_is_left_in_mid_stream(deployment, busy_decode, prompt, reference):
    output, begun, stopped_at = [], time.monotonic(), 0.0
    # Much longer than what is read, so that the worker still computes when it is stopped.
    answer = deployment.router.generate(prompt, Sampling(max_tokens=3000, ignore_eos=True))
    async with contextlib.aclosing(answer) as messages:
        with contextlib.ExitStack() as hung:
            async for message in messages:
                if stopped_at and len(message.tokens):
                    assert time.monotonic() - stopped_at < BOUND_S + 5 * (stopped_at - begun)
                output += [int(token) for token in message.tokens]
                if len(output) >= 10 and not stopped_at:
                    hung.enter_context(stopped(await busy_decode(deployment)))
                    stopped_at = time.monotonic()
                if len(output) >= 60:
                    break
    whole = reference.generate(prompt, 60)
    assert stopped_at and len(whole) > 30 and output[: len(whole)] == whole
