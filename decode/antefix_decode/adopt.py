"""Takes a prompt over from a prefill worker, and prefills here if a part of the prompt's KV is gone."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from antefix.errors import AntefixError, BlockCorrupt, BlockUnusable
from antefix.model import Sequence, WindowState
from antefix.model.finite import are_numbers
from antefix.record import RecordKind
from antefix.restore_report import RestoreReport
from antefix_prefill.handoff import Handoff
from antefix_prefill.late_store import load_in_time
from antefix_prefill.load_blocks import DISK_TIER
from antefix_prefill.restore import Prompt
from antefix_prefill.run_prompt import run_prompt
from antefix_prefill.worker.compute_thread import uninterrupted
from antefix_prefill.worker.engine import Engine


@dataclass(slots=True)
class Adopted:
    """A sequence whose prompt is in this worker's pool. logits: [vocab] float32 of the prompt's last token."""

    sequence: Sequence
    logits: npt.NDArray[np.float32]
    report: RestoreReport


async def take_handoff(engine: Engine, prompt: Prompt, name: bytes) -> Handoff | None:
    """The handoff. None: there is no handoff, or the handoff belongs to another prompt."""
    if not name:
        return None
    try:
        # The handoff's tenant is known by a digest, made with the tenant's key. While secrets rotate, a prefill worker
        # may have sealed it under another secret than this worker's newest one.
        predicted_s = engine.rates.load_s(DISK_TIER, engine.sizes.checkpoint_bytes)
        data = await engine.patience.within(
            engine.patience.handoffs,
            predicted_s,
            engine.store.get(RecordKind.HANDOFF, name, fingerprint=engine.fingerprint),
        )
        handoff = Handoff.from_bytes(data) if data is not None else None
    except AntefixError as err:
        engine.counters.note(err)
        return None
    if handoff is None:
        return None
    # The caller says which handoff is this prompt's: a mistake there must not become another prompt's answer.
    is_ours = handoff.position == prompt.num_tokens and handoff.prompt == prompt.chain.digest()
    if not is_ours or len(handoff.logits) != engine.identity.vocab_size:
        return None
    if not are_numbers(handoff.logits):
        engine.counters.note(BlockUnusable("a handoff's logits hold NaN or infinity"))
        return None
    return handoff


async def adopt(engine: Engine, prompt: Prompt, handoff: Handoff) -> Adopted | None:
    """Load blocks from the store, and the rest of the state from the handoff. Returns None if a block is missing, or a
    part of the handoff does not fit.

    Raises:  Overloaded: no room in the pool.
    """
    started = time.perf_counter()
    report = RestoreReport(plan="handoff")
    num_blocks = prompt.num_tokens // engine.block_size
    # At the same time as the other blocks are read, because both wait for the running step.
    unfinished = asyncio.create_task(_unfinished_block(engine, prompt, handoff))
    try:
        table = await load_in_time(engine, prompt, num_blocks, report)
    except BaseException:
        await _give_back(engine, unfinished)
        raise
    if len(table) < num_blocks:
        engine.blocks.release(table)
        await _give_back(engine, unfinished)
        return None
    try:
        position, streams = prompt.num_tokens, engine.num_stream_values
        window = WindowState.from_bytes(
            engine.layout, position, handoff.window, engine.device, num_stream_values=streams
        )
        table.extend(await asyncio.shield(unfinished))
    except BaseException as err:  # also if the client left while the last row was copied into the pool
        engine.blocks.release(table)
        await _give_back(engine, unfinished)
        if not isinstance(err, AntefixError):
            raise
        engine.counters.note(err)
        return None
    report.restore_s = time.perf_counter() - started
    return Adopted(sequence=Sequence(block_table=table, window=window), logits=handoff.logits, report=report)


async def prefill_here(engine: Engine, prompt: Prompt) -> Adopted:
    """Restore as much of the prompt as possible from the store, and compute the rest."""
    computed = await run_prompt(engine, prompt)
    return Adopted(sequence=computed.sequence, logits=computed.logits, report=computed.report)


async def _unfinished_block(engine: Engine, prompt: Prompt, handoff: Handoff) -> list[int]:
    """The block with the prompt's last tokens, taken from the handoff; empty if the prompt ends with a whole block."""
    if not prompt.num_tokens % engine.block_size:
        return []
    # Not before the prompt's blocks in memory are in use: if the pool is full, this could evict one of them.
    await asyncio.sleep(0)
    block_ids = engine.blocks.allocate(1)
    try:
        await _put_back_row(engine, block_ids[0], handoff.partial_row)
    except BaseException:
        engine.blocks.release(block_ids)
        raise
    return block_ids


async def _give_back(engine: Engine, unfinished: asyncio.Task[list[int]]) -> None:
    """Give the unfinished block back, when nothing writes into it any more."""
    unfinished.cancel()
    try:
        await uninterrupted(asyncio.wait({unfinished}))
    finally:
        if not unfinished.cancelled() and unfinished.exception() is None:
            engine.blocks.release(unfinished.result())


async def _put_back_row(engine: Engine, block_id: int, row: bytes) -> None:
    target = engine.pool.landing([block_id])[0]
    if len(row) != len(target):
        raise BlockCorrupt(
            f"the handoff's unfinished block has {len(row)} bytes, but a row of the block pool has {len(target)}"
        )
    target[:] = row
    if await engine.compute.run(engine.pool.fill, [block_id]):
        raise BlockUnusable("the handoff's unfinished block holds NaN or infinity")
