"""The first half of a request: what its prompt still needs, which worker does it, and what if that one fails."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from antefix.clients import PrefillClient, Prefilled
from antefix.errors import AntefixError, Overloaded, Unavailable
from antefix.store.api import Store
from router.directory import Directory
from router.naming import Prompt
from router.placement import FETCH_WEIGHT, Work
from router.workers import Workers

log = logging.getLogger("antefix.router")

# How often one request may move to another worker; more means that something is wrong that moving does not cure.
NUM_MOVES_MAX = 3

Kept = Sequence[tuple[int, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """A prompt that decode may start on. answer: None where decode has to prefill by itself."""

    work: Work
    answer: Prefilled | None


class Prefilling:
    """Runs prompts over the prefill workers. prefill_tokens_min: an uncached rest of at most this is left to decode."""

    def __init__(
        self, workers: Workers, store: Store, directory: Directory, *, fingerprint: bytes, prefill_tokens_min: int = 0
    ) -> None:
        self._workers = workers
        self._store = store
        self._directory = directory
        self._fingerprint = fingerprint
        self._prefill_tokens_min = prefill_tokens_min

    async def run(self, prompt: Prompt, *, request_id: str, timeout_s: float, keep: Kept = ()) -> Ready:
        """keep: (tokens, seconds) of prefixes to leave window state at.

        Raises:  Overloaded: every worker that was asked is full."""
        # 1. Ask what is stored: that decides how much work it is, and for whom.
        work = prompt.work(await self._num_stored_blocks(prompt, request_id))
        # 2. A short rest is left to the decode worker, which then needs no handoff.
        if work.num_tokens - (work.stored_tokens or 0) <= self._prefill_tokens_min:
            return Ready(work=work, answer=None)
        # 3. Prefill, elsewhere if a worker goes away.
        return Ready(work=work, answer=await self._prefill(prompt, work, request_id, timeout_s, keep))

    async def _num_stored_blocks(self, prompt: Prompt, request_id: str) -> int | None:
        chain = prompt.chain
        try:
            found = await self._store.lookup(chain.hashes, fingerprint=self._fingerprint, tenant=prompt.tenant)
        except AntefixError as err:
            # Placement without the store's word is still placement; the worker finds out what is there.
            log.warning("request %s: the store did not answer: %s", request_id, err)
            return None
        return found.num_blocks

    async def _prefill(
        self, prompt: Prompt, work: Work, request_id: str, timeout_s: float, keep: Kept
    ) -> Prefilled | None:
        tried: set[str] = set()
        while len(tried) < min(NUM_MOVES_MAX, len(self._workers.workers)):
            worker = self._workers.place(work, self._directory, prompt.keys, prompt.chain.block_size, frozenset(tried))
            tried.add(worker.address)
            client = worker.client
            assert isinstance(client, PrefillClient)
            stored = work.stored_tokens or 0
            own = round(work.num_tokens - stored + FETCH_WEIGHT * stored)
            try:
                with self._workers.load(worker, own, num_active_tokens=work.num_tokens):
                    answer = await client.prefill(
                        prompt.tokens, request_id=request_id, tenant=prompt.tenant, timeout_s=timeout_s, keep=keep
                    )
            except Unavailable as err:
                log.warning("request %s: prefill worker %s: %s", request_id, worker.address, err)
                self._directory.forget(worker.address)
                continue
            except Overloaded:
                if len(tried) >= min(NUM_MOVES_MAX, len(self._workers.workers)):
                    raise
                continue
            self._directory.placed(worker.address, prompt.keys)
            return answer
        return None
