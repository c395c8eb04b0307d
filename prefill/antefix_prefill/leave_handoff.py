"""Writes what prefill leaves for decode: the live state after a prompt, under a name that nobody can guess."""

from __future__ import annotations

from antefix_prefill.handoff import Handoff
from antefix_prefill.record_writer import put_quietly
from antefix_prefill.run_prompt import ComputedPrompt
from antefix_prefill.sealed_records import handoff_record
from antefix_prefill.worker.engine import Engine


async def leave_handoff(engine: Engine, computed: ComputedPrompt) -> bytes:
    """The handoff's name; empty if the store could not keep the handoff, in which case the decode worker prefills by
    itself.
    """
    sequence = computed.sequence
    unstored = sequence.position % engine.align_tokens // engine.block_size
    if unstored:
        return b""  # in reproducible mode whole blocks of the last chunk are not in the store, and decode needs them
    partial = sequence.position % engine.block_size
    unfinished = sequence.block_table[-1:] if partial else []
    # One job for both, because on a GPU each job waits for the running work.
    window, rows = await engine.copied(lambda: (sequence.window.to_bytes(), engine.pool.payloads(unfinished)))
    row = b"".join(rows)
    chain = computed.prompt.chain
    handoff = Handoff(
        position=sequence.position, prompt=chain.digest(), window=window, partial_row=row, logits=computed.logits
    )
    record = handoff_record(engine, computed.prompt, handoff.to_bytes())
    is_left = await put_quietly(engine.store, record, engine.counters, engine.patience)
    return record.hash if is_left else b""
