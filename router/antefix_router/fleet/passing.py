"""Runs requests on the engines of a fleet: places each request, passes it on, and tries another worker if the first
fails before the client has received anything. If all workers have failed, the request waits for a worker that answers
again. The worker generates the answer; this module only counts and compares.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable
from typing import Final

import numpy as np

from antefix.errors import AntefixError, InternalError, Overloaded, Unavailable
from antefix.prompt_marks import marks_of
from antefix.telemetry import span
from antefix_router.fleet.engines import engine_of
from antefix_router.fleet.fleet_placing import FleetPlacing, Placed
from antefix_router.fleet.passed_call import PassedGeneration
from antefix_router.generation import Generation, OutputPiece
from antefix_router.naming import NamedPrompt
from antefix_router.placement.moves import Moves
from antefix_router.placement.workers import LoadPart, WorkerRole, Workers

log = logging.getLogger("antefix.fleet")

_NO_TOKENS: Final = np.empty(0, np.uint32)


class Passing:
    """Runs the requests of one router."""

    def __init__(
        self,
        placing: FleetPlacing,
        workers: Workers,
        *,
        on_named: Callable[[NamedPrompt], None] = lambda prompt: None,
    ) -> None:
        """on_named: called with each prompt after its blocks were named, in one of the block sizes."""
        self._placing = placing
        self._workers = workers
        self._on_named = on_named

    async def run(self, generation: Generation, timeout_s: float) -> AsyncGenerator[OutputPiece, None]:
        """The answer, which is put into the generation's `events` or `answer`. Each yielded piece is empty, and only
        signals that there is more output.

        Raises:  the error of the last worker that was tried.
        """
        assert isinstance(generation, PassedGeneration)
        ends = time.monotonic() + timeout_s
        # 1. Name the prompt's blocks in each block size that the fleet's engines use.
        prompts = self._placing.named(generation.call)
        if not prompts:
            self._placing.counters.num_unnamed += 1
        for prompt in list(prompts.values())[:1]:
            self._on_named(prompt)
        moves = Moves(self._workers, lambda worker: engine_of(worker).serves(generation.call.model))
        failed: AntefixError | None = None
        while True:
            # 2. Place.
            with span("place", role="foreign", attempt=len(moves.tried) + 1) as placing:
                try:
                    tried = frozenset(moves.tried)
                    placed = self._placing.place(generation.call, prompts, self._session(generation), tried)
                except (Unavailable, Overloaded) as err:
                    # The last worker's error says more than that none is left.
                    raise failed or err from err
                placing.set(worker=placed.worker.address)
            self._workers.num_placed["again" if tried else "first"] += 1
            moves.note(placed.worker)
            self._note(generation, placed, prompts)
            # 3. Pass the request on, and the answer back.
            try:
                async with contextlib.aclosing(self._call(generation, placed, prompts, ends)) as pieces:
                    async for piece in pieces:
                        generation.has_given = True
                        yield piece
                break
            except (Unavailable, InternalError, Overloaded) as err:
                request_id = f"request {generation.request.request_id}"
                if generation.has_given or not await moves.may_go_on(err, request_id, _left_s(ends)):
                    raise
                log.warning("%s is sent to another worker because the first one failed: %s", request_id, err)
                failed = err
        # 4. Compare the expected hit with the reported one.
        self._compare(generation, placed)

    def _note(self, generation: PassedGeneration, placed: Placed, prompts: dict[int, NamedPrompt]) -> None:
        generation.worker, generation.expected = placed.worker.address, placed.expected
        tenant, session = self._session(generation)
        self._placing.sessions.note(tenant, session, WorkerRole.FOREIGN, placed.worker.address)
        # All records use one block size, whatever the worker's, so that they can be compared.
        for prompt in list(prompts.values())[:1]:
            generation.prompt_marks = marks_of(prompt.chain.hashes)

    async def _call(
        self, generation: PassedGeneration, placed: Placed, prompts: dict[int, NamedPrompt], ends: float
    ) -> AsyncGenerator[OutputPiece, None]:
        call, worker = generation.call, placed.worker
        own = max(1, call.num_prompt_tokens - placed.expected.here)
        prompt = prompts.get(placed.expected.block_size)
        with (
            self._workers.load(worker, own, num_active_tokens=call.num_prompt_tokens) as part,
            self._placing.flying(prompt, placed) as landed,
        ):
            if not call.stream:
                generation.take_answer(await placed.engine.door.whole(call.path, dict(call.body), _left_s(ends)))
                self._first(generation, part, landed, prompt, placed)
                yield OutputPiece(0, _NO_TOKENS)
                return
            events = placed.engine.door.events(call.path, dict(call.body), _left_s(ends))
            async with contextlib.aclosing(events):
                async for data in events:
                    self._first(generation, part, landed, prompt, placed)
                    generation.take_piece(data)
                    yield OutputPiece(0, _NO_TOKENS)

    def _first(
        self,
        generation: PassedGeneration,
        part: LoadPart,
        landed: contextlib.ExitStack,
        prompt: NamedPrompt | None,
        placed: Placed,
    ) -> None:
        """The prompt is computed, so its worker is free for the next prompt."""
        if generation.ttft_s:
            return
        if generation.call.stream:
            # A complete answer does not show when its first token came.
            generation.ttft_s = time.perf_counter() - generation.started
            part.computed()
        self._placing.computed(placed, prompt)
        landed.close()

    def _session(self, generation: PassedGeneration) -> tuple[str, str]:
        caller = generation.request.caller
        return caller.cache_tenant, caller.session

    def _compare(self, generation: PassedGeneration, placed: Placed) -> None:
        hits, said = placed.engine.hits, generation.reported
        hits.num_answers += 1
        if said is None or said.cached_tokens is None:
            hits.num_unreported += 1
            return
        known = generation.expected
        if known.is_named and known.num_tokens != said.prompt_tokens:
            hits.num_other_prompts += 1
        hits.expected += known.here
        hits.reported += said.cached_tokens
        hits.lost += max(0, known.here - said.cached_tokens)
        hits.found += max(0, said.cached_tokens - known.here)


def _left_s(ends: float) -> float:
    return max(0.001, ends - time.monotonic())
