"""Why the first block that missed did, as far as the store can tell. It explains a bill and decides nothing."""

from __future__ import annotations

from typing import Final

from antefix.block import Chain, Tokens, differing_fields
from antefix.errors import AntefixError
from antefix.record import Fate
from antefix_prefill.worker.engine import Engine

# The same tokens of the same model are stored, computed by a set-up that rounds differently.
ARITHMETIC_DIFFERS: Final = "arithmetic_differs"
# A store that serves many namespaces must not make a miss slow: naming 128K tokens anew takes 0.7 ms.
_NUM_FINGERPRINTS_TRIED: Final = 4


async def miss_reason(
    engine: Engine, chain: Chain, tokens: Tokens, *, tenant: str, index: int, came_short: bool
) -> str:
    """The reason of block `index`, the first that is not there; asked before it is computed and stored.

    came_short: the store promised the block and reading it failed.
    """
    try:
        found = await engine.store.fate(chain.hashes[index], fingerprint=engine.fingerprint)
        if found.fate is Fate.STORED:
            # Read in vain, it is broken, though nobody may have judged it yet; else someone has stored it just now.
            return Fate.CORRUPT.value if came_short else "first_seen"
        if found.fate is not Fate.UNKNOWN:
            return found.fate.value
        others = list(zip(found.fingerprints, found.statements, strict=True))
        for other, statement in others[-_NUM_FINGERPRINTS_TRIED:]:
            if await _is_stored_as(engine, other, tokens[: (index + 1) * chain.block_size], tenant):
                return _what_differs(engine.statement, statement)
    except AntefixError as err:
        engine.counters.note(err)
        return "store_unavailable"
    return "first_seen"


def _what_differs(mine: bytes, other: bytes) -> str:
    """Set-ups whose arithmetic alone differs are meant to share, and do not."""
    if mine and other and differing_fields(mine, other) == ("arithmetic",):
        return ARITHMETIC_DIFFERS
    return Fate.FINGERPRINT_DIFFERS.value


async def _is_stored_as(engine: Engine, fingerprint: bytes, tokens: Tokens, tenant: str) -> bool:
    """Whether these whole blocks of tokens are stored under another fingerprint, of the same tenant."""
    chain = Chain(fingerprint, engine.keyring.key(tenant), engine.block_size)
    chain.extend(tokens)
    owner = engine.keyring.owner(tenant)
    found = await engine.store.lookup(chain.hashes, fingerprint=fingerprint, tenant=owner)
    return found.num_blocks == len(chain)
