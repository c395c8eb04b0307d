"""Real workers and routers join, drain, leave and come back. No answer is wrong, and none is lost."""

import asyncio
import contextlib
import random
import signal

import numpy as np
import pytest

from antefix import rpc
from antefix.clients import RouterClient
from antefix.errors import AntefixError, PermissionDenied, Unauthenticated, Unavailable
from antefix.sampling import Sampling
from antefix.v1 import router_pb2, router_pb2_grpc
from antefix_console.deployment import Deployment
from tests.waiting import AT_MOST_S, until

pytestmark = pytest.mark.services


@pytest.fixture
def prompt(document):
    return document[:1000]


class Fleet:
    """A store, routers whose settings name no workers, and workers that register with the routers."""

    def __init__(self, config):
        self.deployment = Deployment(config)
        self.more_flags = []

    async def __aenter__(self):
        config = self.deployment.config
        (config.data_dir / "logs").mkdir(parents=True, exist_ok=True)
        (config.data_dir / "secret").write_text("ab" * 32)
        (config.data_dir / "secret").chmod(0o600)
        await self.deployment.start_role("kvstore", ["--dir", str(config.store_dir)])
        return self

    async def __aexit__(self, *_):
        await self.deployment.stop()

    def flags(self):
        return [*self.deployment._shared_flags(), *self.more_flags]

    async def router(self, address="127.0.0.1:0"):
        started = await self.deployment.start_role("router", [*self.flags(), "--leases", "true", "--address", address])
        return started, RouterClient(started.address)

    async def worker(self, role, routers):
        flags = ["--threads", "1", "--routers", ",".join(router.address for router in routers)]
        return await self.deployment.start_role(role, [*self.flags(), *flags])


@pytest.fixture
def fleet(make_config):
    return lambda: Fleet(make_config())


def memory_known(client):
    async def check():
        workers = (await client.status()).workers
        return bool(workers) and all(worker.memory_known for worker in workers)

    return check


def told_of_events(client, more_than=0):
    async def check():
        return (await client.status()).counters.memory_events > more_than

    return check


def known(client, *processes):
    async def check():
        with contextlib.suppress(Unavailable):
            workers = (await client.status()).workers
            return {w.address for w in workers} == {p.address for p in processes}
        return False

    return check


async def ask(client, prompt, max_tokens=24, **options):
    output, last = [], None
    sampling = Sampling(max_tokens=max_tokens)
    async for message in client.generate(np.asarray(prompt, np.uint32), sampling, **options):
        output += [int(token) for token in message.tokens]
        last = message
    return output, last


async def test_equal_prompts_at_once_are_computed_once_and_only_workers_may_register(
    deploy, prompt, small_model, small_reference
):
    """Both rules in one deployment, because a start is expensive."""
    async with deploy(model=small_model) as deployment:
        await until(memory_known(deployment.router))
        results = await asyncio.gather(
            *(ask(deployment.router, prompt, session="a conversation" if number else "") for number in range(4))
        )
        counters = (await deployment.router.status()).counters
        await until(told_of_events(deployment.router))
        await nobody_else_may_register(deployment)
    expected = small_reference.generate(prompt, 24)
    assert [output for output, _ in results] == [expected] * 4
    assert sorted(last.restore.written_tokens for _, last in results)[:3] == [0, 0, 0]
    assert (counters.led + counters.straight, counters.followed) == (4, 3)


async def drained_in_mid_stream(deployment, prompt, busy_decode):
    """An answer, and the worker that was told to stop while it computed it: None if the answer ended before that."""
    output, drained = [], None
    async for message in deployment.router.generate(prompt, Sampling(max_tokens=300, ignore_eos=True)):
        output += [int(token) for token in message.tokens]
        if len(output) >= 10 and drained is None:
            drained = await busy_decode(deployment)
            if drained is None:
                break
            drained.process.send_signal(signal.SIGTERM)
    return output, drained


async def test_a_worker_that_drains_ends_what_it_has_and_gets_nothing_new(
    deploy, prompt, small_model, small_reference, busy_decode
):
    async with deploy(num_decode=2, model=small_model) as deployment:
        async with asyncio.timeout(2 * AT_MOST_S):
            drained = None
            while drained is None:
                output, drained = await drained_in_mid_stream(deployment, prompt, busy_decode)
            assert len(output) == 300
            # The worker ended by itself after its last token, and was not killed.
            assert await drained.process.wait() == 0
        assert b"moves to another" not in deployment.one("router").log_path.read_bytes()
        again, _ = await ask(deployment.router, prompt)
    assert again == small_reference.generate(prompt, 24)
    whole = small_reference.generate(prompt, 300)
    assert len(whole) > 30 and output[: len(whole)] == whole


@pytest.mark.long
async def test_workers_join_and_leave_two_routers_by_lease(fleet, prompt, reference):
    async with fleet() as one:
        (_, first), (_, second) = await one.router(), await one.router()
        prefill = await one.worker("prefill", (first, second))
        decode = await one.worker("decode", (first, second))
        for client in (first, second):
            await until(known(client, prefill, decode))
        expected = reference.generate(prompt, 24)
        assert (await ask(first, prompt))[0] == expected
        output, last = await ask(second, prompt)
        assert output == expected and last.usage.cache_hit_tokens > 0
        # Another worker joins. The first one is killed, and forgotten when its lease ends.
        other = await one.worker("decode", (first, second))
        await until(known(first, prefill, decode, other))
        await one.deployment.kill(decode)
        assert (await ask(second, prompt))[0] == expected
        for client in (first, second):
            await until(known(client, prefill, other))
        # A worker that is stopped tells the routers.
        prefill.process.send_signal(signal.SIGTERM)
        await until(known(first, other))
        assert (await ask(first, prompt))[0] == expected


async def nobody_else_may_register(deployment):
    client = deployment.router
    async with rpc.channel(deployment.one("router").address) as channel:
        intruder = router_pb2.RegisterWorkerRequest(
            address="127.0.0.1:6666", role="decode", fingerprint=(await client.status()).fingerprint, ttl_s=6
        )
        # This process proves the deployment's secret as an operator. A stranger has no proof.
        with pytest.raises((PermissionDenied, Unauthenticated)), rpc.rpc_errors():
            await router_pb2_grpc.RouterServiceStub(channel).RegisterWorker(intruder, timeout=AT_MOST_S)
    assert len((await client.status()).workers) == 2


@pytest.mark.long
async def test_routers_share_what_they_know_through_redis_and_outlive_it(fleet, prompt, reference, start_redis):
    redis = await asyncio.to_thread(start_redis)
    async with fleet() as one:
        one.more_flags = ["--events-redis", redis.url]
        (_, first), (_, second) = await one.router(), await one.router()
        workers = [await one.worker(role, (first, second)) for role in ("prefill", "decode")]
        for client in (first, second):
            await until(known(client, *workers))
            await until(memory_known(client))
        expected = reference.generate(prompt, 24)
        assert (await ask(first, prompt))[0] == expected
        # The router that did not place the request hears of the blocks too.
        await until(told_of_events(second))
        redis.kill()
        longer = np.concatenate((prompt, prompt[:200]))
        assert (await ask(second, longer))[0] == reference.generate(longer, 24)
        redis.start()
        before = [(await client.status()).counters.memory_events for client in (first, second)]
        await ask(second, np.concatenate((prompt[::-1], prompt[:300])))
        for client, count in zip((first, second), before, strict=True):
            await until(told_of_events(client, count))
            await until(memory_known(client))


@pytest.mark.long
async def test_a_router_that_was_killed_knows_its_workers_again(fleet, prompt, reference):
    async with fleet() as one:
        process, client = await one.router()
        prefill = await one.worker("prefill", (client,))
        decode = await one.worker("decode", (client,))
        await until(known(client, prefill, decode))
        expected = reference.generate(prompt, 24)
        assert (await ask(client, prompt))[0] == expected
        await one.deployment.kill(process)
        with pytest.raises(AntefixError):
            await ask(client, prompt, timeout_s=AT_MOST_S)
        _, client = await one.router(process.address)
        await until(known(client, prefill, decode))
        output, last = await ask(client, prompt)
        assert output == expected and last.usage.cache_hit_tokens == 960


@pytest.mark.long
@pytest.mark.timeout(500)
async def test_an_agent_like_load_with_kills_and_cancels_has_no_wrong_answer_and_no_stuck_request(
    deploy, document, reference
):
    """Growing conversations over 2 prefill and 2 decode workers, while workers of both roles are killed."""
    rng = random.Random(5)
    async with deploy(num_prefill=2, num_decode=2) as deployment:
        wrong, num_done, num_cancelled = [], 0, 0

        async def conversation(number):
            nonlocal num_done, num_cancelled
            tokens = np.concatenate((document[:640], np.full(30 + number, 65 + number, np.uint32)))
            for _ in range(4):
                if rng.random() < 0.2:
                    with contextlib.suppress(TimeoutError, AntefixError):
                        await asyncio.wait_for(ask(deployment.router, tokens, 64), 0.5)
                    num_cancelled += 1
                output, _ = await asyncio.wait_for(ask(deployment.router, tokens, 16), 480)
                num_done += 1
                if output != reference.generate(tokens, 16):
                    wrong.append((number, len(tokens)))
                tokens = np.concatenate((tokens, np.array(output, np.uint32), document[:90]))

        async def killer():
            for role in ("decode", "prefill"):
                await asyncio.sleep(4)
                await deployment.kill(deployment.one(role))

        await asyncio.gather(killer(), *(conversation(number) for number in range(6)))
        status = await deployment.router.status()
        assert not wrong and num_done == 24
        assert all((w.num_requests, w.num_tokens_queued) == (0, 0) for w in status.workers)


async def test_a_router_that_follows_the_stores_events_hits_and_outlives_the_store(
    deploy, prompt, small_model, small_reference
):
    async with deploy(model=small_model, extra_flags={"router": ("--store-events", "true")}) as deployment:
        await ask(deployment.router, prompt)
        longer = np.concatenate((prompt, prompt[:70]))
        output, last = await ask(deployment.router, longer)
        assert output == small_reference.generate(longer, 24) and last.usage.cache_hit_tokens == 960
        await deployment.kill(deployment.one("kvstore"))
        other = np.flip(prompt)
        assert (await asyncio.wait_for(ask(deployment.router, other), AT_MOST_S))[0] == small_reference.generate(
            other, 24
        )
