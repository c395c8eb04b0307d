"""A router process with a real ledger and scripted workers that fail on purpose. Run by test_bill_under_failure.

The workers write a store log as the store does: a prefix is stored once, and a hit is logged as a read of the prefix's
last block.
"""

from __future__ import annotations

import asyncio
import json
import random
import secrets
import sys
from pathlib import Path

import grpc
import numpy as np

from antefix import rpc
from antefix.block import chain_of
from antefix.errors import Overloaded, Unavailable
from antefix.generation_request import Caller, GenerationRequest
from antefix.redis_access import RedisAccess
from antefix.restore_report import RestoreReport
from antefix.secret import Keyring
from antefix.store_files.hit_log import StoreLog, read_store_log
from antefix.v1 import router_pb2, router_pb2_grpc
from antefix.wire import sampling_from_wire, tokens_from_wire, tokens_to_wire, usage_to_wire
from antefix_billing.ledger import Ledger
from antefix_billing.ratecard import load_cards
from antefix_billing.request_account import RunningAt
from antefix_billing.tenants import TenantBook
from antefix_router.accounting import Accounts
from antefix_router.generation import Generation, OutputPiece
from antefix_router.open_bill import Served
from antefix_router.shared_bill.bill_exchange import BillExchange
from antefix_router.shared_bill.shared_bill import SharedBill
from antefix_router.shared_bill.shared_quotas import SharedQuotas

BLOCK_SIZE = 64
FINGERPRINT = b"\x01" * 32
CARDS = Path(__file__).parents[2] / "deploy" / "ratecards" / "example.toml"
FAILURE_RATE = 0.02


class FailingWorkers:
    """Workers whose answers depend only on the request, so a repeat gets the same, and whose failures are random."""

    def __init__(self, directory: Path) -> None:
        self._stored = {event.hash for event in read_store_log(directory / "store-log") if event.kind == "stored"}
        self._log = StoreLog(directory / "store-log", file_bytes=4 << 20)
        self._keyring = Keyring(b"0" * 16)
        self._chance = random.Random()

    async def run(self, generation: Generation, timeout_s: float):
        tokens, sample = generation.tokens, generation.samples[0]
        key = self._keyring.key(generation.request.cache_tenant)
        chain = chain_of(tokens, fingerprint_digest=FINGERPRINT, key=key, block_size=BLOCK_SIZE)
        await asyncio.sleep(self._chance.random() * 0.004)
        if self._chance.random() < FAILURE_RATE:
            raise Unavailable("no worker is left to try")
        known = 0
        while known < (len(tokens) - 1) // BLOCK_SIZE and chain.hashes[known].hex() in self._stored:
            known += 1
        in_memory = self._chance.randint(0, known)
        if in_memory < known:
            self._log.read([chain.hashes[known - 1]])
        fresh = [name for name in chain.hashes if name.hex() not in self._stored]
        self._log.stored(fresh)
        self._stored |= {name.hex() for name in fresh}
        hit = known * BLOCK_SIZE
        generation.restore = RestoreReport(
            plan="checkpoint" if hit else "cold",
            hit_tokens=hit,
            miss_tokens=len(tokens) - hit,
            hit_memory_tokens=in_memory * BLOCK_SIZE,
            hit_store_tokens=hit - in_memory * BLOCK_SIZE,
            written_tokens=len(fresh) * BLOCK_SIZE,
            last_hit_hash=chain.hashes[known - 1] if known else b"",
        )
        for number in range(int(tokens[-1]) % 6):
            if self._chance.random() < FAILURE_RATE / 4:
                raise Overloaded("the pool has no room")
            sample.emitted.append(number)
            yield OutputPiece(0, np.array([number], np.uint32))
            await asyncio.sleep(0)
        sample.finish_reason = "stop"


def share(accounts: Accounts, redis_url: str) -> None:
    exchange = BillExchange(RedisAccess(url=redis_url), accounts.keyring, keep_s=3600.0)
    me = RunningAt(source=accounts.writer.source_name, instance=secrets.token_hex(8))
    quotas = SharedQuotas(exchange, accounts.quotas, me.source)
    accounts.shared = SharedBill(exchange, accounts.writer, quotas, me, keep_s=3600.0, serves_alone=False)
    accounts.shared.start()


class Servicer(router_pb2_grpc.RouterServiceServicer):
    def __init__(self, accounts: Accounts, workers: FailingWorkers) -> None:
        self._accounts = accounts
        self._workers = workers

    async def Generate(self, message, context: grpc.aio.ServicerContext):
        request = GenerationRequest(
            tokens=tokens_from_wire(message.tokens),
            sampling=sampling_from_wire(message.sampling),
            caller=Caller(tenant=message.tenant, request_id=message.request_id),
        )
        bill = await self._accounts.admit(request, is_named=True)
        outputs = self._accounts.run(bill, self._workers.run, 60.0)
        try:
            async for piece in outputs:
                yield router_pb2.GenerateResponse(tokens=tokens_to_wire(piece.tokens))
        finally:
            await outputs.aclose()
        yield router_pb2.GenerateResponse(finish_reason="stop", usage=usage_to_wire(bill.usage()))


async def main(directory: Path, ledger: Path, redis_url: str = "") -> None:
    """redis_url: the Redis through which this directory's routers share their bill."""
    accounts = Accounts(
        Ledger(ledger, segment_bytes=1 << 20),
        served=Served(model="antefix-tiny", revision="test", fingerprint=FINGERPRINT.hex()),
        keyring=Keyring(b"0" * 16),
        cards=load_cards([CARDS]),
        tenants=TenantBook(),
    )
    if redis_url:
        share(accounts, redis_url)
    servicer = Servicer(accounts, FailingWorkers(directory))
    server = await rpc.start_server(
        "127.0.0.1:0",
        lambda s: router_pb2_grpc.add_RouterServiceServicer_to_server(servicer, s),
        [router_pb2.DESCRIPTOR],
    )
    print(json.dumps({"address": server.address}), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.drain(5.0)
    await accounts.close()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:]))
