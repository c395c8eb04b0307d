"""Workers that register themselves. A router knows registered workers as long as they renew their lease. Workers in the
settings need no lease, and found workers (`found_workers.py`) are known while they are found.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass

from antefix.end_tasks import end_tasks
from antefix.errors import FingerprintMismatch, InvalidRequest, PermissionDenied, ResourceExhausted
from antefix.keep_running import keep_running
from antefix.security.listening import parse_address
from antefix_router.health import HealthWatch
from antefix_router.placement.directory import Directory
from antefix_router.placement.memory_feed import MemoryFeed
from antefix_router.placement.workers import WorkerRole, Workers

log = logging.getLogger("antefix.router")

TTL_S_MIN, TTL_S_MAX = 0.5, 300.0
# The most leases. More of them indicate a fault, not a large fleet.
NUM_LEASES_MAX = 4096
# How long a worker that stopped renewing is shown to operators, and how many such workers are shown at most.
LOST_KEPT_S = 3600.0
NUM_LOST_MAX = 256
_SWEEP_S = 0.5


@dataclass(slots=True)
class _Lease:
    instance: bytes
    until: float
    name: str = ""


class Leases:
    """The leases of the workers of each role. instance: differs in each process; a new instance at an address starts
    with an empty memory.

    memory: the object that is told which workers come and go, so that it follows their events. block_size: tokens per
    block of the router's model; 0: any size.
    """

    def __init__(
        self,
        prefill: Workers,
        decode: Workers,
        directory: Directory,
        *,
        fingerprint: bytes,
        memory: MemoryFeed | None = None,
        block_size: int = 0,
    ) -> None:
        self._block_size = block_size
        self._memory = memory
        self._groups = {WorkerRole.PREFILL: prefill, WorkerRole.DECODE: decode}
        self._directory = directory
        self.fingerprint = fingerprint
        self._leases: dict[tuple[WorkerRole, str], _Lease] = {}
        # Role and address of the workers added by `add_found`.
        self.found: set[tuple[WorkerRole, str]] = set()
        self._lost_at: dict[tuple[WorkerRole, str], float] = {}
        self._health = HealthWatch(directory)
        self._sweeper: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to watch the workers' health and to end expired leases. Needs a running event loop."""
        self._sweeper = keep_running(self._sweep, "the end of expired leases")
        if self._memory is not None:
            self._memory.start()
        self._followed()

    async def close(self) -> None:
        if self._sweeper is not None:
            await end_tasks([self._sweeper])
        await self._health.close()
        if self._memory is not None:
            await self._memory.close()

    def renew(
        self,
        role_name: str,
        address: str,
        *,
        instance: bytes,
        fingerprint: bytes,
        ttl_s: float,
        arithmetic: str = "",
        setup: str = "",
        block_size: int = 0,
        name: str = "",
    ) -> None:
        """Extend the worker's lease to `ttl_s` seconds from now; a ttl of 0 ends the lease.

        name: the name in the worker's certificate.
        Raises:  InvalidRequest, FingerprintMismatch: it cannot serve here.  ResourceExhausted: too many leases.
            PermissionDenied: the address is another worker's.
        """
        role = _role(role_name)
        parse_address(address)
        if block_size and self._block_size and block_size != self._block_size:
            raise FingerprintMismatch(
                f"the worker at {address} has blocks of {block_size} tokens, this router's model of {self._block_size}:"
                " they cannot share KV; give both the same model directory (--model)"
            )
        self._check_fingerprint(address, fingerprint)
        if ttl_s and not TTL_S_MIN <= ttl_s <= TTL_S_MAX:
            raise InvalidRequest(f"the lease of a worker must last {TTL_S_MIN:g} to {TTL_S_MAX:g} s, not {ttl_s:g}")
        key = (role, address)
        lease = self._leases.get(key)
        if lease is not None and lease.name != name:
            raise PermissionDenied(f"{address} is registered by {lease.name or 'another worker'}, not by {name}")
        self._lost_at.pop(key, None)
        if not ttl_s:
            self._end(key, "left")
            return
        if lease is None and len(self._leases) >= NUM_LEASES_MAX:
            raise ResourceExhausted(f"there are {NUM_LEASES_MAX} leases already")
        if lease is None or lease.instance != instance:
            log.info("%s worker %s joins", role, address)
            self._directory.forget(address)
        self._leases[key] = _Lease(instance=instance, name=name, until=time.monotonic() + ttl_s)
        if not self.knows(role, address):
            worker = self._groups[role].join(address, name=name)
            worker.arithmetic, worker.setup = arithmetic, setup
            self._followed()

    def knows(self, role: WorkerRole, address: str) -> bool:
        return self._groups[role].find(address) is not None

    def add_found(self, role: WorkerRole, address: str, *, fingerprint: bytes, arithmetic: str, setup: str) -> None:
        """Add a worker until `drop_found`.  Raises:  FingerprintMismatch: it cannot serve here."""
        self._check_fingerprint(address, fingerprint)
        if not self.knows(role, address):
            log.info("%s worker %s is found", role, address)
            self.found.add((role, address))
            worker = self._groups[role].join(address)
            worker.arithmetic, worker.setup = arithmetic, setup
            self._followed()

    def drop_found(self, role: WorkerRole, address: str) -> None:
        """Remove a worker that DNS or Redis no longer names. If the worker also has a lease, it stays until the lease
        ends.
        """
        self.found.discard((role, address))
        if (role, address) not in self._leases:
            self._leave(role, address, "is no longer found")

    def expire(self, now: float) -> None:
        """End the leases that have expired."""
        for key in [key for key, lease in self._leases.items() if lease.until <= now]:
            self._end(key, "did not renew its lease")
            self._lost_at[key] = now
        for key in list(self._lost_at)[:-NUM_LOST_MAX]:
            del self._lost_at[key]

    def lost(self, now: float) -> list[tuple[WorkerRole, str, float]]:
        """Workers that stopped renewing their lease and have not come back: role, address, and seconds since the lease
        ended.
        """
        self._lost_at = {key: at for key, at in self._lost_at.items() if now - at < LOST_KEPT_S}
        return [(role, address, now - at) for (role, address), at in self._lost_at.items()]

    def _end(self, key: tuple[WorkerRole, str], why: str) -> None:
        if self._leases.pop(key, None) is None:
            return
        self._leave(*key, why)

    def _leave(self, role: WorkerRole, address: str, why: str) -> None:
        log.info("%s worker %s %s", role, address, why)
        self._groups[role].leave(address)
        self._directory.forget(address)
        self._followed()

    def _check_fingerprint(self, address: str, fingerprint: bytes) -> None:
        if fingerprint != self.fingerprint:
            raise FingerprintMismatch(
                f"the worker at {address} has other weights, format or namespace than this router"
            )

    def _followed(self) -> None:
        if self._sweeper is None:
            return
        groups = tuple(self._groups.values())
        self._health.follow(groups)
        if self._memory is not None:
            self._memory.follow(worker.address for group in groups for worker in group.workers)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            self.expire(time.monotonic())


def _role(name: str) -> WorkerRole:
    role = {"prefill": WorkerRole.PREFILL, "decode": WorkerRole.DECODE}.get(name)
    if role is None:
        raise InvalidRequest(f"role must be prefill or decode, is {name!r}")
    return role
