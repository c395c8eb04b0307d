"""Converts a store's contents to and from protobuf, for copies from a store that is served."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from antefix.errors import InternalError
from antefix.store.pieces import join_hashes, split_hashes
from antefix.store.plan_wire import plans_from_wire, plans_to_wire
from antefix.v1 import kvstore_pb2
from antefix_kvstore.store_contents import LayoutOf, StoreContents, Stretch

# Hashes in one message: some 100 KB.
_HASHES_PER_MESSAGE = 2048


def contents_to_wire(contents: StoreContents) -> Iterator[kvstore_pb2.ContentsResponse]:
    """Protobuf messages that carry first the layouts, then the stretches as `StoreContents.stretches` returns them; a
    long stretch takes several messages.
    """
    layouts = [
        kvstore_pb2.RegisterRequest(
            fingerprint=layout.fingerprint,
            block_size=layout.block_tokens,
            statement=layout.statement,
            **plans_to_wire(layout.plans),
        )
        for layout in contents.layouts()
    ]
    yield kvstore_pb2.ContentsResponse(layouts=layouts)
    message, num_hashes = kvstore_pb2.ContentsResponse(), 0
    for stretch in contents.stretches():
        for part in _parts_of(stretch):
            message.stretches.append(_to_wire(part))
            num_hashes += len(part.hashes)
            if num_hashes >= _HASHES_PER_MESSAGE:
                yield message
                message, num_hashes = kvstore_pb2.ContentsResponse(), 0
    yield message


def layout_from_wire(message: kvstore_pb2.RegisterRequest) -> LayoutOf:
    return LayoutOf(
        fingerprint=message.fingerprint,
        block_tokens=message.block_size,
        plans=plans_from_wire(message),
        statement=message.statement,
    )


def stretch_from_wire(message: kvstore_pb2.StoredStretch) -> Stretch:
    """Raises:  InternalError: it has checkpoints or times for blocks that it does not contain."""
    hashes = tuple(split_hashes(message.hashes))
    stretch = Stretch(
        fingerprint=message.fingerprint,
        owner=message.owner,
        hashes=hashes,
        checkpoints=tuple(message.checkpoints),
        rank_ms=message.rank_ms,
        pinned_ms=message.pinned_ms,
        nbytes=message.nbytes,
        has_blocks=message.has_blocks,
        ttls_s=tuple(message.ttls_s),
        costs_ms=tuple(message.costs_ms),
    )
    if any(number >= len(hashes) for number in stretch.checkpoints) or len(stretch.ttls_s) != len(stretch.names):
        raise InternalError("a store's answer is inconsistent: its lists of names, hashes and times differ in length")
    return stretch


def _to_wire(stretch: Stretch) -> kvstore_pb2.StoredStretch:
    return kvstore_pb2.StoredStretch(
        fingerprint=stretch.fingerprint,
        owner=stretch.owner,
        hashes=join_hashes(stretch.hashes),
        checkpoints=stretch.checkpoints,
        rank_ms=stretch.rank_ms,
        pinned_ms=stretch.pinned_ms,
        nbytes=stretch.nbytes,
        has_blocks=stretch.has_blocks,
        ttls_s=stretch.ttls_s,
        costs_ms=stretch.costs_ms,
    )


def _parts_of(stretch: Stretch) -> Sequence[Stretch]:
    """Cut a stretch into pieces of one message each, parents first."""
    if len(stretch.hashes) <= _HASHES_PER_MESSAGE:
        return [stretch]
    return [
        stretch.part(first, min(first + _HASHES_PER_MESSAGE, len(stretch.hashes)))
        for first in range(0, len(stretch.hashes), _HASHES_PER_MESSAGE)
    ]
