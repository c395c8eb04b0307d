"""Processes die and disks return wrong bytes. The answers stay the same, and only speed is lost."""

import asyncio
import contextlib
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from antefix.sampling import Sampling
from tests.waiting import AT_MOST_S, until

pytestmark = pytest.mark.services


@pytest.fixture
def prompt(document):
    return document[:1000]


# Much longer than what is read of an answer, so that its worker still computes when it is killed.
LONG = 3000


async def with_a_kill(deployment, busy_decode, prompt, sampling, *, after, num_tokens):
    """An answer's first tokens, while the decode worker that computes it is killed after some of them."""
    output, killed = [], None
    async with contextlib.aclosing(deployment.router.generate(prompt, sampling)) as messages:
        async for message in messages:
            output += [int(token) for token in message.tokens]
            if killed is None and len(output) >= after:
                killed = await busy_decode(deployment)
                await deployment.kill(killed)
            if len(output) >= num_tokens:
                return output[:num_tokens]
    pytest.fail(f"the answer ended after {len(output)} tokens")


async def until_stored(deployment, ask, prompt):
    """Ask new prompts until both workers are connected to the store again and one prompt's KV is stored completely."""
    written, fresh = None, np.flip(prompt)
    async with asyncio.timeout(2 * AT_MOST_S):
        # The prefill worker stores the prompt's whole blocks, the decode worker the one that the output ends.
        while written != (960, 64):
            await asyncio.sleep(0.2)
            fresh = np.roll(fresh, 1)
            _, last = await ask(deployment, fresh, sampling=Sampling(max_tokens=32, ignore_eos=True))
            written = (last.usage.cache_write_tokens, last.usage.output_write_tokens)
    return fresh


async def until_read(deployment, ask, stored, other):
    """Ask continuations of a stored prompt until one hits in the store. `other` pushes it out of memory before each."""
    async with asyncio.timeout(2 * AT_MOST_S):
        for length in itertools.count(9):
            _, last = await ask(deployment, np.concatenate((stored, stored[:length])))
            if last.restore.hit_store_tokens:
                return
            await ask(deployment, other)


async def test_decode_workers_killed_in_mid_stream_are_replaced_without_gap_or_repeat(
    deploy, ask, prompt, small_model, small_reference, busy_decode
):
    """Two kills in one deployment, because a start is expensive: a greedy answer's worker, and a sampled one's."""
    async with deploy(num_decode=3, model=small_model) as deployment:
        greedy = Sampling(max_tokens=LONG, ignore_eos=True)
        output = await with_a_kill(deployment, busy_decode, prompt, greedy, after=10, num_tokens=60)
        whole = small_reference.generate(prompt, 60)
        assert len(whole) > 30 and output[: len(whole)] == whole

        settings = {"temperature": 0.9, "top_p": 0.95, "seed": 11, "ignore_eos": True}
        undisturbed, _ = await ask(deployment, prompt, sampling=Sampling(max_tokens=50, **settings))
        sampled = Sampling(max_tokens=LONG, **settings)
        assert await with_a_kill(deployment, busy_decode, prompt, sampled, after=20, num_tokens=50) == undisturbed


async def test_a_dead_store_costs_speed_never_an_answer_and_is_used_again_when_it_is_back(
    deploy, ask, prompt, small_model, small_reference
):
    # This pool holds one of these prompts, not two (28 blocks of 64 tokens), so an older one can only hit in the store.
    pool = ("--pool-bytes", "230000")
    async with deploy(model=small_model, extra_flags={"prefill": pool, "decode": pool}) as deployment:
        await ask(deployment, prompt)
        old = deployment.one("kvstore")
        await deployment.kill(old)
        longer = np.concatenate((prompt, prompt[:50]))
        async with asyncio.timeout(AT_MOST_S):
            output, _ = await ask(deployment, longer)
        assert output == small_reference.generate(longer, 24)

        await deployment.restart(old)
        # Some workers may not have connected to the store again, so how much hits is left open here.
        again = np.concatenate((prompt, prompt[:70]))
        output, _ = await ask(deployment, again)
        assert output == small_reference.generate(again, 24)
        stored = await until_stored(deployment, ask, prompt)

        # Prompts are also answered without the prefill worker.
        await deployment.kill(deployment.one("prefill"))
        other = np.roll(prompt, 100)
        output, last = await ask(deployment, other)
        assert last.usage.prompt_tokens == 1000
        assert output == small_reference.generate(other, 24)
        await until_read(deployment, ask, stored, other)


@pytest.mark.long
async def test_another_formats_blocks_are_misses(deploy, ask, prompt):
    async with deploy() as deployment:
        await ask(deployment, prompt)
    async with deploy(kv_format="float32") as deployment:
        _, last = await ask(deployment, prompt)
        assert (last.usage.cache_hit_tokens, last.restore.plan) == (0, "cold")


async def test_a_damaged_segment_is_a_miss_and_the_answer_stays(deploy, ask, prompt, small_model, small_reference):
    async with deploy(model=small_model) as deployment:
        await ask(deployment, prompt)
    segments = [path for path in deployment.config.store_dir.rglob("*") if path.is_file() and "seg" in path.name]
    assert segments
    rng = np.random.default_rng(1)
    for path in segments:
        data = bytearray(path.read_bytes())
        for offset in rng.integers(len(data) // 8, len(data), 200):
            data[offset] ^= 0x55
        path.write_bytes(data)
    async with deploy(model=small_model) as deployment:
        output, last = await ask(deployment, np.concatenate((prompt, prompt[:20])))
        assert last.usage.cache_hit_tokens < 960
    assert output == small_reference.generate(np.concatenate((prompt, prompt[:20])), 24)


async def test_roles_end_when_the_process_that_started_them_is_killed(tmp_path, make_config):
    starter = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "antefix_console", "up", "--json", "--data-dir", str(tmp_path / "up")),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    async with asyncio.timeout(AT_MOST_S):
        ready = json.loads(await starter.stdout.readline())
    pids = [process["pid"] for process in ready["processes"]]
    assert len(pids) == 4
    starter.kill()
    await starter.wait()
    await until(lambda: not any(is_running(pid) for pid in pids), "roles end after `antefix up`")


def is_running(pid):
    return Path(f"/proc/{pid}").exists()
