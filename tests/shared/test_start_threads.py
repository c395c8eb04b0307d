"""A service has all of its pools' threads from its start, as many as the cores that it may use suggest."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from antefix.start_threads import start_threads, with_threads


def num_named(name):
    return sum(thread.name.startswith(name) for thread in threading.enumerate())


def test_a_pool_has_all_of_its_threads_before_its_first_job():
    with ThreadPoolExecutor(5, thread_name_prefix="all-at-once") as pool:
        start_threads(pool, 5)
        assert num_named("all-at-once") == 5
        assert pool.submit(lambda: 7).result() == 7
        assert num_named("all-at-once") == 5


def test_a_thread_that_the_system_refuses_is_started_later(monkeypatch):
    with ThreadPoolExecutor(2, thread_name_prefix="refused") as pool:
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", refuse)
            start_threads(pool, 2)
        assert num_named("refused") == 0
        assert pool.submit(lambda: 7).result() == 7


def refuse(_):
    raise RuntimeError("can't start new thread")


@pytest.mark.parametrize(("cores", "num_threads"), [(3, 7), (200, 32)])
def test_the_default_pool_follows_the_cores_that_this_process_may_use(monkeypatch, cores, num_threads):
    monkeypatch.setattr("antefix.start_threads.usable_cores", lambda: cores)

    async def work():
        # Other event loops of this process may have threads of the same name.
        threads = asyncio.get_running_loop()._default_executor._threads
        before = set(threads)
        await asyncio.to_thread(int)
        return before, set(threads)

    before, after = asyncio.run(with_threads(work()))
    assert before == after and len(after) == num_threads
    assert not any(thread.is_alive() for thread in after)
