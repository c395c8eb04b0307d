"""Converts `Held`, what a store holds of a chain, from protobuf. Its callers never see protobuf."""

from __future__ import annotations

from itertools import chain, pairwise

from antefix.errors import InternalError
from antefix.record import Held
from antefix.v1 import kvstore_pb2


def held_to_wire(held: Held) -> kvstore_pb2.LookupResponse:
    return kvstore_pb2.LookupResponse(
        num_blocks=held.num_leading,
        checkpoints=held.checkpoints,
        spans=chain.from_iterable(held.spans),
        knows_cached=held.cached is not None,
        cached=chain.from_iterable(held.cached or ()),
        cached_checkpoints=held.cached_checkpoints,
    )


def held_from_wire(response: kvstore_pb2.LookupResponse) -> Held:
    """`Held` of a response. A store of an earlier version reports only a prefix of the chain.

    Raises:  InternalError: the spans are malformed.
    """
    flat = tuple(response.spans)
    if not flat and response.num_blocks:
        flat = (0, response.num_blocks)
    cached = tuple(response.cached)
    if any(len(each) % 2 or any(a >= b for a, b in pairwise(each)) for each in (flat, cached)):
        raise InternalError("a store's answer names the blocks that it has in spans that are not in order")
    return Held(
        spans=_pairs(flat),
        checkpoints=tuple(response.checkpoints),
        cached=_pairs(cached) if response.knows_cached else None,
        cached_checkpoints=tuple(response.cached_checkpoints),
    )


def _pairs(flat: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(zip(flat[::2], flat[1::2], strict=True))
