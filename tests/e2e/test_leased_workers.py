"""A router without configured workers finds all workers by their leases in Redis, as they start, die and leave."""

import signal

from antefix.errors import Unavailable
from antefix_router.placement.workers import WorkerRole
from tests.waiting import until


async def test_workers_are_found_by_leases_as_they_come_die_and_leave(
    deploy, redis, ask, document, small_model, small_reference
):
    leased, found = ("--lease-redis", redis.url), ("--prefill", redis.url, "--decode", redis.url)
    flags = {"prefill": ("--pool-bytes", "64M", *leased), "decode": ("--pool-bytes", "64M", *leased), "router": found}
    async with deploy(model=small_model, extra_flags=flags) as deployment:

        async def known(role=WorkerRole.DECODE):
            return {worker.address for worker in (await deployment.router.status()).workers if worker.role == role}

        def are(*processes):
            async def same():
                return await known() == {process.address for process in processes}

            return same

        async def answers(start):
            prompt = document[start : start + 300]
            # A worker that renews its lease too late on a busy machine is missing for a moment.
            output, _ = await until(lambda: ask(deployment, prompt), "a worker is known", despite=Unavailable)
            assert output == small_reference.generate(prompt, 24)

        # 1. The router's settings name no workers.
        first, prefill = deployment.one("decode"), deployment.one("prefill")
        await until(are(first))
        await answers(0)
        await until(lambda: known(WorkerRole.PREFILL))
        assert await known(WorkerRole.PREFILL) <= {prefill.address}
        # 2. Another worker comes. The first one dies without leaving, and its lease expires.
        second = await deployment.start_worker("decode")
        await until(are(first, second))
        await deployment.kill(first)
        await answers(300)
        await until(are(second))
        # 3. A worker that is told to stop removes its lease, and its successor gets the work.
        third = await deployment.start_worker("decode")
        await until(are(second, third))
        second.process.send_signal(signal.SIGTERM)
        await until(are(third))
        await answers(600)
