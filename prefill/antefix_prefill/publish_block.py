"""Publishes a finished block: other requests find it by its name in the pool, and listening routers by its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from antefix.block import Chain, TokenArray
from antefix_prefill.worker.engine import Engine


class NamedTokens(Protocol):
    """The sequence that owns the block. tokens: those that were known when the chain was named; an output grows beyond
    them.
    """

    @property
    def tokens(self) -> TokenArray: ...

    @property
    def chain(self) -> Chain: ...

    @property
    def tenant(self) -> str: ...


def publish_block(
    engine: Engine, prompt: NamedTokens, index: int, block_id: int, *, tokens: TokenArray | None = None
) -> None:
    """Block `index` of the chain lies in `block_id`, finished and exact.  tokens: the block's tokens, for an output."""
    chain = prompt.chain
    if not engine.blocks.publish(chain.hashes[index], block_id) or engine.kv_events is None:
        return
    if tokens is None:
        tokens = prompt.tokens[index * chain.block_size : (index + 1) * chain.block_size]
    engine.kv_events.stored(
        chain.hashes[index],
        parent=chain.hashes[index - 1] if index else None,
        tokens=tokens,
        salt=engine.keyring.owner(prompt.tenant).hex() if prompt.tenant else "",
    )


def publish_blocks(engine: Engine, prompt: NamedTokens, first: int, block_ids: Sequence[int]) -> None:
    """Blocks `first` and following of the prompt's chain lie in `block_ids`, finished and exact."""
    if engine.kv_events is None:
        engine.blocks.publish_all(prompt.chain.hashes[first : first + len(block_ids)], block_ids)
        return
    for index, block_id in enumerate(block_ids, first):
        publish_block(engine, prompt, index, block_id)
