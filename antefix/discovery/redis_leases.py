"""Services announce themselves in Redis: one hash per role with one field per service, written again every 2 s.

    antefix:services:{ROLE}     hash: name -> JSON of the fields below

    a   address        n   name       s   Unix time in ns when it was said, always more than before
    g   generation     m   MAC, hex   (antefix.events.event_seal: made with the deployment's events key)

An attacker who can write to Redis but has no key of the deployment can remove a service's lease, which costs cache
hits, but cannot add a service. A reader accepts a lease as long as its service renews it, measured by the reader's own
clock, because hosts' clocks may differ by minutes.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final

from antefix.discovery.found import Found
from antefix.end_tasks import end_tasks
from antefix.errors import Unavailable
from antefix.events.event_seal import EventKeys, Stamps
from antefix.keep_running import keep_running
from antefix.redis_access import RedisAccess, redis_failures
from antefix.registration import AGE_S_MAX

log = logging.getLogger("antefix.discovery")

LEASE_TTL_S: Final = 6.0
_RENEW_S: Final = LEASE_TTL_S / 3
_TIMEOUT_S: Final = 2.0
_AGE_NS_MAX: Final = int(AGE_S_MAX * 1e9)
# A statement that is larger than that is none of ours; nor are that many services a deployment.
_STATEMENT_BYTES_MAX: Final = 4096
_NUM_SERVICES_MAX: Final = 4096


def _hash_of(role: str) -> str:
    return f"antefix:services:{{{role}}}"


class ServiceLease:
    """Within `async with`, renews this service's lease; removes the lease at the end."""

    def __init__(self, where: RedisAccess, *, role: str, name: str, address: str, keys: EventKeys) -> None:
        """Nothing connects yet."""
        self._redis = where.connect(timeout_s=_TIMEOUT_S)
        self._role, self._name, self._address = role, name, address
        self._keys = keys
        self._stamps = Stamps()
        # Of this process: nobody else's statement is taken for a newer one of ours.
        self._epoch = secrets.token_bytes(16)
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> ServiceLease:
        self._task = keep_running(self._keep, "the lease in Redis", of=self._name)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            await end_tasks([self._task])
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                await self._redis.hdel(_hash_of(self._role), self._name)
        except redis_failures() as failure:
            log.info(
                "this service's lease could not be removed from Redis and stays there until it expires: %s", failure
            )
        await self._redis.aclose()

    async def _keep(self) -> None:
        answers = True
        while True:
            try:
                async with asyncio.timeout(_TIMEOUT_S):
                    await self._redis.hset(_hash_of(self._role), self._name, self._statement())
                answers = True
            except redis_failures() as err:
                if answers:
                    log.warning("Redis does not accept this service's lease: %s: %s", type(err).__name__, err)
                answers = False
            await asyncio.sleep(_RENEW_S)

    def _statement(self) -> str:
        said = {"a": self._address, "n": self._name, "s": self._stamps.next()}
        signed = self._keys.sign(_hash_of(self._role), said, epoch=self._epoch)
        return json.dumps({name: value.hex() if isinstance(value, bytes) else value for name, value in signed.items()})


class LeaseReader:
    """A source of services for `Following`: those of one role that announce themselves in Redis."""

    # A service that joins is used within a second. One small answer: 1,000 processes ask Redis 2,000 times per second.
    every_s = 0.5

    def __init__(
        self, where: RedisAccess, *, role: str, keys: EventKeys, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Nothing connects yet."""
        self._redis = where.connect(timeout_s=_TIMEOUT_S)
        self._role, self._keys, self._clock = role, keys, clock
        # By name: what was said last, and when we saw that it was new.
        self._said: dict[str, tuple[int, float]] = {}
        # How many leases without a valid signature were ignored since the start.
        self.num_refused = 0

    async def find(self) -> frozenset[Found]:
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                statements: dict[Any, Any] = await self._redis.hgetall(_hash_of(self._role))
        except redis_failures() as err:
            raise Unavailable(f"leases cannot be read from Redis: {type(err).__name__}: {err}") from err
        now, alive, stale = self._clock(), set(), []
        for name, text in list(statements.items())[:_NUM_SERVICES_MAX]:
            said = self._read(name, text)
            if said is None:
                self.num_refused += 1
            elif self._is_alive(said, now):
                alive.add(Found(name=str(said["n"]), address=str(said["a"])))
            else:
                stale.append(name)
        # What has gone is remembered for a while: an old statement that somebody writes again brings nobody back.
        if len(self._said) > _NUM_SERVICES_MAX:
            self._said = {name: seen for name, seen in self._said.items() if name.encode() in statements}
        await self._drop_old(stale)
        return frozenset(alive)

    async def close(self) -> None:
        await self._redis.aclose()

    def _read(self, name: bytes, text: bytes) -> dict[str, Any] | None:
        """The statement of the service of that name; None if no service of this deployment has made one."""
        try:
            if len(text) > _STATEMENT_BYTES_MAX:
                return None
            said = json.loads(text)
            fields = {key.encode(): str(value).encode() for key, value in said.items()}
            fields |= {key: bytes.fromhex(said[key.decode()]) for key in (b"e", b"m")}
            if fields[b"n"] != name or not self._keys.holds(_hash_of(self._role), fields):
                return None
            return {"n": fields[b"n"].decode(), "a": fields[b"a"].decode(), "s": int(fields[b"s"])}
        except (ValueError, KeyError, TypeError, AttributeError):
            return None

    def _is_alive(self, said: dict[str, Any], now: float) -> bool:
        """Whether the service has renewed its statement within the time of a lease."""
        stamp, seen = self._said.get(said["n"], (0, now))
        if said["s"] > stamp:
            stamp, seen = said["s"], now
            self._said[said["n"]] = (stamp, seen)
        return now - seen <= LEASE_TTL_S and abs(time.time_ns() - stamp) <= _AGE_NS_MAX

    async def _drop_old(self, names: list[bytes]) -> None:
        """Delete the leases in Redis of services that have died. A service that is merely late renews its lease
        afterwards.
        """
        if not names:
            return
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                await self._redis.hdel(_hash_of(self._role), *names)
        except redis_failures() as err:
            log.debug("old leases could not be removed from Redis: %s", err)
