"""Simulates many workers under one placement policy: a trace's requests, at their times, through the router's real
code.

Real: placement policies, directory, backlogs, single flight, restore planner, window strategies, store eviction.
Modelled: the time that loading, computing and generating take (simulate.machine). Events are processed in order of
time. A prefill worker computes one prompt after the other; the KV that it computed is stored when the prompt is done.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

from antefix.linear_law import LOAD_FOLLOW, LinearLaw
from antefix.located import ReadSpeed
from antefix.window import (
    BudgetState,
    Plan,
    PlanKind,
    PromptFacts,
    RatePriors,
    Rates,
    RestorePlanner,
    Sizes,
    StoredPrefix,
    Strategy,
)
from antefix_router.inflight import InFlight, worth_waiting
from antefix_router.placement.backlog import Backlog
from antefix_router.placement.directory import Directory
from antefix_router.placement.loading import loading_tokens
from antefix_router.placement.work import Loads, Policy, Work, own_work, seeds_of
from antefix_simulate.baselines import make_policy
from antefix_simulate.cluster_result import RECOVERY_S, Outcomes, PolicyResult
from antefix_simulate.cluster_worker import Job, Memory, PrefillWorker
from antefix_simulate.machine import RATE_CARDS, Machine, TokenPrices, carry_out
from antefix_simulate.many_stores import DISK, OBJECT, PEER, HostStore, ManySimStores, store_name
from antefix_simulate.replay_result import percentile
from antefix_simulate.simulated_objects import ObjectPrices
from antefix_simulate.simulated_store import SimStore, StoreLimits
from antefix_simulate.trace import TraceRequest

Progress = Callable[[int, int], None]


class EngineHits(StrEnum):
    """Where workers that do not use our store and planner, such as vLLM and SGLang, can resume. Such a worker does both
    prefill and decode, keeps as much KV as fits its own memory, and never replays.

    FULL: it resumes after any block, as with full attention. WINDOW: it resumes only where window state was kept, as
    with DeepSeek-V4.
    """

    FULL = "full"
    WINDOW = "window"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """The machines of a simulated fleet, and events such as failures.

    kills: (second of death, second of return or 0 for never), for one prefill worker each: the first, the second, ...
    look_s: without kills, the second around which the windows "before" and "after" lie, for comparison with a run with
    kills.
    num_stores: stores, each with the limits of `store`; workers are assigned to them in turn.  copies_bytes: limit, per
    store, on copies of blocks that are often read from other stores.  object_bytes: size of the object tier; 0: none.
    prices: of prompt tokens.  joins: seconds at which a prefill worker is added.  decode_step_*: time of a decode step,
    by running sequences.  engines: where workers of other engines resume, see `EngineHits`; None: the workers are ours.
    """

    num_prefill: int
    num_decode: int
    machine: Machine = field(default_factory=Machine)
    shared_store: bool = True
    engines: EngineHits | None = None
    store: StoreLimits = field(default_factory=StoreLimits)
    num_stores: int = 1
    copies_bytes: int = 0
    object_bytes: int = 0
    object_prices: ObjectPrices = field(default_factory=ObjectPrices)
    prices: TokenPrices = RATE_CARDS["v4-flash"]
    memory_bytes: int = 64 * 10**9
    coalesce: bool = True
    kills: tuple[tuple[float, float], ...] = ()
    look_s: float | None = None
    joins: tuple[float, ...] = ()
    decode_step_s: float = 0.02
    decode_step_per_sequence_s: float = 0.0002
    ttft_limit_s: float = 2.0
    tpot_limit_s: float = 0.1
    window_s: float = 300.0

    @property
    def has_tiers(self) -> bool:
        """Whether blocks can come from more than one store of the fleet."""
        return self.num_stores > 1 or self.object_bytes > 0


def simulate_cluster(
    requests: Iterable[tuple[TraceRequest, int]],
    *,
    total: int,
    unit_tokens: int,
    policy: str,
    strategy: Strategy,
    sizes: Sizes,
    fleet: Fleet,
    progress: Progress | None = None,
) -> PolicyResult:
    """Run the requests under the named policy. requests: (request, offset of its names), in order of arrival."""
    run = _Run(unit_tokens, policy, strategy, sizes, fleet)
    every = max(total // 200, 1)
    for index, (request, offset) in enumerate(requests):
        run.until(request.at_s)
        run.arrive(Job(request=request, arrived_s=request.at_s, names=(request.names + offset).tolist()))
        if progress and index % every == 0:
            progress(index, total)
    run.until(float("inf"))
    return run.result(policy)


class _Run:
    def __init__(self, unit_tokens: int, policy: str, strategy: Strategy, sizes: Sizes, fleet: Fleet) -> None:
        self.fleet, self.sizes, self.strategy, self.unit_tokens = fleet, sizes, strategy, unit_tokens
        self.unit_blocks = unit_tokens // sizes.block_size
        self.policy: Policy = make_policy(policy)
        self.decode_policy: Policy = make_policy(policy)
        self.directory = Directory(num_blocks_max=1 << 24)
        self.in_flight: InFlight[Job] = InFlight()
        self.store = SimStore(sizes, fleet.store, unit_blocks=self.unit_blocks)
        self.many = ManySimStores(
            sizes,
            fleet.store,
            unit_blocks=self.unit_blocks,
            num_stores=fleet.num_stores,
            copies_bytes=fleet.copies_bytes,
            object_bytes=fleet.object_bytes,
            # The processes: workers, stores and a router.
            num_processes=fleet.num_prefill + fleet.num_decode + fleet.num_stores + 1,
        )
        # The planner knows the machine's speeds. The other simulation (trace_replay) covers learning them.
        machine = fleet.machine
        self.planner = RestorePlanner(
            sizes,
            Rates(
                RatePriors(
                    prefill_tokens_per_s=machine.prefill_tokens_per_s,
                    prefill_fixed_s=machine.prefill_fixed_s,
                    load_bytes_per_s=machine.disk_bytes_per_s,
                    load_fixed_s=machine.disk_fixed_s,
                ),
                tiers={
                    PEER: _law(machine.peer_fixed_s, machine.peer_bytes_per_s),
                    OBJECT: _law(machine.object_fixed_s, machine.object_bytes_per_s),
                },
            ),
        )
        self.rng = random.Random(1)
        self.now = 0.0
        self.outcomes = Outcomes()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        # Workers that join later have a row from the start, but cannot be reached until they join.
        self.workers = [self._worker(i) for i in range(fleet.num_prefill + len(fleet.joins))]
        self.addresses = [worker.address for worker in self.workers]
        self.read_speeds = [self._read_speeds(self.many.home_of(row)) for row in range(fleet.num_stores)]
        self.loads = _loads(self.addresses)
        self.head = np.zeros((3, len(self.workers)))  # head's tokens, since when, tokens per second
        self.total = np.zeros(len(self.workers))
        # An engine decodes the prompts that it prefilled.
        num_decode = len(self.workers) if fleet.engines is not None else fleet.num_decode
        self.decode = _loads([f"decode-{i}" for i in range(num_decode)])
        for row in range(fleet.num_prefill, len(self.workers)):
            self._set_alive(row, False)
            self.at(fleet.joins[row - fleet.num_prefill], lambda row=row: self._set_alive(row, True))  # type: ignore[misc]
        for row, (kill_s, back_s) in enumerate(fleet.kills):
            self.at(kill_s, lambda row=row: self._kill(row))  # type: ignore[misc]
            if back_s:
                self.at(back_s, lambda row=row: self._set_alive(row, True))  # type: ignore[misc]

    def at(self, when_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when_s, next(self._order), action))

    def until(self, when_s: float) -> None:
        """Process all simulated events up to this time."""
        while self._events and self._events[0][0] <= when_s:
            self.now, _, action = heapq.heappop(self._events)
            action()
        if when_s < float("inf"):
            self.now = when_s

    def arrive(self, job: Job) -> None:
        """Place a request, or let it wait for blocks that another request computes."""
        names, num_tokens = job.names, job.request.num_tokens
        # 1. Look up what is stored, and which workers have which blocks in memory.
        num_stored = self._store_of(0).num_stored(np.asarray(names)) if self.fleet.shared_store else 0
        resident = self.directory.leading(self.addresses, names)
        known = max(num_stored, int(resident.max()))
        # 2. Single flight.
        found = self.in_flight.find(names, known) if self.fleet.coalesce else None
        if found is not None:
            leader, num_units = found
            shared_s = (num_units - known) * self.unit_tokens / self.fleet.machine.prefill_tokens_per_s
            if job.waited_s == 0 and worth_waiting(leader.pending_s - self.now, shared_s):
                leader.followers.append(job)
                return
        # 3. Place.
        work = Work(
            num_tokens=num_tokens,
            stored_tokens=min(num_stored * self.unit_tokens, num_tokens - 1) if self.fleet.shared_store else None,
            affinity=_mixed(names[min(known, len(names) - 1)] if names else num_tokens),
            head=_mixed(names[min(2, len(names)) - 1] if names else num_tokens),
            replay_tokens=0 if self.fleet.engines is not None else self.sizes.replay_tokens,
            places=self._places(names[:num_stored]) if self.fleet.has_tiers else (),
        )
        self.loads.resident_tokens = np.minimum(resident * self.unit_tokens, num_tokens - 1)
        self.loads.pending_tokens = self.total - np.minimum(self.head[0], (self.now - self.head[1]) * self.head[2])
        self.loads.leading = found[0].row if found else -1
        self.loads.soon_tokens = min(found[1] * self.unit_tokens, num_tokens - 1) if found else 0
        self.loads.loading_tokens = self._loading(work) if work.places else None
        row = self.policy.choose(work, self.loads)
        # 4. Count it, and start it if the worker is idle.
        computing, loading = own_work(work, self.loads)
        job.own_tokens = max(1, round(float(computing[row] + loading[row])))
        job.claimed = self.in_flight.lead(job, names, known)
        wait_tokens = float(self.loads.pending_tokens[row]) + job.own_tokens
        job.pending_s = self.now + wait_tokens / self.fleet.machine.prefill_tokens_per_s
        worker = self.workers[row]
        job.ticket = worker.backlog.add(job.own_tokens, self.now)
        self.loads.num_requests[row] += 1
        self.loads.active_tokens[row] += num_tokens
        self._mirror(row)
        worker.queue.append(job)
        job.row = row
        if worker.running is None:
            self._start(row)

    def _places(self, names: list[int]) -> tuple[tuple[int, frozenset[str]], ...]:
        return tuple((units * self.unit_tokens, stores) for units, stores in self.many.places(names))

    def _loading(self, work: Work) -> np.ndarray:
        """The cost of loading the stored prefix on each worker, in tokens, as the router knows it from workers'
        measurements.
        """
        rate = self.fleet.machine.prefill_tokens_per_s
        resident = self.loads.resident_tokens.tolist()
        speeds = [self.read_speeds[self.many.home_of(row)] for row in range(len(self.workers))]
        return np.array([loading_tokens(work, own, each, rate) for own, each in zip(resident, speeds, strict=True)])

    def _read_speeds(self, home: int) -> dict[str, ReadSpeed]:
        """Read speeds of a worker on the same host as that store, by tier."""
        machine, bytes_per_token = self.fleet.machine, self.sizes.block_bytes / self.sizes.block_size

        def speed(fixed_s: float, bytes_per_s: float) -> ReadSpeed:
            return ReadSpeed(latency_s=fixed_s, seconds_per_token=bytes_per_token / bytes_per_s)

        peer = speed(machine.peer_fixed_s, machine.peer_bytes_per_s)
        others = {store_name(number): peer for number in range(self.fleet.num_stores)}
        own = {store_name(home): speed(machine.disk_fixed_s, machine.disk_bytes_per_s)}
        return {**others, **own, OBJECT: speed(machine.object_fixed_s, machine.object_bytes_per_s)}

    def _start(self, row: int) -> None:
        worker = self.workers[row]
        if not worker.queue:
            return
        job = worker.running = worker.queue.popleft()
        stored, plan = self._plan(worker, job)
        parts = self._parts(job, plan, stored) if self.fleet.has_tiers else None
        timing = carry_out(self.fleet.machine, self.sizes, plan, self.rng, bytes_by_tier=parts)
        worker.busy_s += timing.total_s
        epoch = worker.epoch
        self.at(self.now + timing.total_s, lambda: self._finish(row, epoch, job, plan, stored))

    def _plan(self, worker: PrefillWorker, job: Job) -> tuple[StoredPrefix, Plan]:
        names = job.names
        array = np.asarray(names, np.int64)
        resident = worker.memory.num_leading(names)
        in_memory = worker.memory.last_checkpoint(names, resident)
        num_stored, checkpoints = resident, dict[int, str]()
        tiers: tuple[tuple[int, str], ...] = ()
        if self.fleet.shared_store:
            store = self._store_of(job.row)
            store.expire(self.now)
            num_stored = max(resident, store.num_stored(array))
            if found := store.last_checkpoint(array, num_stored, self.now):
                checkpoints[found[0] * self.unit_blocks] = found[1].value
            if isinstance(store, HostStore):
                tiers = store.tiers(array, num_stored)
        stored = StoredPrefix(
            num_tokens=job.request.num_tokens,
            num_blocks=num_stored * self.unit_blocks,
            checkpoints=checkpoints,
            block_tiers=tiers,
            num_resident_blocks=resident * self.unit_blocks,
            resident_checkpoints=frozenset({in_memory * self.unit_blocks} if in_memory else ()),
        )
        if self.fleet.engines is not None:
            return stored, self._engine_plan(job, resident if self.fleet.engines is EngineHits.FULL else in_memory)
        return stored, self.planner.plan(stored).plan

    def _bytes_by_tier(self) -> dict[str, int]:
        """Bytes of blocks loaded from each tier, and bytes copied between stores."""
        many = self.many
        if self.fleet.has_tiers:
            loaded = {tier: many.bytes_by_tier[tier] for tier in (DISK, PEER, OBJECT)}
            return {**loaded, "copied": many.bytes_copied, "uploaded": many.objects.bytes_uploaded}
        return {DISK: sum(self.outcomes.fetched_tokens) // self.sizes.block_size * self.sizes.block_bytes}

    def _store_of(self, row: int) -> SimStore | HostStore:
        return self.many.of(row) if self.fleet.has_tiers else self.store

    def _parts(self, job: Job, plan: Plan, stored: StoredPrefix) -> dict[str, int]:
        """Bytes that the plan loads from each tier. The bytes are counted, and blocks that are read often are
        copied.
        """
        parts: dict[str, int] = {}
        start = stored.num_resident_blocks
        for end, tier in stored.block_tiers:
            stop = min(end, plan.resume_block)
            if stop > start:
                parts[tier] = parts.get(tier, 0) + (stop - start) * self.sizes.block_bytes
                start = stop
        names = np.asarray(job.names, np.int64)
        first, last = stored.num_resident_blocks // self.unit_blocks, plan.resume_block // self.unit_blocks
        self.many.of(job.row).note_read(names, first, last, self.now)
        return parts

    def _engine_plan(self, job: Job, num_units: int) -> Plan:
        """Resume the request after `num_units` units in memory. The last token, and so the unit that has it, is always
        computed.
        """
        num_units = min(num_units, (job.request.num_tokens - 1) // self.unit_tokens)
        rest = job.request.num_tokens - num_units * self.unit_tokens
        block = num_units * self.unit_blocks
        return Plan(
            kind=PlanKind.CHECKPOINT if num_units else PlanKind.COLD,
            resume_block=block,
            replay_from_block=block,
            checkpoint_tier="",
            load_bytes=0,
            replay_tokens=0,
            replay_work_tokens=0,
            prefill_tokens=rest,
            predicted_s=self.fleet.machine.compute_s(rest, context=job.request.num_tokens - rest),
            error_s=0.0,
        )

    def _finish(self, row: int, epoch: int, job: Job, plan: Plan, stored: StoredPrefix) -> None:
        worker = self.workers[row]
        if worker.epoch != epoch:
            return
        # 1. Count the result.
        self._count(job, plan, stored)
        self._give_back(row, job, done=True)
        # 2. Update memory and store.
        marks = self._keep(worker, job, plan, stored)
        self.directory.placed(worker.address, job.names)
        self.directory.evicted(worker.address, worker.memory.use(job.names, marks))
        # 3. Release waiting requests, start decode, start the next prompt.
        self._release(job)
        self._generate(job)
        worker.running = None
        self._start(row)

    def _count(self, job: Job, plan: Plan, stored: StoredPrefix) -> None:
        size, out = self.sizes.block_size, self.outcomes
        out.arrived_s.append(job.arrived_s)
        out.finished_s.append(self.now)
        out.prompt_tokens.append(job.request.num_tokens)
        out.hit_tokens.append(plan.resume_block * size - plan.replay_tokens)
        out.fetched_tokens.append(max(0, plan.resume_block - stored.num_resident_blocks) * size)

    def _keep(self, worker: PrefillWorker, job: Job, plan: Plan, stored: StoredPrefix) -> list[int]:
        """Store new blocks. Returns the units after which the strategy leaves window state."""
        boundaries = {*stored.checkpoints, *stored.resident_checkpoints}
        facts = PromptFacts(
            num_tokens=job.request.num_tokens,
            num_stored_blocks=max(stored.num_blocks, plan.resume_block),
            resume_block=plan.resume_block,
            checkpoints=tuple(sorted(boundaries)),
            align_blocks=self.unit_blocks,
            budget=BudgetState(used_bytes=self._store_of(job.row).checkpoint_bytes_kept(), limit_bytes=None),
        )
        marks = self.strategy.at_prompt(facts, self.sizes)
        units = [mark.block // self.unit_blocks for mark in marks]
        if self.fleet.shared_store:
            store, names = self._store_of(job.row), np.asarray(job.names, np.int64)
            first = min(store.num_stored(names), len(names))
            unit_s = self.unit_tokens / self.fleet.machine.prefill_tokens_per_s
            store.touch(names, first, self.now)
            num_kept = store.put_units(names, first, self.now, unit_s)
            for mark, unit in zip(marks, units, strict=True):
                if 0 < unit <= num_kept:
                    cost_s = mark.saved_tokens / self.fleet.machine.prefill_tokens_per_s
                    store.put_checkpoint(names, unit, tier=mark.tier, ttl_s=mark.ttl_s, now_s=self.now, cost_s=cost_s)
        return [unit for unit in units if 0 < unit <= len(job.names)]

    def _give_back(self, row: int, job: Job, *, done: bool) -> None:
        self.workers[row].backlog.remove(job.ticket, self.now, done=done)
        self.loads.num_requests[row] -= 1
        self.loads.active_tokens[row] -= job.request.num_tokens
        self.loads.num_served[row] += 1
        self._mirror(row)

    def _release(self, job: Job) -> None:
        self.in_flight.end(job.claimed)
        job.claimed = []
        followers, job.followers = job.followers, []
        for follower in followers:
            follower.waited_s = self.now - follower.arrived_s or 1e-9
            self.outcomes.num_coalesced += 1
            self.arrive(follower)

    def _generate(self, job: Job) -> None:
        """Decode, at the speed of the batch that the request joins."""
        decode = self.decode
        work = Work(num_tokens=job.request.num_tokens, stored_tokens=job.request.num_tokens - 1, affinity=0)
        row = job.row if self.fleet.engines is not None else self.decode_policy.choose(work, decode)
        running = int(decode.num_requests[row]) + 1
        step_s = self.fleet.decode_step_s + self.fleet.decode_step_per_sequence_s * running
        tokens = job.request.output_tokens
        self.outcomes.tpot_s.append(step_s)
        _add(decode, row, 1, tokens, job.request.num_tokens)
        self.at(self.now + tokens * step_s, lambda: _add(decode, row, -1, -tokens, -job.request.num_tokens))

    def _kill(self, row: int) -> None:
        """Remove the worker and its memory; the requests on it are placed on other workers."""
        worker = self.workers[row]
        lost = [*([worker.running] if worker.running else []), *worker.queue]
        worker.epoch += 1
        worker.running, worker.memory = None, self._memory()
        worker.queue.clear()
        self.directory.forget(worker.address)
        for job in lost:
            self._give_back(row, job, done=False)
        worker.backlog = Backlog()
        self._mirror(row)
        self._set_alive(row, False)
        for job in lost:
            job.row = -1
        self.outcomes.num_moved += len(lost)
        for job in lost:
            self.in_flight.end(job.claimed)
            job.claimed = []
        for job in lost:
            self.arrive(job)

    def _set_alive(self, row: int, alive: bool) -> None:
        self.workers[row].alive = alive
        self.loads.shunned[row] = not alive

    def _mirror(self, row: int) -> None:
        state = self.workers[row].backlog.state
        self.total[row] = state.total_tokens
        self.head[:, row] = state.head_tokens, state.head_since, state.tokens_per_s

    def _worker(self, index: int) -> PrefillWorker:
        return PrefillWorker(address=f"prefill-{index}", memory=self._memory())

    def _memory(self) -> Memory:
        return Memory(max(1, self.fleet.memory_bytes // (self.unit_blocks * self.sizes.block_bytes)))

    def result(self, policy: str) -> PolicyResult:
        out, fleet = self.outcomes, self.fleet
        ttft, tokens = out.ttft_s, max(sum(out.prompt_tokens), 1)
        busy = np.array([worker.busy_s for worker in self.workers])
        span_s = max(max(out.finished_s, default=1.0), 1e-9)
        good = sum(t <= fleet.ttft_limit_s and p <= fleet.tpot_limit_s for t, p in zip(ttft, out.tpot_s, strict=True))
        before: tuple[float | None, float | None] = (None, None)
        after = before
        first = fleet.kills[0][0] if fleet.kills else fleet.look_s
        if first is not None:
            before = out.window(first - fleet.window_s, first)
            after = out.window(first + RECOVERY_S, first + RECOVERY_S + fleet.window_s)
        hit = sum(out.hit_tokens)
        self.many.objects.now_s = max(self.many.objects.now_s, max(out.finished_s, default=0.0))
        by_tier = {"memory": out.bytes_in_memory(self.sizes), **self._bytes_by_tier()}
        return PolicyResult(
            policy=policy,
            bytes_by_tier=by_tier,
            dollars=fleet.prices.dollars(hit_tokens=hit, miss_tokens=sum(out.prompt_tokens) - hit),
            object_bill=self.many.objects.bill(fleet.object_prices),
            token_hit_rate=sum(out.hit_tokens) / tokens,
            fetched_share=sum(out.fetched_tokens) / tokens,
            ttft_p50_s=percentile(ttft, 0.5),
            ttft_p90_s=percentile(ttft, 0.9),
            ttft_p99_s=percentile(ttft, 0.99),
            ttft_mean_s=sum(ttft) / max(len(ttft), 1),
            goodput=good / span_s,
            load_max_over_mean=float(busy.max() / max(busy.mean(), 1e-9)),
            utilisation=float(busy.mean() / span_s),
            coalesced_share=out.num_coalesced / max(len(ttft), 1),
            num_moved=out.num_moved,
            before_hit_rate=before[0],
            after_hit_rate=after[0],
            before_ttft_p90_s=before[1],
            after_ttft_p90_s=after[1],
        )


def _law(fixed_s: float, bytes_per_s: float) -> LinearLaw:
    """The law of a tier's loads, as a worker has it."""
    return LinearLaw((fixed_s, 1 / bytes_per_s), (1.0, 32e6), follow=LOAD_FOLLOW)


def _loads(addresses: list[str]) -> Loads:
    count = len(addresses)
    return Loads(
        seeds=seeds_of(addresses),
        pending_tokens=np.zeros(count),
        active_tokens=np.zeros(count),
        num_requests=np.zeros(count, np.int64),
        resident_tokens=np.zeros(count, np.int64),
        num_served=np.zeros(count, np.int64),
        shunned=np.zeros(count, np.bool_),
    )


def _add(loads: Loads, row: int, requests: int, pending: int, active: int) -> None:
    loads.num_requests[row] += requests
    loads.pending_tokens[row] += pending
    loads.active_tokens[row] += active


def _mixed(name: int) -> int:
    """A hash of a name: names in a trace count up, but the directory's keys must look like hashes."""
    return (name * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
