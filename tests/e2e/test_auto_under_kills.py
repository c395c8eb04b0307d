"""Strategy `auto` while the store and the workers are killed by SIGKILL at its writes: a hit equals a cold run, always.

Prompts are long enough for all checkpoints of `auto`: at ends, at forks, near the start and the end of new ground, and
shortly after an unforeseen fork.
"""

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from antefix.sampling import Sampling
from tests.waiting import until

pytestmark = pytest.mark.services


TEXT = np.frombuffer((Path(__file__).parents[2] / "LICENSE").read_bytes(), np.uint8).astype(np.uint32)
MAX_TOKENS = 16


def stored_bytes(deployment):
    return sum(path.stat().st_size for path in deployment.config.store_dir.rglob("segments/*"))


async def killed_after(deployment, victim, grown_bytes):
    """Kill -9 once the store's files have grown by this much, which is in the middle of a prompt's writes."""
    goal = stored_bytes(deployment) + grown_bytes
    await until(lambda: stored_bytes(deployment) >= goal, f"the store has {goal} bytes", every_s=0.001)
    await deployment.kill(victim)


@dataclass
class Seen:
    """How prompts were restored: their plans, and the hit tokens of those that were not cold."""

    plans: list = field(default_factory=list)
    hits: list = field(default_factory=list)


@pytest.fixture
def answer(reference):
    """Send one request and compare its answer with a run without any cache."""
    seen = Seen()

    async def answer(deployment, prompt):
        output, last = [], None
        async for message in deployment.router.generate(prompt, Sampling(max_tokens=MAX_TOKENS)):
            output += [int(token) for token in message.tokens]
            last = message
        assert output == await asyncio.to_thread(reference.generate, prompt, MAX_TOKENS)
        seen.plans.append(last.restore.plan)
        seen.hits.append(last.usage.cache_hit_tokens)
        return last

    answer.seen = seen
    return answer


@pytest.mark.long
@pytest.mark.timeout(600)
async def test_with_auto_hits_equal_cold_runs_while_store_and_workers_are_killed(deploy, answer, reference):
    document = TEXT[:8_400]
    async with deploy(strategy="auto", num_decode=2) as deployment:
        # 1. The store dies while a cold prompt's blocks and checkpoints are written, and comes back with a torn tail.
        store = deployment.one("kvstore")
        await asyncio.gather(killed_after(deployment, store, 300_000), answer(deployment, document))
        flags = ["--dir", str(deployment.config.store_dir), "--address", store.address]
        store = await deployment.start_role("kvstore", flags)
        # 2. The blocks that survived are hit, and the rest is computed.
        turn = np.concatenate((document, TEXT[:700]))
        last = await answer(deployment, turn)
        assert 0 < last.usage.cache_hit_tokens < len(document)
        # 3. A prompt forks inside the document while the prefill worker is killed. It is answered without that worker.
        fork = np.concatenate((document[:5_000], TEXT[300:4_900]))
        await asyncio.gather(killed_after(deployment, deployment.one("prefill"), 50_000), answer(deployment, fork))
        await deployment.start_worker("prefill")
        # 4. One decode worker is killed in mid-stream. The other continues from stored blocks and the tokens already
        # sent.
        output, victim = [], None
        async for message in deployment.router.generate(turn, Sampling(max_tokens=80, ignore_eos=True)):
            output += [int(token) for token in message.tokens]
            if len(output) >= 8 and victim is None:
                workers = (await deployment.router.status()).workers
                busy = next(w for w in workers if w.role == "decode" and w.num_requests)
                victim = next(p for p in deployment.processes if p.address == busy.address)
                await deployment.kill(victim)
        assert victim is not None and len(output) == 80
        whole = await asyncio.to_thread(reference.generate, turn, 80)
        assert whole and output[: len(whole)] == whole
        await deployment.start_worker("decode")
        # 5. The store dies while a hit reads from it, and comes back.
        again = np.concatenate((fork, TEXT[100:300]))
        asked = asyncio.create_task(answer(deployment, again))
        await asyncio.sleep(0.02)
        await deployment.kill(store)
        await asked
        await deployment.start_role("kvstore", flags)
        # 6. After all that: the next turn, another fork at the same place, and a fork where no checkpoint is.
        for prompt in (
            np.concatenate((turn, TEXT[700:900])),
            np.concatenate((document[:5_000], TEXT[1_000:2_000])),
            np.concatenate((document[:7_000], TEXT[2_000:2_500])),
        ):
            last = await answer(deployment, prompt)
            assert last.usage.cache_hit_tokens >= 4_900, answer.seen
        assert {"checkpoint", "replay"} <= set(answer.seen.plans), answer.seen
