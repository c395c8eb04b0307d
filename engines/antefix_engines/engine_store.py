"""One store as an engine uses it: names, sealed records, and errors that become misses. Blocking; thread-safe.

    store = EngineStore.open(StoreSettings(directory="antefix-data"))
    kv = store.kv(fingerprint, layout)
    chain = kv.chain(tokens)                       # or kv.hash_of(engine's own key)
    found = kv.lookup(chain.hashes)
    ...
    kv.put([kv.block(hash, parent, position, payload), ...])

No call raises because of the store. If the store cannot deliver a record, the record counts as a miss; if the store
cannot take one, the record is not kept. `counters` says how often the store could not deliver or take records. This
module knows bytes and names, never tensors or an engine.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from antefix.block import Chain, Fingerprint, Tokens, as_tokens, chain_of, engine_key_hash, root_of
from antefix.blocking import BlockingStore
from antefix.byte_size import parse_byte_size
from antefix.errors import AntefixError, ConfigError
from antefix.record import Buffer, LookupResult, PutResult, Record, RecordKind
from antefix.secret import Keyring, create_secret_file
from antefix.security import grants, own_credentials
from antefix.security.certificates import TENANT_GRANT
from antefix.security.credential_files import CredentialFiles
from antefix.security.credentials import Credentials
from antefix.security.grants import unchecked
from antefix.security.identity import Role
from antefix.security.listening import check_calling
from antefix.store.object_access import object_tiers
from antefix.store.open_store import StoresConfig, check_stores, local_copies, open_stores, store_addresses
from antefix.store_files.seal import Seals
from antefix_engines.engine_layout import EngineLayout

log = logging.getLogger("antefix.engines")
# How long a grant (our signature that lets calls act for the tenant) is valid.
GRANT_S: Final = 300.0
NOTHING: Final = LookupResult(num_blocks=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSettings:
    """Where an engine's store is. Engines take these settings by name from their own configuration.

    directory: folder of the data, as in `antefix up --data-dir`: the store is in `store/`, the secret in `secret`.
    Without an address, the store is opened in this process, which is then its only writer; a missing store is created.
    address: "host:port" of a kvstore service. With `directory` on the same host, reads go directly to the files.
    secret_file: the deployment's secret; needed where `directory` is not given.
    credentials: needed for a service with TLS, so for any other host: a directory with an engine's tls.crt, tls.key and
    ca.crt (`antefix certs issue engine`), and its tenant.grant (`antefix certs grant`).
    stores: several kvstore services instead, as in workers' `--stores` (docs/STORES.md): a list, or one text with
    commas.
    near_stores: names of the stores that this engine writes to.
    local_copies_bytes: limit on copies, in a near store, of blocks that are often read from another host's store.
    """

    directory: str = ""
    address: str = ""
    stores: str | Sequence[str] = ()
    near_stores: str | Sequence[str] = ()
    local_copies_bytes: int | str = "4G"
    secret_file: str = ""
    credentials: str = ""
    tenant: str = "default"
    budget_bytes: int | str = "64G"

    def __post_init__(self) -> None:
        if self.stores and (self.directory or self.address):
            raise ConfigError(
                "the setting stores gives addresses and directories already: leave directory and address out"
            )
        if not self.directory and not self.address and not self.stores:
            raise ConfigError(
                "name the store by its directory (opened in this process), by its address (a kvstore service), "
                "or by both; name several stores with the setting stores"
            )
        if not self.directory and not self.secret_file:
            raise ConfigError(
                "a store that is reached only by its address needs secret_file, the file with the deployment's secret"
            )
        parse_byte_size(self.budget_bytes)
        parse_byte_size(self.local_copies_bytes)
        if self.is_served:
            check_stores(self.services)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Raises:  ConfigError: an unknown name, or an invalid value."""
        known = {each.name for each in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ConfigError(f"unknown settings of the store: {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        return cls(**values)

    @property
    def services(self) -> StoresConfig:
        """The kvstore services that the settings name."""
        directory = str(Path(self.directory) / "store") if self.directory and self.address else ""
        return StoresConfig(
            store_address=self.address,
            store_dir=directory,
            stores=_names(self.stores),
            near_stores=_names(self.near_stores),
            local_copies_bytes=parse_byte_size(self.local_copies_bytes),
        )

    @property
    def is_served(self) -> bool:
        """Whether the store is reached through kvstore services, which many processes may call."""
        return bool(self.address or self.stores)

    @property
    def reads_files(self) -> bool:
        """Whether at least one store is on this host and is read without a call."""
        return bool(self.directory) or any(each.directory for each in store_addresses(self.services))

    @property
    def secret_path(self) -> Path:
        return Path(self.secret_file) if self.secret_file else Path(self.directory) / "secret"


@dataclass(slots=True)
class EngineCounters:
    """Counters of an engine's reads and writes since the store was opened; `antefix_engines.metrics` shows them."""

    hit_blocks: int = 0
    missed_blocks: int = 0
    stored_records: int = 0
    sent_bytes: int = 0
    read_bytes: int = 0
    refused_records: int = 0
    errors: int = 0
    damaged_records: int = 0
    by_kind: dict[str, int] = field(default_factory=dict)
    last_error: str = ""


class EngineStore:
    """A store, with the names of one tenant."""

    def __init__(
        self,
        store: BlockingStore,
        keyring: Keyring,
        *,
        tenant: str = "default",
        credentials: Credentials | None = None,
    ) -> None:
        """store: closed together with this object. credentials: sign grants for the tenant; None: the store requires no
        grants.
        """
        self._credentials: Final = credentials
        self._grant: tuple[float, bytes] = (0.0, b"")
        self._told: Final[set[tuple[str, str]]] = set()
        self.counters: Final = EngineCounters()
        self.keyring: Final = keyring
        self.tenant: Final = tenant
        self.seals: Final = Seals(keyring)
        self._store: Final = store
        self._lock: Final = threading.Lock()

    @classmethod
    def open(cls, settings: StoreSettings) -> Self:
        """Raises:  ConfigError: no store, another process has the store open, or no secret."""
        if settings.is_served:
            return cls._of_services(settings)
        # Imported here, because only an embedded store needs the storage engine.
        import antefix_kvstore
        from antefix_kvstore.reading_here import ReadingHere

        Path(settings.directory).mkdir(parents=True, exist_ok=True)
        keyring = Keyring.from_file(create_secret_file(settings.secret_path))
        embedded = antefix_kvstore.open(Path(settings.directory) / "store", budget_bytes=settings.budget_bytes)
        return cls(ReadingHere(embedded), keyring, tenant=settings.tenant)

    @classmethod
    def _of_services(cls, settings: StoreSettings) -> Self:
        services, keyring = settings.services, Keyring.from_file(settings.secret_path)
        files = CredentialFiles(settings.credentials) if settings.credentials else None
        if files is not None:
            _check_grant(files, keyring, settings)
        credentials = Credentials(Role.ENGINE, files=files, keyring=keyring)
        where = store_addresses(services)
        if len(where) < len(services.stores):
            raise ConfigError(
                "an engine needs its stores by name, as NAME=ADDRESS, because it cannot find stores by DNS or Redis"
            )
        for each in where:
            check_calling(each.address, has_tls=files is not None)
            own_credentials.use_for(each.address, credentials)
        seals = Seals(keyring)
        more = object_tiers(services, seals=seals, keyring=keyring)
        store = open_stores(where, near=services.near_stores, seals=seals, more=more, copies=local_copies(services))
        return cls(BlockingStore(store), keyring, tenant=settings.tenant, credentials=credentials)

    def kv(self, fingerprint: Fingerprint, layout: EngineLayout) -> KvOfModel:
        """The records of one model, engine and layout. The layout is registered with the store, so that the store can
        compress.
        """
        kv = KvOfModel(self, fingerprint, layout)
        self.attempt("register", lambda store: store.register(kv.digest, layout, statement=fingerprint.statement), None)
        return kv

    def attempt(self, what: str, call: Any, otherwise: Any) -> Any:
        """The result of the call, or `otherwise` if the store fails; failures are counted and logged, never raised."""
        try:
            grants.hold(self._signed_grant())
            return call(self._store)
        except AntefixError as err:
            name = type(err).__name__
            with self._lock:
                self.counters.errors += 1
                self.counters.by_kind[name] = self.counters.by_kind.get(name, 0) + 1
                self.counters.last_error = f"{what}: {name}: {err}"
                is_news = (what, name) not in self._told
                self._told.add((what, name))
            # A warning only once for each kind: a dead store fails at every prompt, and the counters say how often.
            level = logging.WARNING if is_news else logging.DEBUG
            log.log(level, "the store failed to %s, continuing without it: %s", what, err)
            return otherwise

    def _signed_grant(self) -> bytes:
        """A grant for the tenant, renewed before it expires. Calls in other threads run in this context, which carries
        the grant.
        """
        if self._credentials is None:
            return b""
        with self._lock:
            made, grant = self._grant
            if time.monotonic() > made + GRANT_S / 2 or not grant:
                grant = self._credentials.grant_for(self.tenant, as_tokens([]), ttl_s=GRANT_S)
                self._grant = (time.monotonic(), grant)
        return grant

    def count(self, **more: int) -> None:
        """Add to counters, from any thread."""
        with self._lock:
            for name, number in more.items():
                setattr(self.counters, name, getattr(self.counters, name) + number)

    def close(self) -> None:
        self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class KvOfModel:
    """The records in the store under one fingerprint (`antefix.block.Fingerprint`). Made by `EngineStore.kv`."""

    def __init__(self, store: EngineStore, fingerprint: Fingerprint, layout: EngineLayout) -> None:
        self.layout: Final = layout
        self.fingerprint: Final = fingerprint
        self.digest: Final = fingerprint.digest
        self._store: Final = store
        self._key: Final = store.keyring.key(store.tenant)
        self._owner: Final = store.keyring.owner(store.tenant)
        self.root: Final = root_of(self.digest, self._key)

    def chain(self, tokens: Tokens) -> Chain:
        """The names of blocks of these tokens, by the fingerprint's kind of hash.

        Raises:  InvalidRequest: the kind is ENGINE_KEY.
        """
        return chain_of(
            tokens,
            fingerprint_digest=self.digest,
            key=self._key,
            block_size=self.layout.block_size,
            kind=self.fingerprint.hash_kind,
        )

    def hash_of(self, engine_key: bytes) -> bytes:
        """The name of a record that the engine calls `engine_key`. The engine's key must identify all tokens up to the
        record's end.
        """
        return engine_key_hash(self.root, engine_key, self._key)

    def block(self, hash: bytes, parent: bytes, position: int, payload: Buffer) -> Record:
        """A block's record. parent: the block before, or the root.  position: number of tokens up to the block's
        end.
        """
        return self._record(RecordKind.BLOCK, hash, parent, position, payload)

    def checkpoint(self, hash: bytes, parent: bytes, position: int, payload: Buffer) -> Record:
        """A checkpoint's record. hash, parent: those of its block, which must be stored."""
        return self._record(RecordKind.CHECKPOINT, hash, parent, position, payload)

    def lookup(self, chain: Sequence[bytes]) -> LookupResult:
        """How much of a chain is stored, and after which blocks there are checkpoints."""
        found: LookupResult = self._store.attempt(
            "look up blocks",
            lambda store: store.lookup(chain, fingerprint=self.digest, tenant=self._owner),
            NOTHING,
        )
        self._store.count(hit_blocks=found.num_blocks, missed_blocks=len(chain) - found.num_blocks)
        return found

    def get_blocks(self, hashes: Sequence[bytes], into: Sequence[memoryview]) -> int:
        """Fill `into[i]` with block `hashes[i]`. Returns how many leading blocks passed all checks; the content of
        later buffers is undefined.
        """
        num_good: int = self._store.attempt(
            "read blocks",
            lambda store: store.get_blocks(hashes, into, fingerprint=self.digest, tenant=self._owner),
            0,
        )
        read = sum(each.nbytes for each in into[:num_good])
        self._store.count(read_bytes=read, damaged_records=int(num_good < len(hashes)))
        return num_good

    def get_checkpoint(self, hash: bytes) -> bytes | None:
        """A checkpoint's payload; None if it is missing, damaged, or has another size than the layout's."""
        payload: bytes | None = self._store.attempt(
            "read a checkpoint",
            lambda store: store.get(RecordKind.CHECKPOINT, hash, fingerprint=self.digest, tenant=self._owner),
            None,
        )
        if payload is None or len(payload) != self.layout.checkpoint_bytes:
            self._store.count(damaged_records=1)
            return None
        self._store.count(read_bytes=len(payload))
        return payload

    def put(self, records: Sequence[Record]) -> int:
        """Store records, parents first. Returns how many of the blocks are stored now."""
        done = self._put(records)
        return 0 if done is None else int(done.num_stored) + int(done.num_existing)

    def put_each(self, records: Sequence[Record]) -> list[bool]:
        """Store records as `put` does. Returns for each record whether it is stored now."""
        done = self._put(records)
        return [done is not None and record.hash not in done.refused for record in records]

    def pin(self, hashes: Sequence[bytes], duration_s: float) -> None:
        """Keep blocks from eviction for a time; 0 unpins them."""
        names = [(RecordKind.BLOCK, name) for name in hashes]
        if names:
            call = lambda store: store.pin(names, duration_s=duration_s, owner=self._owner)  # noqa: E731
            self._store.attempt("pin blocks", call, 0)

    def evict(self, hashes: Sequence[bytes]) -> int:
        """Delete blocks and all records that depend on them. Returns how many records were deleted."""
        names = [(RecordKind.BLOCK, name) for name in hashes]
        went: int = self._store.attempt("evict blocks", lambda store: store.evict(names, owner=self._owner), 0)
        return went

    def _put(self, records: Sequence[Record]) -> PutResult | None:
        """The result of the store; None if there was nothing to do, or the store failed."""
        if not records:
            return None
        done: PutResult | None = self._store.attempt("store records", lambda store: store.put(records), None)
        if done is None:
            return None
        if done.refused:
            log.warning(
                "the store refused %d records; the reason for the first was: %s",
                len(done.refused),
                next(iter(done.refused.values())),
            )
        sent = sum(memoryview(record.payload).nbytes for record in records)
        self._store.count(stored_records=done.num_stored, sent_bytes=sent, refused_records=len(done.refused))
        return done

    def _record(self, kind: RecordKind, hash: bytes, parent: bytes, position: int, payload: Buffer) -> Record:
        return self._store.seals.seal(
            Record(
                kind=kind,
                hash=hash,
                parent=parent,
                fingerprint=self.digest,
                position=position,
                payload=payload,
                tenant=self._owner,
                labels=self.fingerprint.labels,
            )
        )


def _names(given: str | Sequence[str]) -> tuple[str, ...]:
    """Names given as a list, or as one text with commas, as in engines' configurations."""
    parts = given.split(",") if isinstance(given, str) else given
    return tuple(part.strip() for part in parts if part.strip())


def _check_grant(files: CredentialFiles, keyring: Keyring, settings: StoreSettings) -> None:
    """Refuse a wrong grant at the start, since the store would refuse every call.

    Raises:  ConfigError: there is no grant, it has expired, or it is for another tenant.
    """
    loaded, how = files.now(), f"`antefix certs grant {settings.tenant}` makes one"
    if not loaded.tenant_grant:
        raise ConfigError(f"{files.directory} has no {TENANT_GRANT}, so the store would refuse all calls: {how}")
    grant = unchecked(loaded.tenant_grant)
    if keyring.owner(settings.tenant) not in grant.owners:
        raise ConfigError(
            f"{files.directory / TENANT_GRANT} is not for tenant {settings.tenant!r}, or was signed under "
            f"another secret: {how}"
        )
    if grant.expires_ms < 1000 * time.time():
        raise ConfigError(f"the permission in {files.directory / TENANT_GRANT} has expired: {how}")
