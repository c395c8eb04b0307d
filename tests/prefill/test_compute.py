"""Cancelling a request never leaves work running on memory that was given back."""

import asyncio
import threading

import pytest

from antefix_prefill.worker.compute_thread import ComputeThread, uninterrupted


async def test_cancellation_waits_for_the_work_in_hand():
    thread, running, let_go, finished = ComputeThread("test"), threading.Event(), threading.Event(), []

    def work():
        running.set()
        let_go.wait(10)
        finished.append(True)

    task = asyncio.create_task(thread.run(work))
    await asyncio.to_thread(running.wait, 10)
    for _ in range(3):  # a second and third cancellation must not get through either
        task.cancel()
        await asyncio.sleep(0)
    assert not task.done()
    let_go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert finished == [True]
    thread.close()


async def test_an_error_of_the_work_reaches_the_caller():
    async def fails():
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        await uninterrupted(fails())
