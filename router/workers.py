"""The workers a router knows, and the load it has put on each.

Load belongs to the router's own requests: it is taken when a request is placed and given back when that part of the
request ends, however it ends. Nothing else may change it: a health check that reset it would send all to one worker.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from antefix.clients import DecodeClient, PrefillClient
from antefix.errors import Unavailable
from router.directory import Directory
from router.placement import Candidate, Work, choose

# A worker that failed is left alone this long, unless no other one is there.
SHUN_S = 2.0


class Role(StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(slots=True)
class Worker:
    """One worker process and what the router gave it. num_tokens: of requests placed and not ended."""

    address: str
    role: Role
    client: PrefillClient | DecodeClient
    num_requests: int = 0
    num_tokens: int = 0
    num_served: int = 0
    shunned_until: float = 0.0

    def is_shunned(self, now: float) -> bool:
        return now < self.shunned_until


@dataclass(slots=True)
class Workers:
    """All workers of one role."""

    role: Role
    workers: list[Worker]

    @classmethod
    def at(cls, role: Role, addresses: Sequence[str]) -> Workers:
        make = PrefillClient if role is Role.PREFILL else DecodeClient
        return cls(role=role, workers=[Worker(address=a, role=role, client=make(a)) for a in addresses])

    def place(
        self, work: Work, directory: Directory, chain: Sequence[bytes], block_size: int, exclude: frozenset[str]
    ) -> Worker:
        """The worker with the least work for this prompt.

        Raises:  Unavailable: there is none besides the excluded ones.
        """
        now = time.monotonic()
        by_address = {worker.address: worker for worker in self.workers if worker.address not in exclude}
        if not by_address:
            raise Unavailable(f"no {self.role} worker is left to try")
        candidates = [
            Candidate(
                address=worker.address,
                queued_tokens=worker.num_tokens,
                num_requests=worker.num_requests,
                resident_tokens=directory.num_leading(worker.address, chain) * block_size,
                num_served=worker.num_served,
                shunned=worker.is_shunned(now),
            )
            for worker in by_address.values()
        ]
        return by_address[choose(work, candidates).address]

    @contextlib.contextmanager
    def load(self, worker: Worker, num_tokens: int) -> Iterator[None]:
        """Count a request of `num_tokens` on the worker while the block runs."""
        worker.num_requests += 1
        worker.num_tokens += num_tokens
        try:
            yield
        except Unavailable:
            worker.shunned_until = time.monotonic() + SHUN_S
            raise
        finally:
            worker.num_requests -= 1
            worker.num_tokens -= num_tokens
            worker.num_served += 1
