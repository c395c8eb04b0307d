"""Workers without a model. Their bytes and tokens depend only on names, so each can be checked."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import AsyncGenerator, Sequence

import numpy as np

from antefix.clients import DecodeClient, PrefillClient, Prefilled
from antefix.clients.decode import Decoded
from antefix.errors import AntefixError, Unavailable
from antefix.generation_request import GenerationRequest
from antefix.located import Located
from antefix.record import Held, LookupResult, PutResult, Record, RecordKind
from antefix.restore_report import RestoreReport
from antefix.sampling import Sampling
from antefix_kvstore.storage_engine import StorageEngine
from antefix_router.naming import NamedPrompt, PromptNames
from tests.histories.network import Network

FINGERPRINT = b"F" * 32
BLOCK = 8
PAYLOAD_BYTES = 200
TOKENS_PER_S = 2000.0


def payload_of(block_hash: bytes) -> bytes:
    return hashlib.blake2b(block_hash).digest() * (PAYLOAD_BYTES // 64) + block_hash[: PAYLOAD_BYTES % 64]


def token_of(tokens: Sequence[int], number: int) -> int:
    """The token that this model-free worker generates next."""
    return hashlib.blake2b(np.asarray(tokens, np.uint32).tobytes() + bytes([number]), digest_size=2).digest()[0]


class WrongBytes(AssertionError):
    """The store returned bytes that were never put."""


class SimStore:
    """The store as routers and workers call it over the simulated network.

    acknowledged: hashes whose put was answered.  parents: the parent of each hash that was ever put.
    rotten: hashes whose bytes a fault changed on disk. The store answers a put of a record that it holds without
    reading the record's bytes, so such a put promises nothing about a rotten record.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        self.engine: StorageEngine | None = None
        self.acknowledged: set[bytes] = set()
        self.parents: dict[bytes, bytes] = {}
        self.rotten: set[bytes] = set()

    def _open(self) -> StorageEngine:
        if self.engine is None:
            raise Unavailable("the store is down")
        return self.engine

    def with_descendants(self, hashes: set[bytes]) -> set[bytes]:
        found = set(hashes)
        # Dicts keep their order, and a child is put after its parent.
        for child, parent in self.parents.items():
            if parent in found:
                found.add(child)
        return found

    async def lookup(self, chain: Sequence[bytes], *, fingerprint: bytes, tenant: bytes = b"") -> LookupResult:
        return await self.network.call("store", lambda: self._open().lookup(chain, fingerprint=fingerprint))

    async def held(self, chain: Sequence[bytes], *, fingerprint: bytes, tenant: bytes = b"") -> Held:
        return await self.network.call("store", lambda: self._open().held(chain, fingerprint=fingerprint))

    async def read(self, hashes: Sequence[bytes]) -> int:
        """The number of leading blocks that could be read.  Raises:  WrongBytes."""
        into = [memoryview(bytearray(PAYLOAD_BYTES)) for _ in hashes]

        def read() -> int:
            return self._open().read_blocks(hashes, into, fingerprint=FINGERPRINT).num_good

        num_good = await self.network.call("store", read)
        for block_hash, buffer in zip(hashes[:num_good], into, strict=False):
            if bytes(buffer) != payload_of(block_hash):
                raise WrongBytes(block_hash.hex())
        return num_good

    async def put(self, records: Sequence[Record]) -> PutResult:
        def put() -> PutResult:
            result = self._open().put(records)
            self.parents.update({record.hash: record.parent for record in records})
            self.acknowledged |= {record.hash for record in records if record.hash not in result.refused}
            return result

        return await self.network.call("store", put)

    async def pin(self, names: object, *, duration_s: float, owner: bytes) -> int:
        return 0


class KnownPrompts(PromptNames):
    """The names of prompts, kept for router and workers: each prompt is named once, and not by each of them."""

    __slots__ = ("_found",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._found: dict[tuple[str, bytes], NamedPrompt] = {}

    def prompt(self, tenant: str, tokens: np.ndarray, *, timeout_s: float = 0.0) -> NamedPrompt:
        """timeout_s: of no use here, because these prompts have no grants."""
        key = tenant, tokens.tobytes()
        found = self._found.get(key)
        if found is None:
            found = self._found[key] = super().prompt(tenant, tokens)
        return found


class Worker:
    """The common part of prefill and decode workers.  handoffs: all workers' handoffs in the store's memory."""

    def __init__(self, store: SimStore, names: PromptNames, rng: random.Random, handoffs: set[bytes]) -> None:
        self.store = store
        self.names = names
        self.rng = rng
        self.handoffs = handoffs
        self.alive = True
        self.instance = rng.randbytes(8)

    def die(self) -> None:
        self.alive = False

    def start_again(self) -> None:
        self.alive, self.instance = True, self.rng.randbytes(8)

    def check_alive(self) -> None:
        if not self.alive:
            raise Unavailable("the worker has died")

    async def compute(self, prompt: NamedPrompt) -> RestoreReport:
        """Restore what is stored, compute the rest, store it."""
        report = RestoreReport()
        hashes, num_good = prompt.chain.hashes, 0
        usable = hashes[: (len(prompt.tokens) - 1) // BLOCK]
        try:
            found = await self.store.lookup(usable, fingerprint=FINGERPRINT)
            if found.num_blocks:
                num_good = await self.store.read(usable[: found.num_blocks])
        except AntefixError:
            report.store_errors += 1
        self.check_alive()
        report.hit_tokens = report.hit_store_tokens = num_good * BLOCK
        report.plan = "checkpoint" if num_good else "cold"
        report.last_hit_hash = hashes[num_good - 1] if num_good else b""
        report.miss_tokens = len(prompt.tokens) - report.hit_tokens
        await asyncio.sleep(report.miss_tokens / TOKENS_PER_S)
        self.check_alive()
        records = [
            Record(
                kind=RecordKind.BLOCK,
                hash=hashes[index],
                parent=prompt.chain.parent(index),
                fingerprint=FINGERPRINT,
                position=(index + 1) * BLOCK,
                payload=payload_of(hashes[index]),
                tenant=prompt.owner,
            )
            for index in range(num_good, len(hashes))
        ]
        try:
            if records:
                report.written_tokens = BLOCK * (await self.store.put(records)).num_stored
        except AntefixError as err:
            report.write_error = str(err)
        self.check_alive()
        return report


class SimPrefill(PrefillClient):
    """The router's client of a simulated prefill worker."""

    def __init__(self, address: str, worker: Worker, network: Network) -> None:
        self.address, self.worker, self.network = address, worker, network

    async def prefill(
        self, request: GenerationRequest, *, timeout_s: float, located: Located | None = None
    ) -> Prefilled:
        self.network.counts["calls"] += 1
        async with asyncio.timeout(timeout_s):
            await self.network.way(self.address)
            self.worker.check_alive()
            report = await self.worker.compute(self.worker.names.prompt(request.cache_tenant, request.tokens))
            handoff = self.worker.rng.randbytes(16)
            self.worker.handoffs.add(handoff)
            await self.network.way(self.address)
        return Prefilled(handoff=handoff, restore=report)


class SimDecode(DecodeClient):
    """The router's client of a simulated decode worker."""

    def __init__(self, address: str, worker: Worker, network: Network) -> None:
        self.address, self.worker, self.network = address, worker, network

    async def decode(
        self,
        request: GenerationRequest,
        sampling: Sampling,
        *,
        handoff: bytes,
        emitted: Sequence[int],
        timeout_s: float,
        located: Located | None = None,
    ) -> AsyncGenerator[Decoded, None]:
        worker = self.worker
        self.network.counts["calls"] += 1
        await self.network.way(self.address)
        worker.check_alive()
        restore: RestoreReport | None = None
        if handoff not in worker.handoffs:
            followed = request.followed_by(emitted)
            restore = await worker.compute(worker.names.prompt(request.cache_tenant, followed))
            if emitted:
                restore = None  # the worker that began the answer reported the prompt's restore
        worker.handoffs.discard(handoff)
        number = len(emitted)
        while number < sampling.max_tokens:
            count = min(worker.rng.randint(1, 5), sampling.max_tokens - number)
            tokens = np.array([token_of(request.tokens, number + i) for i in range(count)], np.uint32)
            number += count
            # One delay covers the computation and the way back. Afterwards the worker must still be alive.
            await self.network.way(self.address, after_s=0.01 * count)
            worker.check_alive()
            reason = "length" if number == sampling.max_tokens else ""
            yield Decoded(tokens=tokens, finish_reason=reason, restore=restore)
            restore = None
