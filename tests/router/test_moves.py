"""A request that failed on every decode worker waits, within its bound, for one that answers. Time is simulated."""

import asyncio
import contextlib
import random

import numpy as np
import pytest

from antefix.clients import DecodeClient
from antefix.clients.decode import Decoded
from antefix.errors import InternalError, NotFinite, Overloaded, StepFailed, Unavailable
from antefix.generation_request import GenerationRequest
from antefix.pulse import LAST_PATIENCE_S, Pulse
from antefix.sampling import Sampling
from antefix.secret import Keyring
from antefix_router.generation import Generation, Generator
from antefix_router.naming import PromptNames
from antefix_router.placement.directory import Directory
from antefix_router.placement.moves import Moves
from antefix_router.placement.policy import make_policy
from antefix_router.placement.sessions import Sessions
from antefix_router.placement.work import Work
from antefix_router.placement.workers import Worker, WorkerRole, Workers
from antefix_router.prefilling import Ready
from tests.histories.simulated_loop import SimulatedLoop, simulated

FINGERPRINT = bytes(32)
FOREVER = 1e9


class Peer(DecodeClient):
    """A decode worker.  silent, gone: (start, end) by the loop's clock.  num_calls: the number of calls so far."""

    def __init__(self, *, silent=(FOREVER, FOREVER), gone=(FOREVER, FOREVER), error=None):
        self.silent, self.gone, self.error, self.num_calls = silent, gone, error, 0

    async def ask(self):
        now = asyncio.get_running_loop().time()
        if self.gone[0] <= now < self.gone[1]:
            raise Unavailable("connection refused")
        if self.silent[0] <= now < self.silent[1]:
            # The worker reads the request when it continues.
            await asyncio.sleep(self.silent[1] - now)

    async def decode(self, request, sampling, *, emitted, **_):
        self.num_calls += 1
        for number in range(len(emitted), sampling.max_tokens):
            await asyncio.sleep(0.1)
            await self.ask()
            if self.error is not None:
                raise self.error
            reason = "length" if number + 1 == sampling.max_tokens else ""
            yield Decoded(tokens=np.array([number], np.uint32), finish_reason=reason)


class NoPrefill:
    """A prefill stage that leaves every prompt to decode workers."""

    tokens_per_s = 1000.0

    def __init__(self, *, has_failed=False):
        self.has_failed = has_failed

    def left_to_decode(self, ready):
        return contextlib.nullcontext()

    async def run(self, request, prompt, *, timeout_s):
        work = Work(num_tokens=len(request.tokens), stored_tokens=0, affinity=0)
        return Ready(answer=None, work=work, has_failed=self.has_failed)


class NoPins:
    def pin(self, *_, **__):
        pass


def simulate(make):
    """Run the coroutine of `make()` in simulated time."""
    rng = random.Random(5)
    loop = SimulatedLoop(rng)
    try:
        with simulated(loop, rng):
            return loop.run_until_complete(make())
    finally:
        asyncio.set_event_loop(None)
        loop.close()


@contextlib.asynccontextmanager
async def deployment(*peers, prefill_failed=False):
    """Workers with pulses, and a function that runs a request of 8 tokens and returns the tokens and the time."""
    clock = asyncio.get_running_loop().time
    workers = Workers(WorkerRole.DECODE, make_policy("least_work"))
    for number, peer in enumerate(peers):
        worker = Worker(address=f"d:{number}", role=WorkerRole.DECODE, client=peer, seed=number)
        worker.pulse = Pulse(worker.address, peer.ask, clock=clock)
        worker.pulse.start()
        workers.add(worker)
    names = PromptNames(fingerprint=FINGERPRINT, keyring=Keyring(b"secret of a test"), block_size=64)
    generator = Generator(NoPrefill(has_failed=prefill_failed), workers, names, Directory(), NoPins(), Sessions())

    async def run(timeout_s=600.0):
        begun, found = clock(), []
        request = GenerationRequest(tokens=np.arange(100, dtype=np.uint32), sampling=Sampling(max_tokens=8))
        generation = Generation(request)
        try:
            async for piece in generator.run(generation, timeout_s):
                found += piece.tokens.tolist()
        except (Unavailable, InternalError, Overloaded) as err:
            return type(err), clock() - begun
        return found, clock() - begun

    try:
        await asyncio.sleep(5.0)
        yield workers, run
    finally:
        for worker in workers.workers:
            await worker.pulse.close()
    assert all(worker.num_requests == 0 for worker in workers.workers)


def asked(*peers, timeout_s=600.0, after_s=0.0, prefill_failed=False):
    async def one():
        async with deployment(*peers, prefill_failed=prefill_failed) as (_, run):
            await asyncio.sleep(after_s)
            return await run(timeout_s)

    return simulate(one)


@pytest.mark.parametrize("after_s", [0.0, 1.0, 1.9])
@pytest.mark.parametrize("begun_s", [4.0, 5.35])
def test_with_one_worker_gone_and_one_silent_for_seconds_a_request_waits(begun_s, after_s):
    """The request waits before its first token, or between two tokens."""
    peers = Peer(gone=(4.0, FOREVER)), Peer(silent=(begun_s, begun_s + 3.5))
    found, took_s = asked(*peers, after_s=after_s)
    assert found == list(range(8))
    assert took_s < 3.5 + 8 * 0.1 + 2.0


def test_a_worker_that_is_started_again_has_the_request_again():
    """The only worker is restarted; or both workers are, one after the other."""
    assert asked(Peer(gone=(5.35, 9.0)))[0] == list(range(8))
    assert asked(Peer(gone=(5.35, 9.0)), Peer(gone=(5.25, 12.0)))[0] == list(range(8))


def test_the_wait_ends_at_its_bound_or_the_requests():
    gone = {"gone": (4.0, FOREVER)}
    error, took_s = asked(Peer(**gone), Peer(**gone))
    assert error is Unavailable and took_s == pytest.approx(LAST_PATIENCE_S, abs=1.5)
    error, took_s = asked(Peer(**gone), Peer(**gone), timeout_s=3.0)
    assert error is Unavailable and took_s == pytest.approx(3.0, abs=1.0)


@pytest.mark.parametrize("error", [Overloaded("full"), InternalError("a bug"), Unavailable("its store is down")])
def test_nobody_waits_for_workers_that_answer_and_fail(error):
    peers = Peer(error=error), Peer(error=error)
    kind, took_s = asked(*peers)
    assert kind is type(error) and took_s < 2.0
    assert [peer.num_calls for peer in peers] == [1, 1]


@pytest.mark.parametrize("error", [StepFailed("a step failed"), NotFinite("NaN"), InternalError("a bug")])
def test_a_request_whose_steps_fail_is_tried_on_one_other_worker(error):
    """It may make every worker fail. A worker that dies or is full is another matter."""
    peers = [Peer(error=error) for _ in range(4)]
    kind, _ = asked(*peers)
    assert kind is type(error) and sum(peer.num_calls for peer in peers) == 2
    assert asked(Peer(error=error), Peer())[0] == list(range(8))
    peers = [Peer(error=Unavailable("its store is down")) for _ in range(4)]
    asked(*peers)
    assert sum(peer.num_calls for peer in peers) == 3


@pytest.mark.parametrize("error", [StepFailed("a step failed"), NotFinite("NaN"), InternalError("a bug")])
def test_a_request_whose_prefill_failed_is_tried_on_one_decode_worker(error):
    peers = [Peer(error=error) for _ in range(3)]
    kind, _ = asked(*peers, prefill_failed=True)
    assert kind is type(error) and sum(peer.num_calls for peer in peers) == 1
    assert asked(Peer(), prefill_failed=True)[0] == list(range(8))
    # A worker that dies is another matter.
    assert asked(Peer(error=Unavailable("killed")), Peer(), prefill_failed=True)[0] == list(range(8))


def test_a_worker_that_comes_and_goes_is_not_tried_for_ever():
    peer = Peer(error=Unavailable("it falls over"))

    async def one():
        async with deployment(peer) as (workers, run):
            task = asyncio.create_task(run())
            while not task.done():
                workers.workers[0].pulse.num_returns += 1
                await asyncio.sleep(0.05)
            return await task

    kind, took_s = simulate(one)
    assert kind is Unavailable and took_s < LAST_PATIENCE_S
    assert peer.num_calls == 4


def test_a_worker_that_joins_meanwhile_is_taken():
    first, second = Peer(gone=(4.0, FOREVER)), Peer()

    async def one():
        async with deployment(first) as (workers, run):
            task = asyncio.create_task(run())
            await asyncio.sleep(4.0)
            # A lease announces another process at the same address.
            await workers.workers[0].pulse.close()
            workers.leave("d:0")
            workers.add(Worker(address="d:0", role=WorkerRole.DECODE, client=second, seed=1))
            workers.workers[0].pulse = Pulse("d:0", second.ask, clock=asyncio.get_running_loop().time)
            workers.workers[0].pulse.start()
            return await task

    found, _ = simulate(one)
    assert found == list(range(8)) and (first.num_calls, second.num_calls) == (1, 1)


async def test_without_pulses_nobody_waits():
    workers = Workers(WorkerRole.DECODE, make_policy("least_work"), ["a:1"])
    moves = Moves(workers)
    moves.note(workers.workers[0])
    assert not await moves.may_go_on(Unavailable("gone"), "request r")
