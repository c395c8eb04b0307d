"""What prefill leaves for decode: the live state after a prompt, under a name that nobody can guess."""

from __future__ import annotations

import secrets

from antefix.block import HASH_BYTES
from antefix.record import Record, RecordKind
from antefix_prefill.handoff import Handoff
from antefix_prefill.record_writer import put_quietly
from antefix_prefill.run_prompt import ComputedPrompt
from antefix_prefill.worker.engine import Engine

# A handoff is taken as soon as decode has a place; this is for a decode worker that died and was replaced.
HANDOFF_TTL_S = 120.0


async def leave_handoff(engine: Engine, computed: ComputedPrompt) -> bytes:
    """The handoff's name, or empty when the store could not keep it: decode prefills by itself then."""
    sequence = computed.sequence
    unstored = sequence.position % engine.align_tokens // engine.block_size
    if unstored:
        return b""  # in reproducible mode whole blocks of the last chunk are not in the store, and decode needs them
    partial = sequence.position % engine.block_size
    window = await engine.compute.run(sequence.window.to_bytes)
    unfinished = sequence.block_table[-1:] if partial else []
    row = b"".join(await engine.compute.run(engine.pool.payloads, unfinished))
    chain = computed.prompt.chain
    handoff = Handoff(
        position=sequence.position, prompt=chain.digest(), window=window, partial_row=row, logits=computed.logits
    )
    record = Record(
        kind=RecordKind.HANDOFF,
        hash=secrets.token_bytes(HASH_BYTES),  # unguessable: whoever knows the name may take the handoff
        parent=chain.parent(len(chain)),
        fingerprint=engine.fingerprint,
        position=sequence.position,
        payload=handoff.to_bytes(),
        tenant=computed.prompt.tenant,
        ttl_s=HANDOFF_TTL_S,
    )
    return record.hash if await put_quietly(engine.store, record, engine.counters) else b""
