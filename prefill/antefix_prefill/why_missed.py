"""Why the first missing block of a prompt is missing, as far as the store can tell. The answer explains a bill, and no
decision depends on it.
"""

from __future__ import annotations

from typing import Final

from antefix.block import Chain, HashKind, Tokens, differing_fields, hash_kind_of
from antefix.errors import AntefixError
from antefix.miss_reason import MissReason
from antefix_prefill.worker.engine import Engine

# A limit, because a store may serve many namespaces and a miss must stay fast: naming 128K tokens takes up to 1 ms.
_NUM_FINGERPRINTS_TRIED: Final = 4


async def why_missed(
    engine: Engine, chain: Chain, tokens: Tokens, *, tenant: str, index: int, came_short: bool
) -> MissReason:
    """Why block `index`, the first missing one, is missing. This method must be called before the block is computed and
    stored.

    came_short: whether the store promised the block and reading it failed.
    """
    try:
        found = await engine.store.fate(chain.hashes[index], fingerprint=engine.fingerprint)
        if found.reason is MissReason.NONE:
            # If reading it failed, it is broken, even if no check has marked it yet. Else it was stored a moment ago.
            return MissReason.CORRUPT if came_short else MissReason.FIRST_SEEN
        if found.reason is not MissReason.FIRST_SEEN:
            return found.reason
        others = list(zip(found.fingerprints, found.statements, strict=True))
        for other, statement in others[-_NUM_FINGERPRINTS_TRIED:]:
            if await _is_stored_as(engine, other, statement, tokens[: (index + 1) * chain.block_size], tenant):
                return _what_differs(engine.statement, statement)
    except AntefixError as err:
        engine.counters.note(err)
        return MissReason.STORE_UNAVAILABLE
    return MissReason.FIRST_SEEN


def _what_differs(mine: bytes, other: bytes) -> MissReason:
    """The difference between two set-ups. If only the arithmetic of two fingerprints differs, they were meant to share
    KV but cannot.
    """
    if mine and other and differing_fields(mine, other) == ("arithmetic",):
        return MissReason.ARITHMETIC_DIFFERS
    return MissReason.FINGERPRINT_DIFFERS


async def _is_stored_as(engine: Engine, fingerprint: bytes, statement: bytes, tokens: Tokens, tenant: str) -> bool:
    """Whether the same tenant has these whole blocks of tokens stored under another fingerprint."""
    kind = hash_kind_of(statement)
    if kind is None or kind is HashKind.ENGINE_KEY:
        return False
    chain = Chain(fingerprint, engine.keyring.key(tenant), engine.block_size, kind)
    chain.extend(tokens)
    owner = engine.keyring.owner(tenant)
    found = await engine.store.lookup(chain.hashes, fingerprint=fingerprint, tenant=owner)
    return found.num_blocks == len(chain)
