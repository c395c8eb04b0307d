"""A closed object's task ends, whatever the task does with a cancellation."""

import asyncio
import contextlib

import pytest

from antefix.blocking import LoopThread
from antefix.end_tasks import end_tasks
from antefix_billing.key_register import KeyRegister
from antefix_router.health import HealthWatch
from antefix_router.key_changes import KeyChanges
from antefix_router.merged_streams import merged
from tests.waiting import AT_MOST_S


class Forgetful:
    """Waits for ever and ignores the first `num` cancellations, like `wait_for` if its result comes just then."""

    def __init__(self, num=1):
        self.left = num
        self.began = asyncio.Event()
        self.ended = asyncio.Event()

    async def wait(self, *_, **__):
        try:
            while True:
                try:
                    self.began.set()
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    if not self.left:
                        raise
                    self.left -= 1
        finally:
            self.ended.set()


async def test_a_task_that_forgets_a_cancellation_is_told_again():
    forgetful = Forgetful(2)
    task = asyncio.create_task(forgetful.wait())
    await forgetful.began.wait()
    async with asyncio.timeout(AT_MOST_S):
        await end_tasks([task], again_s=0.01)
    assert task.cancelled()


async def test_a_task_that_has_ended_is_no_trouble():
    task = asyncio.create_task(asyncio.sleep(0))
    await task
    await end_tasks([task])
    await end_tasks([])
    assert task.done() and not task.cancelled()


async def test_keys_that_are_being_asked_for_do_not_hold_up_the_end(tmp_path, monkeypatch):
    forgetful = Forgetful()
    changes = KeyChanges(KeyRegister(), tmp_path / "keys")
    monkeypatch.setattr(changes, "look", forgetful.wait)
    changes.start()
    await forgetful.began.wait()
    async with asyncio.timeout(AT_MOST_S):
        await changes.close()
    assert forgetful.ended.is_set()


async def test_health_is_watched_to_the_end_of_workers_that_left_too(monkeypatch):
    staying, leaving = Forgetful(), Forgetful()
    watches = {"a": staying, "b": leaving}
    monkeypatch.setattr(HealthWatch, "_watch", lambda self, worker: watches[worker.address].wait())

    class Workers:
        def __init__(self, *addresses):
            self.workers = [type("Worker", (), {"address": address})() for address in addresses]

    health = HealthWatch(None)
    health.follow((Workers("a", "b"),))
    await staying.began.wait()
    await leaving.began.wait()
    health.follow((Workers("a"),))
    async with asyncio.timeout(AT_MOST_S):
        await health.close()
    assert staying.ended.is_set() and leaving.ended.is_set()


def test_a_blocking_client_closes_over_a_call_that_forgets(monkeypatch):
    monkeypatch.setattr("antefix.blocking._CLEANUP_S", 0.01)
    loop, made = LoopThread(), []

    async def begin():
        made.append(Forgetful())
        made.append(asyncio.create_task(made[0].wait()))
        await made[0].began.wait()

    loop.run(begin())
    loop.close()
    assert made[1].cancelled() and not loop.is_open


@pytest.mark.parametrize("num_read", [0, 1])
async def test_streams_that_fail_as_they_are_cut_off_do_not_hold_up_the_reader(num_read):
    """The reader has stopped, and the queue to it is full."""

    async def stream(number):
        try:
            yield number
            yield number
            await asyncio.Event().wait()
        finally:
            raise ConnectionError("cut off")

    outputs = merged([stream(number) for number in range(3)])
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(AT_MOST_S):
            async for _ in outputs:
                if not num_read:
                    break
                num_read -= 1
            for _ in range(10):
                await asyncio.sleep(0)
            await outputs.aclose()
    async with asyncio.timeout(AT_MOST_S):
        await outputs.aclose()
