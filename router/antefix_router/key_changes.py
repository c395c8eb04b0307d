"""Follows changes of API keys while a router runs: once per second it looks at the file of keys and, if used, at Redis.

If the file is missing or faulty, the known keys stay in force, and the fault is logged and counted. If Redis has a
newer list of keys, the list is also written to the file. So a router that starts later has the newer list, and an older
list cannot come back into force.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Protocol

from antefix.end_tasks import end_tasks
from antefix.errors import AntefixError
from antefix.redis_access import RedisAccess, RedisConfig
from antefix.secret import Keyring
from antefix_billing.api_keys import KeyBook
from antefix_billing.key_file import changing, read_book, write_book
from antefix_billing.key_register import KeyRegister
from antefix_router.key_exchange import KeyExchange

log = logging.getLogger("antefix.router")

# A change must be in force at all routers within 5 s.
LOOK_S: Final = 1.0


class KeyChanges:
    """Keeps a register of keys up to date with its file and Redis. num_errors: by source, how often it could not be
    read or verified.
    """

    def __init__(self, register: KeyRegister, path: str | Path, exchange: KeyExchange | None = None) -> None:
        self._register = register
        self._path = Path(path)
        self._exchange = exchange
        self._seen: tuple[int, int, int, int] | None = None
        self._told: dict[str, str] = {}
        self._task: asyncio.Task[None] | None = None
        self.num_errors: Counter[str] = Counter(file=0, redis=0)

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        if self._task is not None:
            await end_tasks([self._task])
        if self._exchange is not None:
            await self._exchange.close()

    async def look(self) -> None:
        """Apply the changes of keys since the last look."""
        with self._counted("file"):
            await asyncio.to_thread(self._look_at_file)
        if self._exchange is not None:
            with self._counted("redis"):
                await self._look_at_redis(self._exchange)

    async def _run(self) -> None:
        while True:
            try:
                await self.look()
            except Exception:
                # A bug here must not silently leave revoked keys in force.
                log.exception("the API keys could not be read")
            await asyncio.sleep(LOOK_S)

    def _look_at_file(self) -> None:
        try:
            found = self._path.stat()
            seen = (found.st_ino, found.st_mtime_ns, found.st_size, found.st_mode)
        except OSError:
            seen = None
        if seen is not None and seen == self._seen:
            return
        book = read_book(self._path)
        self._seen = seen
        self._take(book, "file")

    async def _look_at_redis(self, exchange: KeyExchange) -> None:
        book = await exchange.get(newer_than=self._register.number)
        if book is not None and self._take(book, "Redis"):
            await asyncio.to_thread(self._keep, book)

    def _take(self, book: KeyBook, source: str) -> bool:
        if book.number < self._register.number:
            log.warning("the API keys in the %s are older than those in force, so they are not used", source)
            return False
        if not self._register.take(book):
            return False
        log.info("the API keys with number %d, from the %s, are in force now", book.number, source)
        return True

    def _keep(self, book: KeyBook) -> None:
        with changing(self._path):
            if read_book(self._path).number < book.number:
                write_book(self._path, book)

    @contextlib.contextmanager
    def _counted(self, source: str) -> Iterator[None]:
        try:
            yield
            self._told.pop(source, None)
        except AntefixError as err:
            self.num_errors[source] += 1
            # The file is checked every second, but each fault is logged once.
            if self._told.get(source) != str(err):
                log.error("the API keys in force stay as they were: %s", err)  # noqa: TRY400 - a fault of the file's, no trace needed
                self._told[source] = str(err)


class KeySettings(RedisConfig, Protocol):
    """The settings of a router's API keys."""

    @property
    def api_keys_file(self) -> str: ...

    @property
    def keys_redis(self) -> str: ...


def follow_keys(config: KeySettings, register: KeyRegister, keyring: Keyring) -> KeyChanges | None:
    """The object that follows changes, as the settings ask; None if they name no key file. Call `start` on it."""
    if not config.api_keys_file:
        return None
    exchange = None
    if config.keys_redis:
        exchange = KeyExchange(RedisAccess.of(config.keys_redis, config), keyring)
    return KeyChanges(register, config.api_keys_file, exchange)
