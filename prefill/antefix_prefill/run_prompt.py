"""Runs a prompt: restores what is stored, computes the rest in chunks, writes what is new.

Chunks end at multiples of `prefill_chunk`, counted from token 0 (never from the hit). On a CPU results do not depend on
where chunks end (docs/ARCHITECTURE.md, "Exactness"), so the window state at a checkpoint's position is copied on the
way, which saves a call of the model. Elsewhere chunks also end at each position where a checkpoint is to be written. If
results depend on where chunks end, as in reproducible mode, the blocks of a prompt's unfinished last chunk serve only
this prompt and are not stored.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from antefix.errors import InternalError, NotFinite, Overloaded
from antefix.model import Ran, Sequence, WindowState, follow_ran, run_tokens
from antefix.model.finite import are_numbers
from antefix.restore_report import RestoreReport
from antefix.telemetry import span
from antefix.window import Mark
from antefix_prefill.late_store import LateRestore, flush_in_time, restore_in_time
from antefix_prefill.leave_checkpoints import leave_checkpoint, marks_for_prompt
from antefix_prefill.model_step import model_step
from antefix_prefill.publish_block import publish_block
from antefix_prefill.record_writer import RecordWriter
from antefix_prefill.restore import Prompt, Restored
from antefix_prefill.sealed_records import block_record
from antefix_prefill.worker.engine import Engine
from antefix_prefill.worker.plan_log import PlanOutcome

# A chunk holds at most so many window states until they are written.
_STATES_MAX = 4


@dataclass(slots=True)
class ComputedPrompt:
    """A prompt's KV in the pool, and its last token's logits. `release` must be called when the prompt is done. logits:
    [vocab] float32.
    """

    prompt: Prompt
    sequence: Sequence
    logits: npt.NDArray[np.float32]
    report: RestoreReport


async def run_prompt(engine: Engine, prompt: Prompt) -> ComputedPrompt:
    """The prompt's KV; everything that is new in it has been stored, or counted as not storable, or is being written to
    a store that is late. The caller releases the blocks.

    Raises:  Overloaded: no room in the pool.
    """
    started = time.perf_counter()
    engine.budget.refresh_soon()
    writer = RecordWriter(
        engine.store, engine.counters, engine.window_pool, writes=not engine.borrows, patience=engine.patience
    )
    # 1. Restore the longest prefix that is worth restoring. If the store is late, the restore continues next to step 2.
    with span("restore", prompt_tokens=prompt.num_tokens) as restoring:
        restored, late = await restore_in_time(engine, prompt, writer)
        report = restored.report
        restoring.set(
            plan=report.plan,
            hit_tokens=report.hit_tokens,
            hit_memory_tokens=report.hit_memory_tokens,
            replayed_tokens=report.replayed_tokens,
            miss_reason=report.miss_reason,
            bytes_read=report.bytes_read,
        )
    restored_s = time.perf_counter() - started
    try:
        # 2. Compute the rest, while finished blocks go to the store. First store again the blocks that the store lost
        #    and the pool still has: without these ancestors the store would refuse the new blocks.
        await _put_back(engine, prompt, restored, writer)
        logits = await _compute(engine, prompt, restored, writer, late)
        while isinstance(logits, Restored):
            # The late restore is further than what was computed meanwhile, which is given back.
            writer.drop()
            engine.blocks.release(restored.sequence.block_table)
            restored, restored_s = logits, time.perf_counter() - started
            await _put_back(engine, prompt, restored, writer)
            logits = await _compute(engine, prompt, restored, writer, None)
        report = restored.report
        report.restore_s = restored_s
        report.compute_s = time.perf_counter() - started - report.restore_s
        # 3. The decode worker reads the blocks from the store, so they must be there before it gets the request.
        with span("store", part="prompt"):
            await flush_in_time(engine, writer, restored.sequence.block_table)
    except BaseException:
        if late is not None:
            late.cancel()
        try:
            await writer.flush()  # rows must not be reused while they are written; finished blocks are worth storing
        finally:
            engine.blocks.release(restored.sequence.block_table)
        raise
    report.written_tokens = writer.num_blocks_written * engine.block_size
    report.bytes_written = writer.bytes_written
    report.write_error = writer.error
    if late is None:
        actual_s = report.restore_s + report.compute_s
        engine.planner.record(restored.plan, actual_s)
        engine.plans.add(
            PlanOutcome(plan=restored.plan, plans=restored.plans, num_tokens=prompt.num_tokens, actual_s=actual_s)
        )
    return ComputedPrompt(prompt=prompt, sequence=restored.sequence, logits=logits, report=report)


async def _put_back(engine: Engine, prompt: Prompt, restored: Restored, writer: RecordWriter) -> None:
    missing = range(restored.num_stored_blocks, restored.plan.resume_block)
    block_ids = [restored.sequence.block_table[index] for index in missing]
    if not block_ids:
        return
    payloads = await engine.compute.run(engine.pool.payloads, block_ids)
    for index, payload in zip(missing, payloads, strict=True):
        await writer.put(block_record(engine, prompt, index, payload))


async def _compute(
    engine: Engine, prompt: Prompt, restored: Restored, writer: RecordWriter, late: LateRestore | None
) -> npt.NDArray[np.float32] | Restored:
    """The last token's logits; or, if a late restore is further than what was computed, what it restored."""
    sequence = restored.sequence
    marks = {mark.block * engine.block_size: mark for mark in marks_for_prompt(engine, prompt, restored)}
    if mark := marks.get(sequence.position):
        await leave_checkpoint(engine, prompt, sequence.window, mark, writer)
    logits: npt.NDArray[np.float32] | None = None
    context, begun = sequence.position, time.perf_counter()
    while sequence.position < prompt.num_tokens:
        first = sequence.position
        if late is not None and late.is_open and (further := await late.further(first, restored.report)):
            return further
        stop = _next_stop(engine, prompt, first, marks)
        try:
            grow(engine, sequence, stop)
        except Overloaded:
            if late is None or not late.is_open:
                raise
            # The restore has blocks too. It ends in any case, since every call to the store has a time limit.
            await late.ended()
            continue
        # In reproducible mode a longer prompt would run these tokens in a whole chunk and get other bits.
        last = stop // engine.block_size if stop % engine.align_tokens == 0 else first // engine.block_size
        new = range(max(first // engine.block_size, restored.num_stored_blocks), last)
        tokens, is_last = prompt.tokens[first:stop], stop == prompt.num_tokens
        with span("prefill chunk", first=first, num_tokens=stop - first):
            passed = [position for position in sorted(marks) if first < position < stop]
            piece = _Piece(engine, sequence, tokens, new, is_last, [position - first for position in passed])
            with model_step(first):
                done = await _run_piece(piece, prompt.num_tokens - first, begun)
        logits = done.logits
        for index in range(first // engine.block_size, last):
            if late is not None:
                late.publish(index, sequence.block_table[index])
            else:
                publish_block(engine, prompt, index, sequence.block_table[index])
        for index, payload in zip(new, done.payloads, strict=True):
            await writer.put(block_record(engine, prompt, index, payload))
        for position, window in zip(passed, done.windows, strict=True):
            await leave_checkpoint(engine, prompt, window, marks[position], writer)
        if mark := marks.get(stop):
            await leave_checkpoint(engine, prompt, sequence.window, mark, writer)
    if late is not None:
        late.finish()
    else:
        engine.rates.observe_prefill(prompt.num_tokens - context, context=context, seconds=time.perf_counter() - begun)
    if logits is None:
        raise InternalError("a restored prefix covers the whole prompt, so no token is left to compute")
    return logits


def _next_stop(engine: Engine, prompt: Prompt, first: int, marks: dict[int, Mark]) -> int:
    grid = (first // engine.prefill_chunk + 1) * engine.prefill_chunk
    num_passed = _STATES_MAX if engine.align_tokens == 1 and engine.device.type == "cpu" else 0
    ends = sorted(position for position in marks if position > first)[num_passed : num_passed + 1]
    stop = min([prompt.num_tokens, grid, *ends])
    # Where bits depend on shapes, a chunk must be as long as in any other run of the prompt.
    return first + engine.compute.chunk_tokens_max(stop - first) if engine.align_tokens == 1 else stop


def grow(engine: Engine, sequence: Sequence, num_tokens: int) -> None:
    """Allocate blocks so that the sequence has room for `num_tokens` in total.

    Raises:  Overloaded: no room in the pool.
    """
    missing = -(-num_tokens // engine.block_size) - len(sequence.block_table)
    if missing > 0:
        after = sequence.block_table[-1] if sequence.block_table else None
        sequence.block_table.extend(engine.blocks.allocate(missing, after=after))


@dataclass(frozen=True, slots=True)
class _Piece:
    """new: blocks whose payloads are wanted. is_last: whether the chunk has the prompt's last token, whose logits are
    wanted. passed: after how many of its tokens, in ascending order, the window state is wanted too.
    """

    engine: Engine
    sequence: Sequence
    tokens: npt.NDArray[np.uint32]
    new: range
    is_last: bool
    passed: list[int]


@dataclass(frozen=True, slots=True)
class _PieceResult:
    """logits: the last token's, if they are wanted. payloads: of the piece's new blocks. windows: those wanted."""

    logits: npt.NDArray[np.float32] | None
    payloads: list[memoryview]
    windows: list[WindowState]


async def _run_piece(piece: _Piece, remaining: int, began: float) -> _PieceResult:
    compute, num_tokens = piece.engine.compute, len(piece.tokens)
    if piece.engine.align_tokens == 1:
        return await compute.run_piece(remaining, began, _run_pieces, piece, num_tokens)
    # Arithmetic depends on shapes here, so tokens of other prompts in the same call would change this prompt's bits.
    result = await compute.run_chunk(remaining, began, _run_pieces, [piece])
    if isinstance(result[0], Exception):
        raise result[0]
    return result[0]


def _run_pieces(pieces: list[_Piece]) -> list[_PieceResult | Exception]:
    """Run chunks of several prompts in one call of the model. Runs in the compute thread."""
    engine = pieces[0].engine
    ran = run_tokens(engine.model, engine.pool, [(each.sequence, each.tokens) for each in pieces], ops=engine.ops)
    results: list[_PieceResult | Exception] = []
    for number, piece in enumerate(pieces):
        try:
            results.append(_finish_piece(piece, ran, number))
        except Exception as err:  # noqa: BLE001 - returned to this piece's prompt; the others continue
            results.append(err)
    return results


def _finish_piece(piece: _Piece, ran: Ran, number: int) -> _PieceResult:
    engine, sequence = piece.engine, piece.sequence
    windows = []
    for count in piece.passed:
        _keep(piece, ran, number, count)
        windows.append(sequence.window.clone())
    _keep(piece, ran, number, len(piece.tokens))
    logits: npt.NDArray[np.float32] | None = ran.logits[number].float().cpu().numpy() if piece.is_last else None
    # Without new blocks the host does not wait for the GPU: it prepares the next chunk while this one runs.
    block_ids = [sequence.block_table[index] for index in piece.new]
    payloads = engine.pool.payloads(block_ids) if piece.new else []
    if engine.pool.unusable(block_ids) or (logits is not None and not are_numbers(logits)):
        raise not_finite(sequence.position)
    return _PieceResult(logits, payloads, windows)


def _keep(piece: _Piece, ran: Ran, number: int, count: int) -> None:
    """Advance the sequence until the piece's first `count` tokens are kept."""
    engine, window = piece.engine, piece.sequence.window
    before = window.position
    ran.keep(number, count)
    if engine.model.mtp:
        new = piece.tokens[count - (window.position - before) : count]
        follow_ran(engine.model, ran, number, window, new, stop=count, ops=engine.ops)


def not_finite(position: int) -> NotFinite:
    """The error for NaN or infinity: nothing computed from such values may be stored or be an answer."""
    return NotFinite(f"the model computed NaN or infinity by token {position}; nothing from there on was stored")
