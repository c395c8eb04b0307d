"""The records that a worker makes, each sealed: blocks, checkpoints and handoffs."""

from __future__ import annotations

import secrets

from antefix.block import HASH_BYTES
from antefix.record import Buffer, Record, RecordKind
from antefix.window import Mark
from antefix_prefill.restore import Prompt
from antefix_prefill.worker.engine import Engine

# Decode takes a handoff as soon as it has a place. This time allows for a decode worker that dies and is replaced.
HANDOFF_TTL_S = 120.0


def block_record(engine: Engine, prompt: Prompt, index: int, payload: memoryview) -> Record:
    """The record of block `index` of the chain; its payload is the pool's memory, not a copy."""
    return engine.seals.seal(
        Record(
            kind=RecordKind.BLOCK,
            hash=prompt.chain.hashes[index],
            parent=prompt.chain.parent(index),
            fingerprint=engine.fingerprint,
            position=(index + 1) * engine.block_size,
            payload=payload,
            tenant=engine.keyring.owner(prompt.tenant),
            labels=engine.labels,
            cost_s=engine.rates.prefill_s(engine.block_size, context=index * engine.block_size),
        )
    )


def checkpoint_record(engine: Engine, prompt: Prompt, mark: Mark, payload: Buffer) -> Record:
    """The record of window state at the boundary that the mark names."""
    position = mark.block * engine.block_size
    return engine.seals.seal(
        Record(
            kind=RecordKind.CHECKPOINT,
            hash=prompt.chain.hashes[mark.block - 1],
            parent=prompt.chain.parent(mark.block - 1),
            fingerprint=engine.fingerprint,
            position=position,
            payload=payload,
            tenant=engine.keyring.owner(prompt.tenant),
            labels=engine.labels,
            ttl_s=mark.ttl_s,
            cost_s=engine.rates.replay_s(mark.saved_tokens, context=position),
        )
    )


def handoff_record(engine: Engine, prompt: Prompt, payload: Buffer) -> Record:
    """The record of live state after the whole prompt. The record's name is random, and anyone who knows the name may
    take the handoff.
    """
    chain = prompt.chain
    return engine.seals.seal(
        Record(
            kind=RecordKind.HANDOFF,
            hash=secrets.token_bytes(HASH_BYTES),
            parent=chain.parent(len(chain)),
            fingerprint=engine.fingerprint,
            position=prompt.num_tokens,
            payload=payload,
            tenant=engine.keyring.owner(prompt.tenant),
            labels=engine.labels,
            ttl_s=HANDOFF_TTL_S,
        )
    )
