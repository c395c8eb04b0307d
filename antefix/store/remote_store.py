"""A client that reaches a store only over gRPC. Calls to the store run on the event loop; payloads are received in
threads.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self

from antefix import rpc
from antefix.errors import AntefixError, InvalidRequest, Unavailable
from antefix.events.block_events import BlockEvent
from antefix.events.event_wire import watch_store
from antefix.events.numbered_log import Batch, Cursor
from antefix.layout import PayloadLayout
from antefix.record import (
    MEMORY_KINDS,
    BlockFate,
    Held,
    LookupResult,
    PutResult,
    Record,
    RecordKind,
    RecordName,
    Refusal,
)
from antefix.request_limits import answered
from antefix.security.credentials import Credentials
from antefix.store.breaker import Breaker
from antefix.store.fate_wire import fate_from_wire
from antefix.store.held_wire import held_from_wire
from antefix.store.names_wire import name_to_wire, refusal_reason_of
from antefix.store.payload_reads import PAYLOAD_BYTES_GUESSED, STREAM_DEADLINE_S, PayloadsWanted, receive_payloads
from antefix.store.payload_wire import Piece
from antefix.store.pieces import HASHES_MAX, join_hashes, request_pieces
from antefix.store.plan_wire import plans_to_wire
from antefix.store.record_source import records_of
from antefix.store.store_connection import StoreConnection
from antefix.store.store_stats import StoreTotals
from antefix.store.store_stats_wire import totals_from_wire
from antefix.store.stream_progress import BufferOf
from antefix.store_files import codec
from antefix.store_files.seal import Seals
from antefix.telemetry.context import outgoing
from antefix.v1 import kvstore_pb2

log = logging.getLogger("antefix.store")

CALL_DEADLINE_S: Final = 10.0
# The deadline of a search in the store's index, which takes milliseconds.
SEARCH_DEADLINE_S: Final = 2.0
# A purge reads the whole index.
PURGE_DEADLINE_S: Final = 300.0


class RemoteStore:
    """A client of one store service. The client connects when it is first used, and reconnects after the service
    restarts.
    """

    def __init__(
        self,
        address: str,
        *,
        deadline_s: float = STREAM_DEADLINE_S,
        seals: Seals | None = None,
        credentials: Credentials | None = None,
    ) -> None:
        """seals: if given, only sealed records are accepted.

        credentials: sent with each call; None: the credentials of this process.
        """
        self.connection: Final = StoreConnection(address, credentials)
        self._seals = seals
        self._deadline_s = deadline_s

    @property
    def address(self) -> str:
        return self.connection.address

    @property
    def breaker(self) -> Breaker:
        return self.connection.breaker

    @property
    def stub(self) -> Any:
        return self.connection.stub

    @property
    def num_broken_seals(self) -> int:
        """How many records without this deployment's seal were read."""
        return self._seals.num_broken if self._seals is not None else 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self.connection.close()

    async def lookup(self, chain: Sequence[bytes], *, fingerprint: bytes, tenant: bytes = b"") -> LookupResult:
        request = kvstore_pb2.LookupRequest(chain=join_hashes(chain), fingerprint=fingerprint, owner=tenant)
        with self.connection.asked():
            response = answered(await self.stub.Lookup(request, timeout=SEARCH_DEADLINE_S, metadata=outgoing()))
        if max(response.num_blocks, *response.checkpoints, 0) > len(chain):
            raise Unavailable(
                f"the store's answer cannot be right: it names more than the {len(chain)} blocks asked for"
            )
        return LookupResult(
            num_blocks=response.num_blocks,
            checkpoints=tuple(response.checkpoints),
            block_bytes=response.block_bytes,
        )

    async def held(self, chain: Sequence[bytes], *, fingerprint: bytes, tenant: bytes = b"") -> Held:
        request = kvstore_pb2.LookupRequest(
            chain=join_hashes(chain), fingerprint=fingerprint, owner=tenant, all_spans=True
        )
        with self.connection.asked():
            response = answered(await self.stub.Lookup(request, timeout=SEARCH_DEADLINE_S, metadata=outgoing()))
        return held_from_wire(response)

    async def fate(self, hash: bytes, *, fingerprint: bytes) -> BlockFate:
        with self.connection.asked():
            request = kvstore_pb2.FateRequest(hash=hash, fingerprint=fingerprint)
            response = answered(await self.stub.Fate(request, timeout=SEARCH_DEADLINE_S, metadata=outgoing()))
        return fate_from_wire(response)

    async def get_blocks(
        self, hashes: Sequence[bytes], into: Sequence[memoryview], *, fingerprint: bytes, tenant: bytes = b""
    ) -> int:
        if len(hashes) != len(into):
            raise InvalidRequest(f"{len(hashes)} hashes but {len(into)} buffers")
        num_good = 0
        for first in range(0, len(hashes), HASHES_MAX):
            part = hashes[first : first + HASHES_MAX]
            buffers = _Buffers([buffer.cast("B") for buffer in into[first : first + HASHES_MAX]])
            wanted = PayloadsWanted(
                kind=RecordKind.BLOCK, hashes=part, fingerprint=fingerprint, tenant=tenant, nbytes=buffers.nbytes
            )
            got = await self._receive(wanted, buffers.get)
            num_good += got
            if got < len(part):
                break
        return num_good

    async def get(self, kind: RecordKind, hash: bytes, *, fingerprint: bytes, tenant: bytes = b"") -> bytes | None:
        payloads: list[bytearray] = []

        def allocate(_: int, nbytes: int) -> memoryview:
            if not payloads:
                payloads.append(bytearray(nbytes))
            return memoryview(payloads[0])

        wanted = PayloadsWanted(
            kind=kind, hashes=[hash], fingerprint=fingerprint, tenant=tenant, nbytes=PAYLOAD_BYTES_GUESSED
        )
        num_good = await self._receive(wanted, allocate)
        return bytes(payloads[0]) if num_good else None

    async def get_records(
        self, kind: RecordKind, hashes: Sequence[bytes], *, fingerprint: bytes, tenant: bytes = b""
    ) -> list[Record]:
        """The leading ones of these records that are stored, with headers, so that they can be put
        into another store.
        """
        payloads: list[bytearray] = []
        sealed: list[bytes] = []

        def allocate(index: int, nbytes: int) -> memoryview:
            if index == len(payloads):
                payloads.append(bytearray(nbytes))
            return memoryview(payloads[index])

        wanted = PayloadsWanted(
            kind=kind,
            hashes=hashes[:HASHES_MAX],
            fingerprint=fingerprint,
            tenant=tenant,
            nbytes=PAYLOAD_BYTES_GUESSED * len(hashes),
            sealed=sealed,
        )
        num_good = await self._receive(wanted, allocate)
        return records_of(sealed[:num_good], payloads[:num_good])

    async def put(self, records: Sequence[Record]) -> PutResult:
        nbytes = sum(memoryview(record.payload).nbytes for record in records)
        limit_s = self.breaker.limit_s(nbytes, self._deadline_s)
        with self.connection.asked(nbytes):
            response = answered(await self.stub.Put(_in_turn(records), timeout=limit_s, metadata=outgoing()))
        return PutResult(
            num_stored=response.num_stored,
            num_existing=response.num_existing,
            refused={each.hash: Refusal(refusal_reason_of(each.code), each.reason) for each in response.refused},
        )

    async def register(self, fingerprint: bytes, layout: PayloadLayout, *, statement: bytes = b"") -> None:
        """Tell the store the byte layout behind a fingerprint; without it, blocks are stored uncompressed."""
        plans = {
            RecordKind.BLOCK: codec.plan_of_block(layout),
            RecordKind.CHECKPOINT: codec.plan_of_checkpoint(layout),
        }
        await self.register_plans(fingerprint, layout.block_size, plans, statement=statement)

    async def register_plans(
        self,
        fingerprint: bytes,
        block_tokens: int,
        plans: Mapping[RecordKind, codec.PlanePlan],
        *,
        statement: bytes = b"",
    ) -> None:
        """As `register`, with the compression plans that another store has."""
        request = kvstore_pb2.RegisterRequest(
            fingerprint=fingerprint,
            block_size=block_tokens,
            statement=statement,
            **plans_to_wire(plans),
        )
        with self.connection.asked():
            await self.stub.Register(request, timeout=CALL_DEADLINE_S)

    async def purge(self, owner: bytes) -> int:
        """Delete all records of an owner, even pinned ones, on disk and in memory. An owner without a user means all
        users of the tenant.

        Returns how many records were deleted.
        """
        with self.connection.asked():
            request = kvstore_pb2.PurgeRequest(owner=owner)
            return int(
                answered(await self.stub.Purge(request, timeout=PURGE_DEADLINE_S, metadata=outgoing())).num_purged
            )

    async def pin(self, names: Sequence[RecordName], *, duration_s: float, owner: bytes) -> int:
        request = kvstore_pb2.PinRequest(records=map(name_to_wire, names), duration_s=duration_s, owner=owner)
        with self.connection.asked():
            return int(answered(await self.stub.Pin(request, timeout=CALL_DEADLINE_S)).num_pinned)

    async def evict(self, names: Sequence[RecordName], *, owner: bytes) -> int:
        request = kvstore_pb2.EvictRequest(records=map(name_to_wire, names), owner=owner)
        with self.connection.asked():
            return int(answered(await self.stub.Evict(request, timeout=CALL_DEADLINE_S)).num_evicted)

    def watch(self, cursor: Cursor | None = None) -> AsyncGenerator[Batch[BlockEvent], None]:
        return watch_store(self.stub, cursor)

    async def stats(self) -> StoreTotals:
        with rpc.rpc_errors():
            answer = answered(await self.stub.Stats(kvstore_pb2.StatsRequest(), timeout=CALL_DEADLINE_S))
        return totals_from_wire(answer)

    async def reject(self, kind: RecordKind, hashes: Sequence[bytes]) -> None:
        for unusable in hashes:
            log.warning("a %s in the store holds NaN or infinity: %s", kind.name.lower(), unusable.hex())
        if hashes and kind not in MEMORY_KINDS:
            await self._tell(kvstore_pb2.TouchRequest(unusable=[name_to_wire((kind, name)) for name in hashes]))

    async def tell_forged(self, kind: RecordKind, hashes: Sequence[bytes]) -> None:
        """Tell the store to quarantine records without a valid seal. The store has no secret to check seals, so it
        would keep these records otherwise.

        The call is not delayed, because the store would otherwise refuse the good records that are put next under the
        same names.
        """
        for forged in hashes:
            log.warning("a %s in the store was not sealed by this deployment: %s", kind.name.lower(), forged.hex())
        if hashes and kind not in MEMORY_KINDS:
            await self._tell(kvstore_pb2.TouchRequest(forged=[name_to_wire((kind, forged)) for forged in hashes]))

    async def touch(self, request: kvstore_pb2.TouchRequest) -> None:
        """Tell the service which of its records were read here, or were found damaged. Raises: AntefixError: the call
        failed.
        """
        with self.connection.asked():
            await self.connection.stub.Touch(request, timeout=CALL_DEADLINE_S)

    async def _tell(self, request: kvstore_pb2.TouchRequest) -> None:
        try:
            await self.touch(request)
        except AntefixError as err:
            log.warning("the store could not be told which of its records were read, or found damaged: %s", err)

    async def _receive(self, wanted: PayloadsWanted, buffer: BufferOf) -> int:
        """Receive payloads into buffers. Returns the number of leading payloads that passed all checks."""
        found = await receive_payloads(self.connection, wanted, buffer, seals=self._seals, deadline_s=self._deadline_s)
        if found.forged:
            await self.tell_forged(wanted.kind, [found.forged])
        return found.num_good


@dataclass(frozen=True, slots=True)
class _Buffers:
    """The caller's buffers for the payloads of one stream."""

    buffers: Sequence[memoryview]

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers)

    def get(self, index: int, _: int) -> memoryview:
        return self.buffers[index]


async def _in_turn(records: Sequence[Record]) -> AsyncIterator[Piece[kvstore_pb2.PutRequest]]:
    for piece in request_pieces(records):
        yield piece
