"""Window state over real processes: a pool shared by workers, its loss, bounded namespaces, a switch of strategy."""

import asyncio
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from antefix.clients import WindowClient
from antefix.layout import KVFormat
from antefix.record import RecordKind
from antefix.sampling import Sampling
from antefix.store.remote_store import RemoteStore
from antefix_console.bare_model import Reference
from antefix_console.deployment import Deployment, DeploymentConfig
from tests.waiting import AT_MOST_S

pytestmark = [pytest.mark.services, pytest.mark.long, pytest.mark.timeout(600)]
MODEL = Path(__file__).parents[2] / "models" / "antefix-tiny"
RNG = np.random.default_rng(61)
TURN = RNG.integers(0, 256, 1000).astype(np.uint32)
NUM_NEW = 6


def config_of(tmp_path, **settings):
    return DeploymentConfig(model=MODEL, data_dir=tmp_path / "data", **settings)


async def ask(deployment, tokens):
    output = []
    async for message in deployment.router.generate(tokens, Sampling(max_tokens=NUM_NEW, ignore_eos=True)):
        output += [int(token) for token in message.tokens]
        last = message
    return output, last.restore


def next_turn(output):
    return np.concatenate((TURN, np.array(output, np.uint32), RNG.integers(0, 256, 60).astype(np.uint32)))


async def num_checkpoints_on_disk(deployment):
    stats = await RemoteStore(deployment.one("kvstore").address).stats()
    return stats.kinds[RecordKind.CHECKPOINT].num_records


async def test_a_turn_resumes_from_the_stores_memory_and_strategies_switch(tmp_path):
    async with Deployment(config_of(tmp_path, window_pool="memory")) as deployment:
        status = await WindowClient(deployment.one("prefill").address).status()
        assert status.strategy == "auto(ends=pool)"
        output, _ = await ask(deployment, TURN)
        assert await num_checkpoints_on_disk(deployment) == 0
        turn = next_turn(output)
        answer, restore = await ask(deployment, turn)
        assert (restore.plan, restore.hit_tokens) == ("checkpoint", 960)
        for role in ("prefill", "decode"):
            await WindowClient(deployment.one(role).address).set_strategy("boundary")
        await ask(deployment, next_turn(answer))
        assert await num_checkpoints_on_disk(deployment) >= 1
        # The decode worker itself prefills a short rest of a prompt, so both roles report plans.
        statuses = [
            await WindowClient(deployment.one(r).address).status(num_plans_max=9) for r in ("prefill", "decode")
        ]
        taken = sorted(plan.taken.kind for status in statuses for plan in status.plans)
        assert taken == ["checkpoint", "checkpoint", "cold"]
    assert answer == await asyncio.to_thread(Reference(MODEL, KVFormat.FP8).generate, turn, NUM_NEW)


async def test_a_redis_that_dies_costs_no_answer(tmp_path, start_redis):
    redis = await asyncio.to_thread(start_redis)
    async with Deployment(config_of(tmp_path, window_pool=redis.url)) as deployment:
        output, _ = await ask(deployment, TURN)
        turn = next_turn(output)
        pooled, restore = await ask(deployment, turn)
        assert restore.plan == "checkpoint"
        redis.kill()
        again, restore = await ask(deployment, turn)
        assert restore.plan in ("replay", "cold")
        assert again == pooled
        assert await num_checkpoints_on_disk(deployment) >= 1  # checkpoints that the pool did not take


async def test_a_bounded_namespace_replays_one_window_and_an_exact_one_finds_nothing_of_it(tmp_path):
    async with Deployment(config_of(tmp_path, strategy="zero", bounded_windows=1)) as deployment:
        output, _ = await ask(deployment, TURN)
        turn = next_turn(output)
        _, restore = await ask(deployment, turn)
        assert (restore.plan, restore.replayed_tokens) == ("bounded-1", 64)
    async with Deployment(config_of(tmp_path, strategy="zero")) as deployment:
        exact, restore = await ask(deployment, turn)
        assert (restore.plan, restore.hit_tokens) == ("cold", 0)
    assert exact == await asyncio.to_thread(Reference(MODEL, KVFormat.FP8).generate, turn, NUM_NEW)


async def test_explain_reads_what_the_services_left(tmp_path):
    config = config_of(tmp_path, strategy="boundary")
    async with Deployment(config) as deployment:
        await ask(deployment, TURN)
    tokens = tmp_path / "tokens.json"
    tokens.write_text(str([int(token) for token in TURN]))
    command = [sys.executable, "-m", "antefix_console", "explain", "--data-dir", str(config.data_dir), "--check"]
    command += ["--tokens-file", str(tokens)]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=AT_MOST_S)
    assert done.returncode == 0, done.stderr
    assert "15 of 15 blocks can be used" in done.stdout
    assert "after so many tokens: 960" in done.stdout
