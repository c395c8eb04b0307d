"""One request, from tokens to its last token: place, prefill, decode, relay, account.

A worker that fails before its part is done is replaced, and the client sees no gap and no repeat: an output is
continued elsewhere from the prompt plus the tokens that the client already has.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace

import numpy as np

from antefix.block import Chain, chain_of
from antefix.clients import DecodeClient, PrefillClient, Prefilled, Tokens
from antefix.errors import AntefixError, Overloaded, Unavailable
from antefix.secret import Keyring
from antefix.store.api import Store
from antefix.wire import Sampling
from antefix.worker.report import RestoreReport
from router.directory import Directory
from router.placement import Work
from router.workers import Workers

log = logging.getLogger("antefix.router")

# How often one request may move to another worker; more means that something is wrong that moving does not cure.
NUM_MOVES_MAX = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """How blocks are named here. prefill_tokens_min: an uncached rest of at most this goes straight to decode."""

    fingerprint: bytes
    keyring: Keyring
    block_size: int
    prefill_tokens_min: int = 0

    def chain(self, tenant: str, tokens: Tokens) -> Chain:
        return chain_of(
            tokens, fingerprint_digest=self.fingerprint, key=self.keyring.key(tenant), block_size=self.block_size
        )


@dataclass(slots=True)
class Request:
    """One request while it runs. `emitted` are the output tokens that the client has. breakpoints: (prompt tokens,
    seconds) of prefixes that the client wants kept."""

    request_id: str
    tenant: str
    tokens: Tokens
    sampling: Sampling
    breakpoints: tuple[tuple[int, float], ...] = ()
    emitted: list[int] = field(default_factory=list)
    restore: RestoreReport | None = None
    written_tokens: int = 0
    output_written_tokens: int = 0
    started: float = field(default_factory=time.perf_counter)
    ttft_s: float = 0.0
    finish_reason: str = ""
    stop_number: int = 0


class Generator:
    """Runs requests over the workers."""

    def __init__(self, prefill: Workers, decode: Workers, store: Store, names: Names) -> None:
        self._prefill = prefill
        self._decode = decode
        self._store = store
        self._names = names
        self._directory = Directory()

    async def run(self, request: Request, timeout_s: float) -> AsyncGenerator[Tokens, None]:
        """Output tokens as they come. Afterwards `request` has finish_reason, restore and counts.

        Raises:  what the last worker tried raised.
        """
        if request.sampling.temperature and request.sampling.seed is None:
            # Fixed here, so that a continuation on another worker draws the same numbers.
            request.sampling = replace(request.sampling, seed=secrets.randbits(63))
        # 1. Name the prompt's blocks.
        chain = self._names.chain(request.tenant, request.tokens)
        # 2. Ask what is stored of it: that decides how much work it is, and for whom.
        work = await self._weigh(request, chain)
        # 3. Prefill; a short rest is left to the decode worker, which then needs no handoff.
        handoff = b""
        if work.num_tokens - work.stored_tokens > self._names.prefill_tokens_min:
            handoff = await self._run_prefill(request, chain, work, timeout_s)
        # 4. Decode, elsewhere if a worker goes away.
        tried: set[str] = set()
        while not request.finish_reason:
            try:
                async with contextlib.aclosing(
                    self._run_decode(request, chain, work, handoff, tried, timeout_s)
                ) as outputs:
                    async for tokens in outputs:
                        yield tokens
            except (Unavailable, Overloaded) as err:
                if len(tried) >= min(NUM_MOVES_MAX, len(self._decode.workers)):
                    raise
                if len(request.emitted) >= request.sampling.max_tokens:
                    # It died between its last token and its last message; nothing is left to ask anyone for.
                    request.finish_reason = "length"
                    return
                log.warning("request %s moves to another decode worker: %s", request.request_id, err)
                handoff = b""

    async def _weigh(self, request: Request, chain: Chain) -> Work:
        stored_tokens = 0
        try:
            found = await self._store.lookup(chain.hashes, fingerprint=self._names.fingerprint, tenant=request.tenant)
            stored_tokens = min(found.num_blocks * chain.block_size, len(request.tokens) - 1)
        except AntefixError as err:
            # Placement without the store's word is still placement; the worker finds out what is there.
            log.warning("request %s: the store did not answer: %s", request.request_id, err)
        return Work(num_tokens=len(request.tokens), stored_tokens=stored_tokens, affinity=chain.parent(len(chain)))

    async def _run_prefill(self, request: Request, chain: Chain, work: Work, timeout_s: float) -> bytes:
        tried: set[str] = set()
        while len(tried) < min(NUM_MOVES_MAX, len(self._prefill.workers)):
            worker = self._prefill.place(work, self._directory, chain.hashes, chain.block_size, frozenset(tried))
            tried.add(worker.address)
            client = worker.client
            assert isinstance(client, PrefillClient)
            try:
                with self._prefill.load(worker, work.num_tokens - work.stored_tokens):
                    prefilled: Prefilled = await client.prefill(
                        request.tokens,
                        request_id=request.request_id,
                        tenant=request.tenant,
                        timeout_s=timeout_s,
                    )
            except Unavailable as err:
                log.warning("request %s: prefill worker %s: %s", request.request_id, worker.address, err)
                self._directory.forget(worker.address)
                continue
            except Overloaded:
                if len(tried) == len(self._prefill.workers):
                    raise
                continue
            self._directory.placed(worker.address, chain.hashes)
            request.restore = prefilled.restore
            request.written_tokens = prefilled.restore.written_tokens
            return prefilled.handoff
        return b""

    async def _run_decode(
        self, request: Request, chain: Chain, work: Work, handoff: bytes, tried: set[str], timeout_s: float
    ) -> AsyncGenerator[Tokens, None]:
        worker = self._decode.place(work, self._directory, chain.hashes, chain.block_size, frozenset(tried))
        tried.add(worker.address)
        self._directory.placed(worker.address, chain.hashes)
        client = worker.client
        assert isinstance(client, DecodeClient)
        tokens = np.concatenate((request.tokens, np.array(request.emitted, np.uint32)))
        with self._decode.load(worker, request.sampling.max_tokens):
            outputs = client.decode(
                tokens,
                request.sampling,
                request_id=request.request_id,
                tenant=request.tenant,
                handoff=handoff,
                num_emitted=len(request.emitted),
                timeout_s=timeout_s,
            )
            async with contextlib.aclosing(outputs):
                async for decoded in outputs:
                    if decoded.restore is not None and request.restore is None:
                        request.restore = decoded.restore
                    if len(decoded.tokens):
                        request.ttft_s = request.ttft_s or time.perf_counter() - request.started
                        request.emitted.extend(int(token) for token in decoded.tokens)
                        yield decoded.tokens
                    if decoded.finish_reason:
                        request.finish_reason = decoded.finish_reason
                        request.stop_number = decoded.stop_number
                        request.written_tokens += decoded.written_tokens
                        request.output_written_tokens = decoded.written_tokens
