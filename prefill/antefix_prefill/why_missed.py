"""Why the first block that missed did, as far as the store can tell. It explains a bill and decides nothing."""

from __future__ import annotations

from typing import Final

from antefix.block import Chain, HashKind, Tokens, differing_fields, hash_kind_of
from antefix.errors import AntefixError
from antefix.miss_reason import MissReason
from antefix_prefill.worker.engine import Engine

# A store that serves many namespaces must not make a miss slow: naming 128K tokens takes up to 1 ms.
_NUM_FINGERPRINTS_TRIED: Final = 4


async def why_missed(
    engine: Engine, chain: Chain, tokens: Tokens, *, tenant: str, index: int, came_short: bool
) -> MissReason:
    """The reason of block `index`, the first that is not there; asked before it is computed and stored.

    came_short: the store promised the block and reading it failed.
    """
    try:
        found = await engine.store.fate(chain.hashes[index], fingerprint=engine.fingerprint)
        if found.reason is MissReason.NONE:
            # Read in vain, it is broken, though nobody may have judged it yet; else someone has stored it just now.
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
    """Set-ups whose arithmetic alone differs are meant to share, and do not."""
    if mine and other and differing_fields(mine, other) == ("arithmetic",):
        return MissReason.ARITHMETIC_DIFFERS
    return MissReason.FINGERPRINT_DIFFERS


async def _is_stored_as(engine: Engine, fingerprint: bytes, statement: bytes, tokens: Tokens, tenant: str) -> bool:
    """Whether these whole blocks of tokens are stored under another fingerprint, of the same tenant."""
    kind = hash_kind_of(statement)
    if kind is HashKind.ENGINE_KEY:
        return False
    chain = Chain(fingerprint, engine.keyring.key(tenant), engine.block_size, kind)
    chain.extend(tokens)
    owner = engine.keyring.owner(tenant)
    found = await engine.store.lookup(chain.hashes, fingerprint=fingerprint, tenant=owner)
    return found.num_blocks == len(chain)
