"""Reads a prompt's stored blocks into rows of the pool. Rows into which a late read may still write are kept until the
read has ended.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING, Final

from antefix.errors import AntefixError, BlockUnusable
from antefix.record import RecordKind
from antefix.restore_report import RestoreReport
from antefix.store.file_reads import ReadHangs
from antefix.store.many_stores import ManyStores
from antefix.store.patience import Watch
from antefix.telemetry import span
from antefix.window import Tier
from antefix_prefill.older_names import OlderNames
from antefix_prefill.publish_block import publish_blocks
from antefix_prefill.worker.compute_thread import uninterrupted
from antefix_prefill.worker.engine import Engine

if TYPE_CHECKING:
    from antefix_prefill.restore import Prompt

DISK_TIER: Final = Tier.DISK.value


async def load_blocks(
    engine: Engine,
    prompt: Prompt,
    num_blocks: int,
    report: RestoreReport,
    older: OlderNames | None = None,
    *,
    watch: Watch | None,
    predicted_s: float,
) -> list[int]:
    """Load as many of the prompt's first `num_blocks` as exist: first those in memory, the rest from the store.

    watch: None: none are read from the store.  predicted_s: the time that reading takes as a rule.

    Raises:  Overloaded: the pool has no room.
    """
    hashes = prompt.chain.hashes[:num_blocks]
    table = engine.blocks.take(hashes)
    report.hit_memory_tokens = len(table) * engine.block_size
    report.hit_tiers.clear()
    wanted = hashes[len(table) :]
    if not wanted or watch is None:
        return table
    try:
        fresh = engine.blocks.allocate(len(wanted), after=table[-1] if table else None)
    except BaseException:
        engine.blocks.release(table)
        raise
    try:
        stored_as = _stored_as(engine, prompt, range(len(table), num_blocks), older)
        num_read = await _read_into_pool(engine, stored_as, fresh, report, watch, predicted_s)
    except ReadHangs as err:
        # These rows must not be reused while a thread may still write into them.
        err.when_over(lambda: engine.blocks.release(fresh))
        return table
    except BaseException:
        engine.blocks.release([*table, *fresh])
        raise
    publish_blocks(engine, prompt, len(table), fresh[:num_read])
    engine.blocks.release(fresh[num_read:])
    return table + fresh[:num_read]


def _stored_as(
    engine: Engine, prompt: Prompt, blocks: range, older: OlderNames | None
) -> list[tuple[bytes, Seq[bytes]]]:
    """The owner and the hashes of these blocks in the store, as one stretch, or as two if some blocks have
    older names.
    """
    first_older = blocks.stop if older is None else min(max(older.first, blocks.start), blocks.stop)
    owner, own = engine.keyring.owner(prompt.tenant), prompt.chain.hashes[blocks.start : first_older]
    stretches: list[tuple[bytes, Seq[bytes]]] = [(owner, own)]
    if older is not None:
        stretches.append((older.owner, older.hashes[first_older : blocks.stop]))
    return [(owner, hashes) for owner, hashes in stretches if hashes]


async def _read_into_pool(
    engine: Engine,
    stored_as: Seq[tuple[bytes, Seq[bytes]]],
    block_ids: list[int],
    report: RestoreReport,
    watch: Watch,
    predicted_s: float,
) -> int:
    started = time.perf_counter()
    rows = engine.pool.landing(block_ids)
    num_read = 0
    try:
        for owner, hashes in stored_as:
            part = rows[num_read : num_read + len(hashes)]
            with span("read", tier=DISK_TIER, what="blocks", num_blocks=len(hashes)) as reading:
                with watch.waiting(engine.patience.reads, predicted_s):
                    num_good = await _read_stretch(engine, hashes, part, owner, report)
                reading.set(tiers=",".join(report.hit_tiers))
            num_read += num_good
            if num_good < len(hashes):
                break
    except AntefixError as err:
        engine.counters.note(err)
        report.store_errors += 1
        if isinstance(err, ReadHangs):
            raise
        return 0
    if num_read:
        names = [name for _, hashes in stored_as for name in hashes]
        num_read = await _take_in(engine, block_ids[:num_read], names, report, watch)
    nbytes = num_read * engine.layout.block_bytes
    report.bytes_read += nbytes
    if num_read == len(block_ids):
        engine.rates.observe_load(DISK_TIER, nbytes, time.perf_counter() - started)
    else:
        engine.counters.short_reads += 1
    return num_read


async def _take_in(engine: Engine, landed: list[int], names: Seq[bytes], report: RestoreReport, watch: Watch) -> int:
    """The number of usable blocks at the beginning of the blocks that were read. An unusable block is reported to the
    store.
    """
    # One job, because each job waits for the running work.
    unusable = await engine.compute.run(engine.pool.fill, landed)
    if unusable:
        index = landed.index(unusable[0])
        report.store_errors += 1
        engine.counters.note(BlockUnusable(f"block {names[index].hex()[:16]} holds NaN or infinity"))
        with watch.waiting(engine.patience.look_ups):
            await engine.store.reject(RecordKind.BLOCK, names[index : index + 1])
        landed = landed[:index]
    return len(landed)


async def _read_stretch(
    engine: Engine, hashes: Seq[bytes], into: Seq[memoryview], owner: bytes, report: RestoreReport
) -> int:
    """The number of leading blocks that were read. If there are several stores, the report says which store gave which
    blocks, and which errors occurred.
    """
    store = engine.store
    if not isinstance(store, ManyStores):
        return await uninterrupted(store.get_blocks(hashes, into, fingerprint=engine.fingerprint, tenant=owner))
    found = await uninterrupted(store.read_blocks(hashes, into, fingerprint=engine.fingerprint, tenant=owner))
    for err in found.errors:
        engine.counters.note(err)
    report.store_errors += len(found.errors)
    for read in found.reads:
        tokens = read.num_blocks * engine.block_size
        report.hit_tiers[read.tier] = report.hit_tiers.get(read.tier, 0) + tokens
        engine.counters.note_tier(read.tier, tokens, read.nbytes)
    return found.num_good
