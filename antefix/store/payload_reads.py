"""Payloads of one store, received into buffers: a stream that breaks continues where it stopped."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from antefix.errors import BlockCorrupt, Unavailable
from antefix.record import RecordKind
from antefix.store.pieces import join_hashes
from antefix.store.store_connection import StoreConnection
from antefix.store.stream_progress import BufferOf, Progress
from antefix.store_files.record_format import RECORD_VERSION
from antefix.store_files.seal import SealBroken, Seals
from antefix.v1 import kvstore_pb2

# The most for a stream of payloads: 3.5 GB, a 1M-token prefix, at 100 MB/s. Mostly `Breaker.limit_s` is less.
STREAM_DEADLINE_S: Final = 60.0
# How large one payload is taken to be before it comes: a checkpoint or handoff of V4 takes some MB.
PAYLOAD_BYTES_GUESSED: Final = 16 << 20
# A stream that breaks continues where it stopped, this often.
NUM_RESUMES_MAX: Final = 3
_RECONNECT_S: Final = 0.15


@dataclass(frozen=True, slots=True, kw_only=True)
class PayloadsWanted:
    """Records of one kind.  nbytes: about how much comes.  sealed: where given, takes each record's sealed part."""

    kind: RecordKind
    hashes: Sequence[bytes]
    fingerprint: bytes
    tenant: bytes
    nbytes: int
    sealed: list[bytes] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PayloadsRead:
    """num_good: leading payloads that are right.  forged: the record behind them has no right seal; empty: not so."""

    num_good: int
    forged: bytes = b""


async def receive_payloads(
    connection: StoreConnection, wanted: PayloadsWanted, buffer: BufferOf, *, seals: Seals | None, deadline_s: float
) -> PayloadsRead:
    """Fill buffers from a stream, resuming where it broke.  seals: where given, only sealed records are right.

    Raises:  AntefixError: the store does not answer, or refuses.
    """
    hashes = wanted.hashes
    done = Progress(wanted.kind, hashes, wanted.fingerprint, tenant=wanted.tenant, seals=seals, sealed=wanted.sealed)
    record_format = RECORD_VERSION
    for attempt in range(NUM_RESUMES_MAX + 1):
        request = kvstore_pb2.GetRequest(
            kind=wanted.kind.value,  # type: ignore[arg-type]
            hashes=join_hashes(hashes),
            fingerprint=wanted.fingerprint,
            first=done.index,
            offset=done.offset,
            record_format=record_format,
            wants_seals=seals is not None or wanted.sealed is not None,
        )
        limit_s = connection.breaker.limit_s(wanted.nbytes, deadline_s)
        try:
            with connection.asked(wanted.nbytes):
                await connection.payloads.receive(request, done, buffer, deadline_s=limit_s)
            return PayloadsRead(num_good=done.index)
        except SealBroken:
            # Whole, so the store would send it again.
            return PayloadsRead(num_good=done.index, forged=hashes[done.index])
        except (Unavailable, BlockCorrupt) as err:
            if attempt == NUM_RESUMES_MAX:
                raise
            if isinstance(err, Unavailable) and connection.breaker.is_just_back:
                # Another connection has noticed; this one is to be made again.
                await asyncio.sleep(_RECONNECT_S * 2**attempt)
            if isinstance(err, BlockCorrupt):
                # On its way or in the store: have the store look itself. What it finds bad it counts, quarantines
                # and does not send.
                record_format = 0
    raise AssertionError("unreachable")
