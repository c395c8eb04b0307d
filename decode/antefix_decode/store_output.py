"""Stores an output's KV while it grows: each finished block at once, and the checkpoint of its end when it ends."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from antefix.model import Sequence, WindowState
from antefix.window import Reason
from antefix_prefill.leave_checkpoints import leave_checkpoint, marks_for_output
from antefix_prefill.publish_block import publish_block
from antefix_prefill.record_writer import RecordWriter
from antefix_prefill.restore import Prompt
from antefix_prefill.run_prompt import not_finite
from antefix_prefill.sealed_records import block_record
from antefix_prefill.worker.engine import Engine


class StorableOutput(Protocol):
    """A sequence being generated. `prompt.chain` grows with the output. boundary_window: window state at the output's
    last block boundary.
    """

    prompt: Prompt
    sequence: Sequence
    writer: RecordWriter
    prompt_tokens: int
    boundary_window: WindowState | None


async def store_token(engine: Engine, output: StorableOutput, token: int) -> None:
    """This method must be called when `token` has been run. If the token completed a block, the block is named and
    stored, and its window state is kept.
    """
    before = output.prompt.chain.unfinished
    output.prompt.chain.extend([token])
    position = output.sequence.position
    if position % engine.block_size or not engine.stores_output:
        return
    index = position // engine.block_size - 1
    block_id = output.sequence.block_table[index]
    payload = await engine.copied(lambda: _usable_payload(engine, block_id))
    if payload is None:
        raise not_finite(position)
    publish_block(engine, output.prompt, index, block_id, tokens=np.append(before, np.uint32(token)))
    await output.writer.put(block_record(engine, output.prompt, index, payload))
    output.boundary_window = output.sequence.window.clone()
    for mark in marks_for_output(engine, num_tokens=position, prompt_tokens=output.prompt_tokens):
        if mark.block == index + 1 and mark.reason is not Reason.OUTPUT_END:
            await leave_checkpoint(engine, output.prompt, output.boundary_window, mark, output.writer)


def _usable_payload(engine: Engine, block_id: int) -> memoryview | None:
    """The payload of a block; None if it holds NaN or infinity. The work is one job, because on a GPU each job waits
    for the running work.
    """
    (payload,) = engine.pool.payloads([block_id])
    return None if engine.pool.unusable([block_id]) else payload


async def store_end(engine: Engine, output: StorableOutput) -> None:
    """Store the checkpoint at the output's last boundary, from which the next turn continues. Returns when all is
    durable, or the store is late.
    """
    window = output.boundary_window
    position = output.sequence.position
    for mark in marks_for_output(engine, num_tokens=position, prompt_tokens=output.prompt_tokens):
        if window is not None and window.position == mark.block * engine.block_size:
            await leave_checkpoint(engine, output.prompt, window, mark, output.writer)
    await output.writer.flush_in_time()
