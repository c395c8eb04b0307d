"""Receives payloads of one store into buffers. If a stream breaks, the reading continues at the byte where the stream
stopped.
"""

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

# The longest time for a stream of payloads: enough for 3.5 GB, a 1M-token prefix, at 100 MB/s, with a reserve. The
# limit that applies, `Breaker.limit_s`, is usually shorter.
STREAM_DEADLINE_S: Final = 60.0
# The assumed size of a payload whose size is not known yet: a checkpoint or handoff of V4 has a few MB.
PAYLOAD_BYTES_GUESSED: Final = 16 << 20
# How often a broken stream is resumed.
NUM_RESUMES_MAX: Final = 3
_RECONNECT_S: Final = 0.15


@dataclass(frozen=True, slots=True, kw_only=True)
class PayloadsWanted:
    """The records to receive, all of one kind.

    nbytes: about how many bytes will arrive.  sealed: if given, each record's sealed header part is appended to it.
    """

    kind: RecordKind
    hashes: Sequence[bytes]
    fingerprint: bytes
    tenant: bytes
    nbytes: int
    sealed: list[bytes] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PayloadsRead:
    """num_good: the number of leading payloads that passed all checks.

    forged: the hash of the record after the good ones if its seal is not valid; empty otherwise.
    """

    num_good: int
    forged: bytes = b""


async def receive_payloads(
    connection: StoreConnection, wanted: PayloadsWanted, buffer: BufferOf, *, seals: Seals | None, deadline_s: float
) -> PayloadsRead:
    """Fill buffers from a stream, and resume where the stream broke. seals: if given, only sealed records are accepted.

    Raises:  AntefixError: the store does not answer, or refuses the call.
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
            # The record arrived undamaged, so the store would send the same bytes again.
            return PayloadsRead(num_good=done.index, forged=hashes[done.index])
        except (Unavailable, BlockCorrupt) as err:
            if attempt == NUM_RESUMES_MAX:
                raise
            if isinstance(err, Unavailable) and connection.breaker.is_just_back:
                # Another connection has noticed that the store is back; this one still has to reconnect.
                await asyncio.sleep(_RECONNECT_S * 2**attempt)
            if isinstance(err, BlockCorrupt):
                # The bytes were damaged on the way or in the store. Ask for pieces that the store verifies: it counts
                # and quarantines a bad record, and does not send it.
                record_format = 0
    raise AssertionError("unreachable")
