"""The interface of a window pool. The interface knows hashes and bytes, never tokens or tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from antefix.record import Record

# The tier's name in plans and in measured rates.
POOL_TIER = "pool"
# Boundaries asked for at once. A checkpoint further from the hit's end than a replay is long is never worth loading,
# and V4's replays are 43 to 61 blocks long.
NAMES_MAX = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A checkpoint that was found in the pool. index: the position of its name in the request. payload: its verified
    payload.
    """

    index: int
    payload: bytes


class WindowPool(Protocol):
    """Checkpoints by block hash. Any method may raise Unavailable, which the caller counts and treats as a
    cache miss.
    """

    async def put(self, record: Record) -> bool:
        """Keep a checkpoint for `record.ttl_s`. Returns False if the pool has no room, or is known to be down, so that
        the caller stores the checkpoint elsewhere.
        """

    async def nearest(self, names: Sequence[bytes], *, fingerprint: bytes, tenant: bytes = b"") -> Found | None:
        """The first of `names` that the pool has, with its payload: for these sizes a look-up costs as much as a load.

        tenant: the owner that the checkpoint must have, as in `antefix.store.api.Store`.
        """

    async def close(self) -> None: ...
