"""UsageService: the ledger over gRPC. Protobuf stops here."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, takewhile
from typing import Any

import grpc

from antefix.errors import InvalidRequest, Unavailable
from antefix.security.guard import admitted
from antefix.security.identity import ALL_TENANTS
from antefix.v1 import usage_pb2, usage_pb2_grpc
from antefix_billing.ledger import Ledger
from antefix_billing.ledger_files import Settled, read_settled
from antefix_billing.pruned import check_cursor
from antefix_billing.usage_record import request_key
from antefix_router.front import BilledFront

# 256 records are some 200 KB: far below the message limit, and large enough that a call's overhead does not matter.
RECORDS_A_MESSAGE = 256
FOLLOW_EVERY_S = 0.5
_NUM_THREADS = 2


class UsageServicer(usage_pb2_grpc.UsageServiceServicer):
    """Reads the ledger's files, as any process may, without disturbing the writer."""

    def __init__(self, front: BilledFront) -> None:
        self._front = front
        # Separate threads, so that many exports or a hanging disk do not delay other work of the process.
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="antefix-export")

    async def Export(
        self, request: usage_pb2.ExportRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[usage_pb2.ExportResponse]:
        ledger, cursor, tenant = self._ledger(), request.cursor, _tenant_of(request.tenant)
        loop = asyncio.get_running_loop()
        check_cursor(ledger.directory, cursor)
        while True:
            # Only durable entries are exported, because a crash may remove any later one.
            durable = ledger.sequence
            found = read_settled(ledger.directory, after=cursor)
            records = takewhile(lambda item: item.sequence <= durable, found)  # noqa: B023 - read before it changes
            while batch := await loop.run_in_executor(self._threads, _take, records):
                cursor = batch[-1].sequence
                chosen = [item for item in batch if tenant in (None, item.record.tenant)]
                yield usage_pb2.ExportResponse(records=[_to_wire(item) for item in chosen], cursor=cursor)
            if not request.follow:
                return
            await asyncio.sleep(FOLLOW_EVERY_S)

    async def GetReceipt(
        self, request: usage_pb2.GetReceiptRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> usage_pb2.GetReceiptResponse:
        self._ledger()
        signer = self._front.signer
        assert signer is not None
        tenant = admitted().identity.tenant(request.tenant)
        found = await self._front.accounts.find(request_key(tenant, request.request_id))
        if found is None:
            raise InvalidRequest(f"there is no record of request {request.request_id!r}")
        receipt = json.dumps(signer.receipt(*found))
        return usage_pb2.GetReceiptResponse(receipt=receipt, public_key=signer.public_key)

    def _ledger(self) -> Ledger:
        ledger = self._front.accounts.ledger
        if ledger is None:
            raise Unavailable("this router keeps no ledger (--ledger-dir)")
        return ledger


def _tenant_of(asked: str) -> str | None:
    """The tenant whose records a caller may read; None: all tenants, only for a caller that may act for every
    tenant.
    """
    identity = admitted().identity
    return None if not asked and ALL_TENANTS in identity.tenants else identity.tenant(asked)


def _take(records: Iterator[Settled]) -> list[Settled]:
    return list(islice(records, RECORDS_A_MESSAGE))


def _to_wire(item: Settled) -> usage_pb2.ExportedRecord:
    record = usage_pb2.UsageRecord(**item.record.to_dict())
    return usage_pb2.ExportedRecord(record=record, sequence=item.sequence, hash=item.hash)
