"""Continuous batching: each step runs one token of every sequence that can take one, or two where one was drafted.

    join -> [step: grow, run, choose, emit, store finished blocks; the same for drafted tokens that are right]* -> leave

Sequences join and leave between steps. A client that does not read delays only its own sequence: the sequence's bounded
queue fills up, and the sequence skips steps. If several tenants have sequences here, their shares limit how many take
part in a step (`step_shares`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextvars import Context
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from antefix.errors import AntefixError, Overloaded, StepFailed
from antefix.fair_turns import FairTurns
from antefix.keep_running import keep_running
from antefix.model import Sequence, WindowState
from antefix.model.finite import are_numbers
from antefix.model.step_counters import StepCounters
from antefix.wire import TokenLogprob
from antefix_decode.card_choice import Choice
from antefix_decode.logprobs import Logprobs
from antefix_decode.step import ChosenStep, chooses_on_card, keep_drafted, run_and_choose, run_step
from antefix_decode.step_shares import Place, StepShares
from antefix_decode.stopping import Stopper
from antefix_decode.store_output import store_end, store_token
from antefix_decode.token_choice import Sampler
from antefix_prefill.record_writer import RecordWriter
from antefix_prefill.restore import Prompt
from antefix_prefill.run_prompt import grow, not_finite
from antefix_prefill.worker.compute_thread import uninterrupted
from antefix_prefill.worker.engine import Engine

log = logging.getLogger("antefix.decode")

Step = TypeVar("Step")
RunStep = Callable[[Engine, list[tuple[Sequence, int, bool]]], list[Step]]

# How many unread tokens a client may have before its sequence pauses.
NUM_UNREAD_MAX = 256
# For every 8 places there is one more, for tenants that have no place.
_EXTRA_OF = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class VisibleTokens:
    """Tokens that may be shown now. logprobs: one per token, if log probabilities were requested."""

    tokens: list[int]
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(slots=True, eq=False)
class Running:
    """One sequence being generated. `next_token` has been chosen but not run; `prompt.chain` grows with the output.

    Compared by identity: two sequences with equal fields are different sequences.
    """

    prompt: Prompt
    sequence: Sequence
    sampler: Sampler
    stopper: Stopper
    writer: RecordWriter
    next_token: int
    prompt_tokens: int
    logprobs: Logprobs = field(default_factory=Logprobs)
    unread: asyncio.Queue[VisibleTokens | AntefixError | None] = field(default_factory=asyncio.Queue)
    boundary_window: WindowState | None = None
    done: bool = False
    place: Place = field(default_factory=Place)
    last_step: int = 0

    @property
    def can_run(self) -> bool:
        return not self.done and self.unread.qsize() < NUM_UNREAD_MAX


class Scheduler:
    """Owns the decode loop of one worker."""

    def __init__(self, engine: Engine, num_running_max: int, num_waiting_max: int = 0) -> None:
        self._engine = engine
        # Extra places: without them, a tenant without a place would wait until some other tenant's long answer ends.
        self._turns = FairTurns(num_running_max, num_waiting_max, num_extra=num_running_max // _EXTRA_OF)
        self.shares = StepShares()
        self._running: list[Running] = []
        self._wake = asyncio.Event()
        self._step_lock = asyncio.Lock()
        # The sequences of the running step.
        self._stepping: list[Running] = []
        self._task: asyncio.Task[None] | None = None
        self.num_tokens = 0
        self.num_drafted = 0
        self.num_drafts_kept = 0
        self.busy_s = 0.0
        self._began = 0.0
        self._repaid_s: float | None = None

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_placed(self) -> int:
        """How many requests have a place, whether they already generate or not."""
        return self._turns.num_running

    @property
    def num_waiting(self) -> int:
        return self._turns.num_waiting

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.busy_s if self.busy_s else 0.0

    @property
    def step_counters(self) -> StepCounters | None:
        """Counters of steps on a GPU; None where a batch does not share launches."""
        runner = self._engine.ops.step_runner
        return None if runner is None else runner.counters

    @contextlib.asynccontextmanager
    async def place(self, tenant: str = "", num_tokens: int = 0, share: int = 1) -> AsyncIterator[Place]:
        """Hold a place from the beginning of a request, because many requests may be loading before the first one joins
        the batch. If no place is free, waits for one; tenants take turns.

        num_tokens: the most that the request may generate.  share: the tenant's share relative to other tenants'
        shares.

        Raises:  Overloaded: all places are taken, and as many requests wait as may wait.
        """
        async with self._turns.turn(tenant, float(num_tokens), share=share):
            place = Place(tenant=tenant, share=share)
            self.shares.enter(place)
            try:
                yield place
            finally:
                self.shares.leave(place)

    def join(self, running: Running) -> None:
        """Add a sequence; it takes part from the next step on. The caller must call `leave` in every case."""
        running.place.is_loading = False
        self._running.append(running)
        self._wake.set()
        if self._task is None:
            # A new context, because the loop works for all requests and must not log under the id of one.
            self._task = keep_running(self._loop, "the decode loop", failed=self._fail_all, context=Context())

    async def leave(self, running: Running) -> None:
        """Remove a sequence and free its blocks. If the sequence takes part in the running step, the call waits for the
        step, which is using the blocks.
        """
        running.done = True
        # If the caller is cancelled again here, the blocks must still be freed.
        await uninterrupted(self._leave(running))

    async def _leave(self, running: Running) -> None:
        if running in self._running:
            self._running.remove(running)
        if running in self._stepping:
            async with self._step_lock:
                pass
        table, running.sequence.block_table = running.sequence.block_table, []
        is_written = True
        try:
            is_written = await running.writer.flush_in_time()
        finally:
            if is_written:
                self._engine.blocks.release(table)
        if not is_written:
            running.writer.when_over(lambda: self._engine.blocks.release(table))

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def tokens(self, running: Running) -> AsyncIterator[VisibleTokens]:
        """Tokens that may be shown, until the output has ended.

        Raises:  Overloaded: the pool had no room for another token.  AntefixError: the step failed.
        """
        while (item := await running.unread.get()) is not None:
            if isinstance(item, AntefixError):
                raise item
            self._wake.set()  # the sequence may have been paused because its client did not read
            yield item

    async def _loop(self) -> None:
        while True:
            self._wake.clear()
            async with self._step_lock:
                able = [running for running in self._running if running.can_run]
                computing = self._engine.compute.chunk_tenants
                batch = self.shares.choose(able, computing) if able else []
                self._repaid_s = self.shares.repaid_s(batch, computing)
                self._engine.compute.stepping_for({each.place.tenant: each.place.share for each in batch})
                self._stepping = batch
                try:
                    if batch:
                        await self._step(batch)
                finally:
                    self._stepping = []
            if batch:
                await asyncio.sleep(0)  # let sequences join and leave, and tokens go out
                self.shares.observe(len(batch), time.perf_counter() - self._began)
            else:
                await self._wake.wait()

    def _fail_all(self, err: Exception) -> None:
        """After an unexpected error nobody knows which sequences it left in the middle of a step."""
        for running in self._running:
            if not running.done:
                _fail(running, step_failed(err))

    async def _step(self, batch: list[Running]) -> None:
        engine = self._engine
        started = time.perf_counter()
        # 1. Reserve room for one more token each, and for a drafted one if possible. A sequence without room fails.
        ready = [running for running in batch if self._grow(running)]
        if not ready:
            return
        if chooses_on_card(engine):
            self.num_tokens += await self._step_on_card(ready)
            self.busy_s += time.perf_counter() - started
            return
        # 2. Run the tokens.
        items = [(r.sequence, r.next_token, self._has_room_to_draft(r)) for r in ready]
        ready, steps = await self._run_together(ready, items, run_step)
        if not ready:
            return
        # 3. Store finished blocks, choose the next tokens, give out those that may be shown.
        for running, step in zip(ready, steps, strict=True):
            await self._finish_step(running, step.logits[0])
        # 4. Drafted tokens that were chosen have been run already: do step 3 for them too.
        right = [(r, step) for r, step in zip(ready, steps, strict=True) if not r.done and step.drafted == r.next_token]
        if right:
            await engine.compute.run(keep_drafted, engine, [(r.sequence, step) for r, step in right])
        for running, step in right:
            await self._finish_step(running, step.logits[1])
        self.num_drafted += sum(step.drafted is not None for step in steps)
        self.num_drafts_kept += len(right)
        self.num_tokens += len(ready) + len(right)
        self.busy_s += time.perf_counter() - started

    async def _step_on_card(self, ready: list[Running]) -> int:
        """Like `_step`, but tokens are chosen on the GPU. Returns how many tokens were generated."""
        items = [(r.sequence, r.next_token, False) for r in ready]
        choosers = {id(r.sequence): (r.sampler, r.logprobs.num_top) for r in ready}

        def run(engine: Engine, items: list[tuple[Sequence, int, bool]]) -> list[ChosenStep]:
            return run_and_choose(engine, items, [choosers[id(sequence)] for sequence, _, _ in items])

        ready, steps = await self._run_together(ready, items, run)
        for running, step in zip(ready, steps, strict=True):
            await self._finish_step(running, step.choice)
        return len(ready)

    async def _run_together(
        self, ready: list[Running], items: list[tuple[Sequence, int, bool]], run: RunStep[Step]
    ) -> tuple[list[Running], list[Step]]:
        """The sequences whose step has run, and their steps. If the batch fails, each sequence runs alone, so that only
        the faulty one fails.
        """
        positions = [running.sequence.position for running in ready]
        try:
            return ready, await self._engine.compute.run_step(self._repaid_s, self._run_step, run, items)
        except Exception as err:
            log.exception("a decode step of %d sequences failed", len(ready))
            if len(ready) == 1:
                _fail(ready[0], step_failed(err))
                return [], []
        able: list[Running] = []
        steps: list[Step] = []
        for running, item, position in zip(ready, items, positions, strict=True):
            if running.sequence.position != position:
                # Its state advanced before another sequence failed, so the logits after its token are lost.
                _fail(running, step_failed(None))
                continue
            one, step = await self._run_together([running], [item], run)
            able, steps = able + one, steps + step
        return able, steps

    def _run_step(self, run: RunStep[Step], items: list[tuple[Sequence, int, bool]]) -> list[Step]:
        """Runs in the compute thread. Time that is spent waiting for the compute thread does not count as the step's
        time.
        """
        self._began = time.perf_counter()
        return run(self._engine, items)

    async def _finish_step(self, running: Running, found: npt.NDArray[np.float32] | Choice | AntefixError) -> None:
        """found: the step's result for this sequence: logits, the token that was chosen from them, or an error."""
        try:
            if isinstance(found, AntefixError):
                raise found
            if isinstance(found, Choice):
                await self._take_choice(running, found)
            else:
                await self._take_token(running, found)
        except AntefixError as err:
            _fail(running, err)  # for example an error of its grammar
        except Exception as err:
            # The loop must continue: if it ended, every sequence of this worker would wait for ever.
            log.exception("a sequence failed after its decode step")
            _fail(running, step_failed(err))

    async def _take_token(self, running: Running, logits: npt.NDArray[np.float32]) -> None:
        if not are_numbers(logits):
            raise not_finite(running.sequence.position)
        await store_token(self._engine, running, running.next_token)
        token = running.sampler.choose(logits, running.sequence.position)
        running.logprobs.push(logits, token)
        _emit(running, token, is_last=running.sampler.is_over)

    async def _take_choice(self, running: Running, choice: Choice) -> None:
        if not choice.are_numbers:
            raise not_finite(running.sequence.position)
        await store_token(self._engine, running, running.next_token)
        running.sampler.take(choice.token)
        if choice.logprob is not None:
            running.logprobs.add(choice.logprob)
        _emit(running, choice.token, is_last=running.sampler.is_over)

    def _grow(self, running: Running) -> bool:
        try:
            grow(self._engine, running.sequence, running.sequence.position + 1)
        except Overloaded as err:
            _fail(running, err)
            return False
        return True

    def _has_room_to_draft(self, running: Running) -> bool:
        """Whether the model's positions and the pool have room for a second token."""
        if not self._engine.model.mtp:
            return False
        end = running.sequence.position + 2
        if end > self._engine.identity.max_tokens:
            return False
        try:
            grow(self._engine, running.sequence, end)
        except Overloaded:
            return False
        return True

    async def store_end(self, running: Running) -> None:
        """This method must be called when the output has ended: it stores the output's last checkpoint and waits until
        all of the output is durable, or the store is late.
        """
        await store_end(self._engine, running)


def _emit(running: Running, token: int, *, is_last: bool) -> None:
    running.next_token = token
    shown = running.stopper.push(token, is_last=is_last)
    if shown:
        running.unread.put_nowait(VisibleTokens(tokens=shown, logprobs=running.logprobs.take(len(shown))))
    if running.stopper.finish_reason:
        running.done = True
        running.unread.put_nowait(None)


def step_failed(err: Exception | None) -> AntefixError:
    """The error for the caller, who tries another worker: our own errors are unchanged, and any other error becomes a
    failed step.
    """
    return (
        err
        if isinstance(err, AntefixError)
        else StepFailed("a step of the model failed; the worker's log has its cause")
    )


def _fail(running: Running, err: AntefixError) -> None:
    running.done = True
    running.unread.put_nowait(err)
