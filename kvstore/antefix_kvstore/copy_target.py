"""Opens the two ends of a copy: a store's directory, a service's address or an object store's URL."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from antefix.block import is_statement
from antefix.errors import ConfigError
from antefix.objects.bucket import is_object_url
from antefix.record import Held, PutResult, Record, RecordName
from antefix.security.listening import UNIX
from antefix.store.remote_store import RemoteStore
from antefix.store.store_stats import StoreTotals
from antefix.store_files.encryption import KeyRing
from antefix_kvstore.embedded_store import EmbeddedStore
from antefix_kvstore.kvstore_config import KvStoreConfig
from antefix_kvstore.object_contents import ObjectContents, ObjectTarget
from antefix_kvstore.served_contents import ServedContents
from antefix_kvstore.store_contents import LayoutOf, StoreContents

# Everything that can be copied from.
Contents = StoreContents | ServedContents | ObjectContents


def open_source(text: str, *, key_file: str = "") -> Contents:
    """Open a source: a directory, host:port or an object store's URL. key_file: the key that the source is encrypted
    with.

    Raises:  ConfigError: the text is none of these.
    """
    if is_object_url(text):
        return ObjectContents(text, keys=KeyRing.from_master_file(Path(key_file)) if key_file else None)
    if _is_address(text):
        return ServedContents(RemoteStore(text))
    if not Path(text).is_dir():
        raise ConfigError(
            f"{text} is not a directory; to name a store that a service has open, give the service's address, host:port"
        )
    decrypt = KeyRing.from_master_file(Path(key_file)).decrypt if key_file else None
    return StoreContents(Path(text), decrypt=decrypt)


def open_target(
    text: str, *, budget_bytes: int = 0, key_file: str = "", makes: bool = False, ttl_s: float = 0.0
) -> DirectoryTarget | ServiceTarget | ObjectTarget:
    """Open a target: a directory that no service has open, host:port or an object store's URL.

    budget_bytes: disk budget of a directory; 0: a store's default.  key_file: the key to encrypt a directory or object
    store.
    makes: create a directory that is missing.  ttl_s: lifetime of copies in an object store; 0: no limit.
    Raises:  ConfigError: the text is none of these, or names a directory that is in use.
    """
    if is_object_url(text):
        return ObjectTarget(text, keys=KeyRing.from_master_file(Path(key_file)) if key_file else None, ttl_s=ttl_s)
    if not _is_address(text):
        if not makes and not Path(text).is_dir():
            raise ConfigError(
                f"{text} is not a directory; to name a store that a service has open, give the service's address,"
                " host:port"
            )
        config = KvStoreConfig(dir=text, scrub_bytes_per_s=0, encrypt_key_file=key_file)
        if budget_bytes:
            config = dataclasses.replace(config, budget_bytes=budget_bytes)
        return DirectoryTarget(EmbeddedStore(config))
    return ServiceTarget(RemoteStore(text))


def _is_address(text: str) -> bool:
    """Whether the text is host:port or names a Unix socket. A name without a port is a directory, which need not exist
    yet; so is a name with a port if a directory has it.
    """
    if text.startswith(UNIX):
        return True
    return "/" not in text and re.search(r":[0-9]+$", text) is not None and not Path(text).is_dir()


class DirectoryTarget:
    """The directory of a store that no service has open."""

    def __init__(self, store: EmbeddedStore) -> None:
        self._store = store

    async def held(self, chain: Sequence[bytes], *, fingerprint: bytes, tenant: bytes = b"") -> Held:
        return await self._store.held(chain, fingerprint=fingerprint)

    async def put(self, records: Sequence[Record]) -> PutResult:
        return await self._store.put(records)

    async def pin(self, names: Sequence[RecordName], *, duration_s: float, owner: bytes) -> int:
        return await self._store.pin(names, duration_s=duration_s, owner=owner)

    async def purge(self, owner: bytes) -> int:
        return await self._store.purge(owner)

    async def register_layout(self, layout: LayoutOf) -> None:
        statement = _statement_of(layout)
        self._store.engine.register(layout.fingerprint, layout.block_tokens, layout.plans, statement=statement)

    async def stats(self) -> StoreTotals:
        return await self._store.stats()

    async def close(self) -> None:
        await self._store.close()


class ServiceTarget:
    """A store service, on this host or another one."""

    def __init__(self, store: RemoteStore) -> None:
        self._store = store

    async def held(self, chain: Sequence[bytes], *, fingerprint: bytes, tenant: bytes = b"") -> Held:
        return await self._store.held(chain, fingerprint=fingerprint, tenant=tenant)

    async def put(self, records: Sequence[Record]) -> PutResult:
        return await self._store.put(records)

    async def pin(self, names: Sequence[RecordName], *, duration_s: float, owner: bytes) -> int:
        return await self._store.pin(names, duration_s=duration_s, owner=owner)

    async def purge(self, owner: bytes) -> int:
        return await self._store.purge(owner)

    async def register_layout(self, layout: LayoutOf) -> None:
        statement = _statement_of(layout)
        await self._store.register_plans(layout.fingerprint, layout.block_tokens, layout.plans, statement=statement)

    async def stats(self) -> StoreTotals:
        return await self._store.stats()

    async def close(self) -> None:
        await self._store.close()


def _statement_of(layout: LayoutOf) -> bytes:
    """Earlier versions registered anything as a statement. A copy leaves out what is none, since it is refused now."""
    return layout.statement if is_statement(layout.statement) else b""
