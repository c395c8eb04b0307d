"""Finds the part of a prompt that is stored under an older secret, while the deployment's secrets rotate.

The part that is stored under an older secret is read by its older names and stored again under the present names, like
any block that the store has lost. So KV that is used moves to the new names, and KV that is not used expires by its
time to live.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

from antefix.block import Tokens
from antefix.record import LookupResult
from antefix_prefill.worker.engine import Engine


@dataclass(frozen=True, slots=True, kw_only=True)
class OlderNames:
    """Blocks [first, num_blocks) of a prompt, and `checkpoints`, are stored under these `hashes` and this `owner`."""

    owner: bytes
    hashes: Seq[bytes]
    first: int
    num_blocks: int
    checkpoints: frozenset[int]


async def find_older(engine: Engine, tenant: str, tokens: Tokens, found: LookupResult) -> OlderNames | None:
    """The older names, if more of the prompt is stored under them than was found before; None if there is no more.

    Raises:  AntefixError: the store does not answer.
    """
    best: OlderNames | None = None
    for generation in engine.keyring.generations[1:]:
        at_least = best.num_blocks if best else found.num_blocks
        if at_least >= len(tokens) // engine.block_size:
            break
        chain = engine.chain(tenant, generation)
        chain.extend(tokens)
        owner = engine.keyring.owner(tenant, generation)
        stored = await engine.store.lookup(chain.hashes, fingerprint=engine.fingerprint, tenant=owner)
        if stored.num_blocks > at_least:
            best = OlderNames(
                owner=owner,
                hashes=chain.hashes,
                first=found.num_blocks,
                num_blocks=stored.num_blocks,
                checkpoints=frozenset(stored.checkpoints) - frozenset(found.checkpoints),
            )
    return best
