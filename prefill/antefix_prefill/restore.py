"""Restores a prompt's prefix: finds what is stored, chooses the cheapest plan, loads it, rebuilds window state.

If a record turns out to be missing (a block that was evicted meanwhile, a corrupt checkpoint, a dead store), the known
prefix becomes shorter and a new plan is made. So in the worst case the prompt is computed cold. A restore never raises
an error of the store. While a restore waits for a late store, `late_store` computes the prompt next to it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from antefix.block import Chain, exactness_of
from antefix.errors import AntefixError, BlockCorrupt
from antefix.generation_request import Breakpoint
from antefix.miss_reason import MissReason
from antefix.model import Sequence, WindowState, forward, replay
from antefix.record import LookupResult, RecordKind
from antefix.restore_report import RestoreReport
from antefix.store.patience import BASE_S, Patience, StoreLate, Watch
from antefix.telemetry import span
from antefix.window import Plan, PlanKind, StoredPrefix
from antefix.window_pool import POOL_TIER
from antefix_prefill.load_blocks import DISK_TIER, load_blocks
from antefix_prefill.model_step import model_step
from antefix_prefill.older_names import OlderNames, find_older
from antefix_prefill.why_missed import why_missed
from antefix_prefill.worker.compute_thread import uninterrupted
from antefix_prefill.worker.engine import Engine


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefetched:
    """Blocks [first, stop) that were loaded for a prompt while it waited. report: the tiers that they came from.

    checkpoints: window state that was read for the prompt, by boundary.
    """

    first: int
    stop: int
    report: RestoreReport
    checkpoints: dict[int, bytes] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True, eq=False)
class Prompt:
    """A checked prompt with its names. tokens: [N] uint32. breakpoints: cache breakpoints that the client has set."""

    tokens: npt.NDArray[np.uint32]
    chain: Chain
    tenant: str = ""
    breakpoints: tuple[Breakpoint, ...] = ()
    prefetched: Prefetched | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)


@dataclass(slots=True)
class Restored:
    """A sequence that can continue from `sequence.position`, with the facts that the restore learned about the prompt's
    prefix.
    """

    sequence: Sequence
    plan: Plan
    plans: tuple[Plan, ...]
    num_stored_blocks: int
    checkpoints: tuple[int, ...]
    report: RestoreReport


@dataclass(slots=True)
class _Known:
    """The blocks and checkpoints that are believed to be stored. The known prefix shrinks whenever a record turns out
    to be missing.

    checkpoints: the tier of each, by boundary. pooled: window state that the pool has given already, by boundary.
    block_tiers: for several stores, as `LookupResult.tiers`. store_failed: whether the store did not answer.
    store_late: whether the prompt continues without the store's answer. came_short: whether the store promised blocks
    and did not deliver them. older: the blocks that are stored only under the names of an older secret. loaded: blocks
    that an earlier plan of this restore read; they are in memory since.
    """

    num_blocks: int
    num_in_store: int
    checkpoints: dict[int, str]
    pooled: dict[int, bytes]
    block_tiers: tuple[tuple[int, str], ...] = ()
    store_failed: bool = False
    store_late: bool = False
    came_short: bool = False
    older: OlderNames | None = None
    loaded: Prefetched | None = None

    @property
    def own_checkpoints(self) -> tuple[int, ...]:
        """Checkpoints under the present names. All other checkpoints have to be written again."""
        older = self.older.checkpoints if self.older else frozenset()
        return tuple(sorted(self.checkpoints.keys() - older))


class Rival:
    """What may run next to a restore whose store is late: the computation of the same prompt.

    watch: says when the store is late.  left_s: returns the predicted time that the computation has left; None: there
    is none yet.  waits: the restore computes now, so the computation waits for its end.  loaded: blocks that the
    restore has read, while it still waits for a checkpoint.
    """

    def __init__(self, patience: Patience) -> None:
        self.watch = Watch(patience)
        self.left_s: Callable[[], float] | None = None
        self.waits = False
        self.loaded: Prefetched | None = None

    def check_gain(self, rest_s: float) -> None:
        """rest_s: the time that the restore and all after it are predicted to take.

        Raises:  _NoGain: the computation next to the restore ends no later.
        """
        if self.left_s is not None and rest_s >= self.left_s():
            raise _NoGain


class _NoGain(Exception):
    """The computation next to the restore is ahead of what the restore could still gain."""


async def has_short_rest(engine: Engine, prompt: Prompt) -> bool:
    """Whether at most one chunk of the prompt is neither in memory nor in the store, and the pool has room for the
    whole prompt.

    The check takes one look-up in addition to `restore`'s own, so it is for prompts that would otherwise wait.
    """
    if engine.blocks.num_available * engine.block_size < prompt.num_tokens:
        return False
    num_known = engine.blocks.num_leading(prompt.chain.hashes)
    if prompt.num_tokens - num_known * engine.block_size > engine.prefill_chunk:
        looking = _look_up(engine, prompt, RestoreReport(), Watch(engine.patience))
        try:
            known = await engine.patience.within(engine.patience.look_ups, BASE_S, looking)
        except StoreLate:
            return False
        num_known = known.num_blocks
    return prompt.num_tokens - num_known * engine.block_size <= engine.prefill_chunk


async def weigh(engine: Engine, prompt: Prompt, report: RestoreReport, watch: Watch) -> tuple[Plan, OlderNames | None]:
    """The plan that `restore` would choose now without a window pool, and the older names that it would read."""
    known = await _look_up(engine, prompt, report, watch)
    return engine.planner.weigh(_stored_prefix(engine, prompt, known)).plan, known.older


async def restore(engine: Engine, prompt: Prompt, rival: Rival | None = None) -> Restored:
    """The prompt's prefix, restored by the cheapest plan that works. The caller owns the returned sequence's blocks."""
    started = time.perf_counter()
    report = RestoreReport()
    rival = rival or Rival(engine.patience)
    known = await _look_up(engine, prompt, report, rival.watch)
    _take_prefetched(prompt, known)
    await _ask_pool(engine, prompt, known, report, rival.watch)
    return await _restore(engine, prompt, known, report, rival, started)


async def restore_from_memory(engine: Engine, prompt: Prompt, rival: Rival) -> Restored:
    """As `restore`, from this worker's memory alone: for a prompt that does not wait for its store.  rival: of the
    restore that continues.
    """
    started = time.perf_counter()
    num_blocks = engine.blocks.num_leading(prompt.chain.hashes)
    # What is in memory is taken to be in the store as well, as it nearly always is.
    known = _Known(num_blocks=num_blocks, num_in_store=num_blocks, checkpoints={}, pooled={}, store_late=True)
    known.loaded = rival.loaded
    if prompt.prefetched is not None:
        known.pooled.update(prompt.prefetched.checkpoints)
        known.checkpoints.update(dict.fromkeys(known.pooled, DISK_TIER))
    return await _restore(engine, prompt, known, RestoreReport(), None, started)


async def _restore(
    engine: Engine, prompt: Prompt, known: _Known, report: RestoreReport, rival: Rival | None, started: float
) -> Restored:
    """rival: None: the store is not used."""
    while True:
        with span("plan") as planning:
            decision = engine.planner.plan(_stored_prefix(engine, prompt, known))
            plan = decision.plan
            planning.set(plan=plan.kind.value, predicted_s=plan.predicted_s, num_weighed=len(decision.plans))
        try:
            if rival is not None and plan.kind is not PlanKind.COLD:
                rival.check_gain(plan.predicted_s)
            sequence = await _carry_out(engine, prompt, plan, known, report, rival)
        except _NoGain:
            known.store_late, plan, sequence = True, decision.cold, _cold(engine)
        if sequence is not None:
            break
    _account(engine, prompt, plan, known, report)
    try:
        report.miss_reason = await _miss_reason(engine, prompt, plan, known)
    except BaseException:
        engine.blocks.release(sequence.block_table)
        raise
    report.restore_s = time.perf_counter() - started
    return Restored(
        sequence=sequence,
        plan=plan,
        plans=decision.plans,
        num_stored_blocks=known.num_in_store,
        checkpoints=known.own_checkpoints,
        report=report,
    )


async def _look_up(engine: Engine, prompt: Prompt, report: RestoreReport, watch: Watch) -> _Known:
    hashes = prompt.chain.hashes
    try:
        owner = engine.keyring.owner(prompt.tenant)
        with watch.waiting(engine.patience.look_ups, BASE_S * len(engine.keyring.generations)):
            with span("look-up", num_blocks=len(hashes)):
                found = await engine.store.lookup(hashes, fingerprint=engine.fingerprint, tenant=owner)
            older = await find_older(engine, prompt.tenant, prompt.tokens, found)
        failed = False
    except AntefixError as err:
        engine.counters.note(err)
        report.store_errors += 1
        found, older, failed = LookupResult(num_blocks=0), None, True
    num_resident = engine.blocks.num_leading(hashes)
    checkpoints = dict.fromkeys(older.checkpoints if older else (), DISK_TIER)
    tiers = found.checkpoint_tiers or (DISK_TIER,) * len(found.checkpoints)
    checkpoints.update(zip(found.checkpoints, tiers, strict=True))
    return _Known(
        num_blocks=max(found.num_blocks, num_resident, older.num_blocks if older else 0),
        num_in_store=found.num_blocks,
        checkpoints=checkpoints,
        pooled={},
        block_tiers=found.tiers,
        store_failed=failed,
        older=older,
    )


def _take_prefetched(prompt: Prompt, known: _Known) -> None:
    """Use the blocks that were read while the prompt waited, except those found missing or bad since."""
    if prompt.prefetched is None:
        return
    for block, data in prompt.prefetched.checkpoints.items():
        if block in known.checkpoints:
            known.pooled[block] = data


async def read_checkpoint(
    engine: Engine, prompt: Prompt, block: int, report: RestoreReport, watch: Watch
) -> bytes | None:
    """Window state at a boundary, read as `restore` would read it; None if it is not stored."""
    known = _Known(num_blocks=block, num_in_store=block, checkpoints={}, pooled={})
    return await _read_checkpoint(engine, prompt, block, known, report, watch)


async def _ask_pool(engine: Engine, prompt: Prompt, known: _Known, report: RestoreReport, watch: Watch) -> None:
    """Ask the window pool for a checkpoint after the disk's last one, if it could be cheaper than a replay at the end
    of the hit.
    """
    if engine.window_pool is None:
        return
    step = engine.align_blocks
    usable = min(known.num_blocks, (prompt.num_tokens - 1) // engine.block_size) // step * step
    on_disk = max((block for block in known.checkpoints if block <= usable), default=0)
    nearest = max(on_disk, usable - engine.sizes.blocks_up(engine.sizes.exact_replay_work_tokens))
    blocks = range(usable, nearest, -step)
    names = [prompt.chain.hashes[block - 1] for block in blocks]
    started = time.perf_counter()
    try:
        owner = engine.keyring.owner(prompt.tenant)
        predicted_s = engine.rates.load_s(POOL_TIER, engine.sizes.checkpoint_bytes)
        with watch.waiting(engine.patience.reads, predicted_s), span("read", tier=POOL_TIER, what="checkpoint"):
            found = await engine.window_pool.nearest(names, fingerprint=engine.fingerprint, tenant=owner)
    except AntefixError as err:
        engine.counters.note(err)
        report.store_errors += 1
        return
    if found is not None:
        block = blocks[found.index]
        known.checkpoints[block] = POOL_TIER
        known.pooled[block] = found.payload
        report.bytes_read += len(found.payload)
        engine.rates.observe_load(POOL_TIER, len(found.payload), time.perf_counter() - started)


def _stored_prefix(engine: Engine, prompt: Prompt, known: _Known) -> StoredPrefix:
    return StoredPrefix(
        num_tokens=prompt.num_tokens,
        num_blocks=known.num_blocks,
        checkpoints={block: tier for block, tier in known.checkpoints.items() if block <= known.num_blocks},
        blocks_tier=DISK_TIER,
        block_tiers=known.block_tiers,
        num_resident_blocks=engine.blocks.num_leading(prompt.chain.hashes),
        resident_checkpoints=frozenset(known.pooled),
        bounded_windows=engine.bounded_windows,
    )


def _cold(engine: Engine) -> Sequence:
    return Sequence(block_table=[], window=WindowState.zeros(engine.layout, 0, engine.device))


async def _carry_out(
    engine: Engine, prompt: Prompt, plan: Plan, known: _Known, report: RestoreReport, rival: Rival | None
) -> Sequence | None:
    """The sequence that results from carrying out the plan. Returns None if a record was missing, in which case `known`
    has been corrected.

    Raises:  _NoGain.
    """
    if plan.kind is PlanKind.COLD:
        return _cold(engine)
    watch = rival.watch if rival is not None else None
    if plan.kind is PlanKind.CHECKPOINT:
        loading = asyncio.ensure_future(_load_both(engine, prompt, plan.resume_block, known, report, rival))
        try:
            return await uninterrupted(loading)
        except asyncio.CancelledError:
            if not loading.cancelled() and loading.exception() is None and (loaded := loading.result()):
                engine.blocks.release(loaded.block_table)
            raise
    num_errors = report.store_errors
    load_s = _load_s(engine, prompt, plan.resume_block, known)
    table = await load_blocks(engine, prompt, plan.resume_block, report, known.older, watch=watch, predicted_s=load_s)
    if len(table) < plan.resume_block:
        _correct(engine, known, table, report, failed=report.store_errors > num_errors)
        return None
    try:
        if rival is not None:
            rival.check_gain(plan.predicted_s - load_s)
            rival.waits = True
        return await _replay(engine, prompt, plan, table, report)
    except BaseException:
        engine.blocks.release(table)
        raise


def _load_s(engine: Engine, prompt: Prompt, block: int, known: _Known) -> float:
    """The predicted time of reading the prompt's first blocks, without those that are in memory."""
    return engine.planner.load_s(_stored_prefix(engine, prompt, known), block)


async def _load_both(
    engine: Engine, prompt: Prompt, block: int, known: _Known, report: RestoreReport, rival: Rival | None
) -> Sequence | None:
    """A sequence at the checkpoint at `block`. The checkpoint is read and unpacked while the blocks are read. Returns
    None as `_carry_out`. The caller must not cancel this call.
    """
    of_window, num_errors = RestoreReport(), report.store_errors
    watch = rival.watch if rival is not None else None

    async def load() -> list[int]:
        load_s = _load_s(engine, prompt, block, known)
        table = await load_blocks(engine, prompt, block, report, known.older, watch=watch, predicted_s=load_s)
        first = report.hit_memory_tokens // engine.block_size
        if rival is not None and first < len(table):
            tiers = RestoreReport(hit_tiers=dict(report.hit_tiers))
            rival.loaded = Prefetched(first=first, stop=len(table), report=tiers)
        return table

    table, window = await asyncio.gather(
        load(), _load_checkpoint(engine, prompt, block, known, of_window, watch), return_exceptions=True
    )
    failed = report.store_errors > num_errors
    report.bytes_read += of_window.bytes_read
    report.store_errors += of_window.store_errors
    if isinstance(table, BaseException):
        raise table
    if isinstance(window, BaseException):
        engine.blocks.release(table)
        raise window
    if len(table) < block:
        _correct(engine, known, table, report, failed=failed)
        return None
    if window is None:
        _leave(engine, known, table, report)
        return None
    return Sequence(block_table=table, window=window)


def _correct(engine: Engine, known: _Known, table: list[int], report: RestoreReport, *, failed: bool) -> None:
    """Only these blocks could be loaded."""
    known.num_blocks, known.num_in_store = len(table), min(known.num_in_store, len(table))
    known.came_short = True
    known.store_failed |= failed
    _leave(engine, known, table, report)


def _leave(engine: Engine, known: _Known, table: list[int], report: RestoreReport) -> None:
    """Leave blocks in memory, where the next plan finds them. Those that were read now still count as read."""
    first = report.hit_memory_tokens // engine.block_size
    if known.loaded is None and first < len(table):
        tiers = RestoreReport(hit_tiers=dict(report.hit_tiers))
        known.loaded = Prefetched(first=first, stop=len(table), report=tiers)
    engine.blocks.release(table)


async def _load_checkpoint(
    engine: Engine, prompt: Prompt, block: int, known: _Known, report: RestoreReport, watch: Watch | None
) -> WindowState | None:
    data = known.pooled.pop(block, None)
    if data is None and watch is not None:
        data = await _read_checkpoint(engine, prompt, block, known, report, watch)
    if data is not None:
        try:
            position, streams = block * engine.block_size, engine.num_stream_values
            window = WindowState.from_bytes(engine.layout, position, data, engine.device, num_stream_values=streams)
            if (runner := engine.ops.step_runner) is not None:
                # Now, because the blocks are still being read.
                rest = prompt.num_tokens - position
                with model_step(position):
                    await engine.compute.run(runner.seat_early, engine.model, window, rest)
            return window
        except BlockCorrupt as err:
            engine.counters.note(err)
            report.store_errors += 1
            if watch is not None:
                name, _ = _checkpoint_name(engine, prompt, block, known.older)
                with watch.waiting(engine.patience.look_ups):
                    await engine.store.reject(RecordKind.CHECKPOINT, [name])
    known.checkpoints.pop(block, None)
    return None


def _checkpoint_name(engine: Engine, prompt: Prompt, block: int, older: OlderNames | None) -> tuple[bytes, bytes]:
    """The name of the checkpoint, and its owner."""
    if older is not None and block in older.checkpoints:
        return older.hashes[block - 1], older.owner
    return prompt.chain.hashes[block - 1], engine.keyring.owner(prompt.tenant)


async def _read_checkpoint(
    engine: Engine, prompt: Prompt, block: int, known: _Known, report: RestoreReport, watch: Watch
) -> bytes | None:
    older, tier = known.older, known.checkpoints.get(block, DISK_TIER)
    started = time.perf_counter()
    name, owner = _checkpoint_name(engine, prompt, block, older)
    try:
        predicted_s = engine.rates.load_s(tier, engine.sizes.checkpoint_bytes)
        with watch.waiting(engine.patience.reads, predicted_s), span("read", tier=tier, what="checkpoint"):
            data = await engine.store.get(RecordKind.CHECKPOINT, name, fingerprint=engine.fingerprint, tenant=owner)
    except AntefixError as err:
        engine.counters.note(err)
        report.store_errors += 1
        return None
    if data is not None:
        report.bytes_read += len(data)
        engine.rates.observe_load(tier, len(data), time.perf_counter() - started)
    return data


async def _replay(engine: Engine, prompt: Prompt, plan: Plan, table: list[int], report: RestoreReport) -> Sequence:
    """Rebuild window state from stored global KV (docs/WINDOW_STATE.md, "The restore planner"); writes no global KV.

    A bounded replay does not attend to tokens before its start, so its window state is approximate. Such a replay is
    allowed only in a namespace whose fingerprint says so, so that KV computed from it cannot be taken for exact.
    """
    start = plan.replay_from_block * engine.block_size
    stop = plan.resume_block * engine.block_size
    if plan.kind is PlanKind.BOUNDED:
        assert engine.bounded_windows, "a bounded replay in an exact namespace"
        window = WindowState.cut_at(engine.layout, start, engine.device)
    else:
        window = WindowState.zeros(engine.layout, start, engine.device)
    sequence = Sequence(block_table=table, window=window)
    started = time.perf_counter()
    with span("replay", num_tokens=stop - start):
        while sequence.position < stop:
            end = min(stop, (sequence.position // engine.prefill_chunk + 1) * engine.prefill_chunk)
            left, piece = prompt.num_tokens - sequence.position, prompt.tokens[sequence.position : end]
            with model_step(sequence.position):
                await engine.compute.run_chunk(left, started, _replay_piece, engine, sequence, piece, stop)
    report.replayed_tokens = stop - start
    engine.rates.observe_replay(plan.replay_work_tokens, context=start, seconds=time.perf_counter() - started)
    return sequence


def _replay_piece(engine: Engine, sequence: Sequence, tokens: npt.NDArray[np.uint32], stop: int) -> None:
    if engine.align_tokens == 1:
        replay(engine.model, engine.pool, sequence, tokens, stop=stop, ops=engine.ops)
    else:
        # Where bits depend on shapes, a call must have the same shape as in a cold run to give the same bits.
        forward(engine.model, engine.pool, [(sequence, tokens)], write_global_kv=False, ops=engine.ops)


def _account(engine: Engine, prompt: Prompt, plan: Plan, known: _Known, report: RestoreReport) -> None:
    """Count hits and misses: blocks that were not computed are hits, all tokens after them are misses."""
    report.plan = exactness_of(engine.bounded_windows) if plan.kind is PlanKind.BOUNDED else plan.kind.value
    report.predicted_s = plan.predicted_s
    report.hit_tokens = plan.resume_block * engine.block_size
    report.miss_tokens = prompt.num_tokens - report.hit_tokens
    report.hit_memory_tokens = min(report.hit_memory_tokens, report.hit_tokens)
    if not report.hit_tiers and report.hit_tokens > report.hit_memory_tokens:
        report.hit_tiers[DISK_TIER] = report.hit_tokens - report.hit_memory_tokens
    # Blocks that were read for this prompt before: later ones first, because each count ends where they begin.
    for own in (known.loaded, prompt.prefetched):
        if own is not None:
            _account_prefetched(engine, own, report)
    report.hit_store_tokens = report.hit_tokens - report.hit_memory_tokens
    if not report.hit_store_tokens:
        report.hit_tiers.clear()
    if plan.resume_block:
        report.last_hit_hash = prompt.chain.hashes[plan.resume_block - 1]


def _account_prefetched(engine: Engine, prefetched: Prefetched, report: RestoreReport) -> None:
    """Count blocks that were loaded for this prompt before under the tier that they came from, not under memory."""
    resident = report.hit_memory_tokens // engine.block_size
    moved = (min(resident, prefetched.stop) - prefetched.first) * engine.block_size
    if moved <= 0:
        return
    report.hit_memory_tokens -= moved
    report.bytes_read += prefetched.report.bytes_read
    for tier, tokens in (prefetched.report.hit_tiers or {DISK_TIER: moved}).items():
        tokens = min(tokens, moved)
        report.hit_tiers[tier] = report.hit_tiers.get(tier, 0) + tokens
        moved -= tokens


async def _miss_reason(engine: Engine, prompt: Prompt, plan: Plan, known: _Known) -> MissReason:
    """Why the first missing block missed. Empty if only the prompt's unfinished last block is missing."""
    full_blocks = (prompt.num_tokens - 1) // engine.block_size
    if full_blocks == 0:
        return MissReason.BELOW_MINIMUM
    if plan.resume_block >= full_blocks:
        return MissReason.NONE
    if known.store_late:
        return MissReason.STORE_LATE
    if plan.resume_block < known.num_blocks:
        return MissReason.WINDOW_MISSING
    if known.store_failed:
        return MissReason.STORE_UNAVAILABLE
    asked = why_missed(
        engine,
        prompt.chain,
        prompt.tokens,
        tenant=prompt.tenant,
        index=plan.resume_block,
        came_short=known.came_short,
    )
    try:
        return await engine.patience.within(engine.patience.look_ups, BASE_S, asked)
    except StoreLate as err:
        engine.counters.note(err)
        return MissReason.STORE_LATE
