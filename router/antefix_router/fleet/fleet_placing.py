"""Chooses the worker for each request of a fleet, by the blocks that each engine holds of the prompt, by load, and by
the policy.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from antefix.errors import Overloaded
from antefix.events.kv_events import MEDIA
from antefix_router.fleet.engines import Engine, Engines, engine_of
from antefix_router.fleet.fleet_config import FleetConfig
from antefix_router.fleet.fleet_names import FleetNames
from antefix_router.fleet.passed_call import Expected, PassedCall
from antefix_router.inflight import InFlight
from antefix_router.naming import NamedPrompt
from antefix_router.placement.directory import Directory
from antefix_router.placement.sessions import Sessions
from antefix_router.placement.work import Work
from antefix_router.placement.workers import Worker, WorkerRole, Workers


@dataclass(slots=True, eq=False)
class _Flight:
    """A prompt that is being computed.  address: the worker that computes it."""

    address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A worker as placement sees it for one prompt. All counts are tokens. here: tokens that may hit at the worker.
    leading: leading tokens that the worker holds. media: tokens that the worker holds in each medium, nearest first.
    """

    worker: Worker
    engine: Engine
    block_size: int
    here: int = 0
    leading: int = 0
    media: tuple[tuple[str, int], ...] = ()

    @property
    def far(self) -> int:
        """How many of the hit's tokens the worker must load from a slower medium of its own."""
        return max(0, self.here - self.media[0][1]) if self.media else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """The worker that a request goes to, and the hit that is expected there."""

    worker: Worker
    engine: Engine
    expected: Expected
    candidates: tuple[Candidate, ...]


@dataclass(slots=True)
class PassingCounters:
    """Counts of requests since the router started. num_unnamed: placed without knowing their tokens. num_full: refused
    because all workers were full. num_late: refused because the first token would have come too late.
    """

    num_unnamed: int = 0
    num_full: int = 0
    num_late: int = 0


class FleetPlacing:
    """Places the requests of one router. sessions: the worker of each conversation's last request."""

    def __init__(
        self, config: FleetConfig, engines: Engines, workers: Workers, directory: Directory, names: FleetNames
    ) -> None:
        self.counters = PassingCounters()
        self.sessions = Sessions()
        self._config = config
        self._engines = engines
        self._workers = workers
        self._directory = directory
        self._names = names
        self._in_flight: InFlight[_Flight] = InFlight()

    def named(self, call: PassedCall) -> dict[int, NamedPrompt]:
        """The names of the prompt's blocks, by block size; empty if its tokens are not known."""
        if call.tokens is None:
            return {}
        return {size: self._names.prompt(call.tokens, call.scope, size) for size in self._engines.block_sizes}

    def place(
        self, call: PassedCall, prompts: dict[int, NamedPrompt], session: tuple[str, str], tried: frozenset[str]
    ) -> Placed:
        """Choose a worker. Raises: Unavailable: no worker is left. Overloaded: all workers are full, or the first token
        would come too late.
        """
        serving = [worker for worker in self._workers.workers if engine_of(worker).serves(call.model)]
        workers = self._workers.fit(serving, tried)
        room = [worker for worker in workers if worker.num_requests < self._config.worker_requests_max]
        if not room:
            self.counters.num_full += 1
            raise Overloaded(
                f"{self._config.worker_requests_max} requests run at each worker, which is the limit", retry_after_s=1.0
            )
        candidates = tuple(self._candidate(worker, prompts) for worker in room)
        best = max(candidates, key=lambda each: each.here)
        work, soon = self._work(call, prompts, best), self._soon(prompts)
        chosen = self._workers.choose(
            room,
            work,
            np.array([each.here for each in candidates], np.int64),
            far_tokens=np.array([each.far for each in candidates], np.int64),
            hint=self.sessions.last(*session, WorkerRole.FOREIGN),
            soon=soon,
        )
        at = candidates[room.index(chosen)]
        self._admit(chosen, work.num_tokens - at.here)
        return Placed(
            worker=chosen,
            engine=at.engine,
            expected=self._expected(at, best, prompts),
            candidates=candidates,
        )

    def _candidate(self, worker: Worker, prompts: dict[int, NamedPrompt]) -> Candidate:
        engine = engine_of(worker)
        size = self._engines.block_size(engine)
        if (prompt := prompts.get(size)) is None:
            return Candidate(worker=worker, engine=engine, block_size=size)
        index, most = engine.index, (len(prompt.tokens) - 1) // size
        held = [int(num) for num in self._directory.leading([index.address, *index.media], prompt.keys)]
        here = index.num_usable(min(held[0], most), prompt.keys)
        media = tuple((medium, num * size) for medium, num in zip(MEDIA, held[1:], strict=True)) if engine.tells else ()
        return Candidate(
            worker=worker, engine=engine, block_size=size, here=here * size, leading=held[0] * size, media=media
        )

    def _work(self, call: PassedCall, prompts: dict[int, NamedPrompt], best: Candidate) -> Work:
        if (prompt := prompts.get(best.block_size)) is not None:
            return prompt.work(None, known_tokens=best.here)
        return Work(num_tokens=max(1, call.num_prompt_tokens), stored_tokens=None, affinity=call.affinity)

    def _soon(self, prompts: dict[int, NamedPrompt]) -> tuple[str, int] | None:
        """The worker that is computing a beginning of this prompt for another request, and how many tokens of it."""
        found = [(self._in_flight.find(prompt.keys, 0), size) for size, prompt in prompts.items()]
        known = [(flight.address, num_blocks * size) for each, size in found if each for flight, num_blocks in (each,)]
        return max(known, key=lambda each: each[1], default=None)

    def _admit(self, worker: Worker, num_tokens: int) -> None:
        rate = worker.backlog.tokens_per_s
        if not rate or not worker.num_requests:
            return
        ttft_s = (worker.backlog.pending_tokens(time.monotonic()) + num_tokens) / rate
        most = self._config.ttft_s_max
        if ttft_s > most:
            self.counters.num_late += 1
            raise Overloaded(
                f"the first token would take {ttft_s:.1f} s, more than {most:g} s",
                retry_after_s=min(ttft_s - most, most),
            )

    def _expected(self, at: Candidate, best: Candidate, prompts: dict[int, NamedPrompt]) -> Expected:
        prompt = prompts.get(at.block_size)
        keys = prompt.keys if prompt is not None else ()
        first_missed = best.here // at.block_size
        return Expected(
            here=at.here,
            best=best.here,
            block_size=at.block_size,
            num_tokens=0 if prompt is None else len(prompt.tokens),
            is_named=prompt is not None,
            was_evicted=first_missed < len(keys) and keys[first_missed] in self._engines.gone,
        )

    @contextlib.contextmanager
    def flying(self, prompt: NamedPrompt | None, placed: Placed) -> Iterator[contextlib.ExitStack]:
        """While the prompt is computed, let prompts with the same beginning find the worker that computes it."""
        with contextlib.ExitStack() as landed:
            if prompt is not None:
                known = placed.expected.here // placed.expected.block_size
                claimed = self._in_flight.lead(_Flight(placed.worker.address), prompt.keys, known)
                landed.callback(self._in_flight.end, claimed)
            yield landed

    def computed(self, placed: Placed, prompt: NamedPrompt | None) -> None:
        """From now on, the worker counts as holding the prompt. For a worker with events the placement is not recorded,
        because its events report the blocks.
        """
        if prompt is not None:
            self._directory.guess(placed.worker.address, prompt.keys)
