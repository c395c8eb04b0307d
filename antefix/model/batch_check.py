"""What a sequence's new tokens must satisfy before a forward pass runs them."""

from __future__ import annotations

from antefix.block import TokenArray
from antefix.errors import InternalError, InvalidRequest
from antefix.model.model import Model
from antefix.model.pool import BlockPool
from antefix.model.window_state import Sequence


def check_piece(model: Model, pool: BlockPool, sequence: Sequence, tokens: TokenArray) -> None:
    """Raises:  InvalidRequest: a token id or the sequence's length exceeds the model's.  InternalError: the sequence's
    state or block table does not fit the model or the pool, or there are no tokens.
    """
    end = sequence.position + len(tokens)
    if not len(tokens):
        raise InternalError("a chunk of a sequence needs at least one token")
    if (largest := int(tokens.max())) >= model.config.vocab_size:
        raise InvalidRequest(f"token id {largest} is outside the vocabulary of {model.config.vocab_size}")
    if end > model.config.max_position_embeddings:
        raise InvalidRequest(f"{end} tokens exceed the model's {model.config.max_position_embeddings} positions")
    if sequence.window.layout != model.layout:
        raise InternalError("a window state was made for another layout of KV than the model's")
    num_blocks = -(-end // model.config.geometry.block_size)
    table = sequence.table
    if len(table.ids) < num_blocks:
        raise InternalError(f"{end} tokens need {num_blocks} blocks, the block table has {len(table.ids)}")
    if table.smallest < 0 or table.largest >= pool.num_blocks:
        raise InternalError(f"the block table names blocks outside the pool of {pool.num_blocks}")
