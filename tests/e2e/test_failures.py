"""Processes die and disks return wrong bytes. The answers stay the same, and only speed is lost."""

import asyncio
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from antefix.sampling import Sampling

pytestmark = pytest.mark.services


@pytest.fixture
def prompt(document):
    return document[:1000]


async def kill_the_busy_one(deployment):
    """Kill the decode worker that is answering."""
    workers = (await deployment.router.status()).workers
    busy = next(worker for worker in workers if worker.role == "decode" and worker.num_requests)
    await deployment.kill(next(process for process in deployment.processes if process.address == busy.address))


async def test_decode_workers_killed_in_mid_stream_are_replaced_without_gap_or_repeat(deploy, ask, prompt, reference):
    """Two kills in one deployment, because a start is expensive: a greedy answer's worker, and a sampled one's."""
    async with deploy(num_decode=3) as deployment:
        output, killed = [], False
        async for message in deployment.router.generate(prompt, Sampling(max_tokens=60, ignore_eos=True)):
            output += [int(token) for token in message.tokens]
            if len(output) >= 10 and not killed:
                await kill_the_busy_one(deployment)
                killed = True
        assert killed and len(output) == 60
        whole = reference.generate(prompt, 60)
        assert output[: len(whole)] == whole

        sampling = Sampling(max_tokens=50, temperature=0.9, top_p=0.95, seed=11, ignore_eos=True)
        undisturbed, _ = await ask(deployment, prompt, sampling=sampling)
        output = []
        async for message in deployment.router.generate(prompt, sampling):
            output += [int(token) for token in message.tokens]
            if len(output) == 20:
                await kill_the_busy_one(deployment)
        assert output == undisturbed


async def test_a_dead_store_costs_speed_never_an_answer_and_is_used_again_when_it_is_back(
    deploy, ask, prompt, small_model, small_reference
):
    async with deploy(model=small_model) as deployment:
        await ask(deployment, prompt)
        old = deployment.one("kvstore")
        await deployment.kill(old)
        longer = np.concatenate((prompt, prompt[:50]))
        async with asyncio.timeout(300):
            output, _ = await ask(deployment, longer)
        assert output == small_reference.generate(longer, 24)

        flags = ["--dir", str(deployment.config.store_dir), "--address", old.address]
        await deployment.start_role("kvstore", flags)
        _, last = await ask(deployment, np.concatenate((prompt, prompt[:70])))
        assert last.usage.cache_hit_tokens == 960
        fresh = np.flip(prompt)
        await ask(deployment, fresh)
        _, again = await ask(deployment, np.concatenate((fresh, prompt[:9])))
        assert again.usage.cache_hit_tokens > 0

        # Prompts are also answered without the prefill worker.
        await deployment.kill(deployment.one("prefill"))
        other = np.roll(prompt, 100)
        output, last = await ask(deployment, other)
        assert last.usage.prompt_tokens == 1000
        assert output == small_reference.generate(other, 24)


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
    async with asyncio.timeout(300):
        ready = json.loads(await starter.stdout.readline())
    pids = [process["pid"] for process in ready["processes"]]
    assert len(pids) == 4
    starter.kill()
    await starter.wait()
    for _ in range(1200):
        if not any(is_running(pid) for pid in pids):
            return
        await asyncio.sleep(0.1)
    pytest.fail("roles outlived `antefix up`")


def is_running(pid):
    return Path(f"/proc/{pid}").exists()
