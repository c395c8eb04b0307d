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

# Twenty times the delay that a hang may cause. Without checks for signs of life, each of these takes 61 to 92 s.
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


async def test_stopped_processes_cost_little_and_answers_and_bills_stay(deploy, ask, document, reference):
    """All roles in turn in one deployment, because its start costs more than the rest of the test."""
    async with deploy(num_decode=2) as deployment:
        # This request lets the router measure speeds.
        await ask(deployment, np.flip(document[:900]))
        num_asked = 1
        for role, start in (("prefill", 800), ("kvstore", 1100)):
            prompt = document[start : start + 1000]
            with stopped(deployment.one(role)):
                begun = time.monotonic()
                output, last = await ask(deployment, prompt)
                assert time.monotonic() - begun < BOUND_S, role
            assert output == reference.generate(prompt, 24)
            assert last.usage.cache_hit_tokens + last.usage.cache_miss_tokens == 1000
            num_asked += 1
        await a_stopped_decode_worker_is_left_in_mid_stream(deployment, document[:1000], reference)
        decode = [process for process in deployment.processes if process.role == "decode"]
        with stopped(*decode):
            begun = time.monotonic()
            with pytest.raises(Unavailable, match="does not answer"):
                await ask(deployment, document[:300])
            assert time.monotonic() - begun < BOUND_S + 10
        # Workers that answer again are used again.
        output, _ = await ask(deployment, document[:300])
        assert output == reference.generate(document[:300], 24)
        num_asked += 3
    keys = [settled.record.request_id for settled in read_settled(deployment.config.ledger_dir)]
    assert len(keys) == len(set(keys)) == num_asked


async def a_stopped_decode_worker_is_left_in_mid_stream(deployment, prompt, reference):
    output, stopped_at = [], 0.0
    with contextlib.ExitStack() as hung:
        async for message in deployment.router.generate(prompt, Sampling(max_tokens=60, ignore_eos=True)):
            if stopped_at and len(message.tokens):
                assert time.monotonic() - stopped_at < BOUND_S
            output += [int(token) for token in message.tokens]
            if len(output) >= 10 and not stopped_at:
                workers = (await deployment.router.status()).workers
                busy = next(worker for worker in workers if worker.role == "decode" and worker.num_requests)
                hung.enter_context(stopped(next(p for p in deployment.processes if p.address == busy.address)))
                stopped_at = time.monotonic()
    whole = reference.generate(prompt, 60)
    assert stopped_at and len(output) == 60 and output[: len(whole)] == whole
