"""Reads the index, which says which records are stored and where. Every process on the host reads the index; only the
store's owner writes it.

The index is an LMDB file. The store's owner maps the index file into memory. All other processes read its pages with
`pread` (`index_pages.py`): if the file is truncated, replaced or deleted, their reads fail, whereas a memory map would
end the process (SIGBUS).

Tables:  blocks, checkpoints   hash -> format.INDEX_ENTRY
         leaves                rank, kind, hash -> nothing; what eviction takes first comes first
         expiry                expiry time, kind, hash -> nothing; leaves only
         segments              number -> format.SEGMENT_ENTRY
         names                 maps fingerprints and owners to the small ids in entries, and back
         totals                per kind, per owner: records, extent bytes, payload bytes
         meta                  how many records are quarantined, and how many have no parent here; the plans and
                               statements of fingerprints
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import lmdb

from antefix.errors import ConfigError, Unavailable
from antefix.lmdb_path import lmdb_path
from antefix.record import Held, LookupResult, RecordKind
from antefix.store_files.index_pages import PageFile, PageTxn
from antefix.store_files.record_format import IndexEntry, position_in, unpack_entry

TABLES: Final = ("blocks", "checkpoints", "leaves", "expiry", "segments", "names", "totals", "meta")
TABLE_OF_KIND: Final = {RecordKind.BLOCK: "blocks", RecordKind.CHECKPOINT: "checkpoints"}
DATA_FILE: Final = "data.mdb"
# How many of the owner's threads may read at once.
READERS_MAX: Final = 1024
# If the store has at most this many checkpoints per block of a chain, walking over all checkpoints is faster than
# looking up each block's. A reader of pages looks up a key in some 8 us, and walks over one in 0.5 us.
_WALKED_PAGES_MAX: Final = 8
# The same limit for the owner: in a small table it looks up a missing key in 0.05 us, and walks over a key and value in
# 0.4 us.
_WALKED_MAP_MAX: Final = 1 / 16
QUARANTINED_KEY: Final = b"quarantined"
APART_KEY: Final = b"apart"
# The key of a statement in the table `meta` is this prefix and the fingerprint.
STATEMENT_PREFIX: Final = b"said"
GENERATION_BYTES: Final = 2
_U64: Final = struct.Struct("<Q")
_GROUP_KEYS: Final = 256

# LMDB forbids opening an environment twice in a process, so the engine and readers in its process share one.
_open_lock = threading.Lock()
_open: dict[tuple[int, int], _Shared] = {}


@dataclass(frozen=True, slots=True)
class Change:
    """A record that became readable or unreadable by a committed transaction."""

    kind: RecordKind
    hash: bytes
    fingerprint_id: int
    present: bool


class _Shared:
    """One LMDB environment of this process, and the number of its users."""

    def __init__(self, env: lmdb.Environment, identity: tuple[int, int]) -> None:
        self.env = env
        self.identity = identity
        self.num_users = 0


@dataclass(frozen=True, slots=True)
class _Live:
    """Which index entries count as stored for one question: fingerprint, owners and time."""

    fingerprint_id: int
    owner_ids: frozenset[int] | None
    now_ms: int

    def has(self, entry: IndexEntry) -> bool:
        return entry.fingerprint_id == self.fingerprint_id and self.has_owned(entry)

    def has_owned(self, entry: IndexEntry) -> bool:
        return (self.owner_ids is None or entry.tenant_id in self.owner_ids) and entry.live(self.now_ms)


class Index:
    """An open index. Every read of the index needs a transaction from `txn()`."""

    def __init__(
        self, directory: Path, *, map_bytes: int = 0, write: bool = False, mapped: bool = False, durable: bool = True
    ) -> None:
        """write: open to write, as the store's owner.  mapped: read through a memory map; only the store's owner may,
        before it opens the index to write. durable: whether each commit is synced. False may be used only for a new
        index that is synced as a whole before anyone reads it.

        Raises:  Unavailable: there is no index, or it cannot be opened.
        """
        self.directory = directory
        # Set by the writer; called after each commit with the changes of the transaction.
        self.on_change: Callable[[list[Change]], None] | None = None
        self._shared: _Shared | None = None
        self._retired: list[_Shared] = []
        self._pages: PageFile | None = None
        self.db: dict[str, Any] = {name: name for name in TABLES}
        with _open_lock:
            own = _open.get(_identity(directory) or (-1, -1))
            if write or mapped or own is not None:
                self._shared = _acquire(directory, map_bytes, write, durable)
        if self._shared is None:
            self._pages = PageFile(directory / DATA_FILE)
            return
        try:
            for name in TABLES:
                self.db[name] = self.env.open_db(name.encode(), create=write)
        except lmdb.Error as err:
            self.close()
            raise Unavailable(f"the index in {directory} cannot be read: {err}") from err

    @property
    def env(self) -> lmdb.Environment:
        """The owner's LMDB environment."""
        assert self._shared is not None, "a reader has no map"
        return self._shared.env

    @property
    def replaced(self) -> bool:
        """Whether the index was rebuilt: the file at the index's path is no longer the one that is open."""
        opened = self._shared or self._pages
        return opened is None or _identity(self.directory) != opened.identity

    def txn(self) -> Any:
        """A transaction for reading: an LMDB snapshot for the owner, a `PageTxn` for other processes.

        Raises:  Unavailable: the file cannot be read.
        """
        return PageTxn(self._pages) if self._pages is not None else self.env.begin()

    def close(self) -> None:
        if self._pages is not None:
            self._pages.close()
        opened = [shared for shared in (self._shared, *self._retired) if shared is not None]
        self._shared, self._retired = None, []
        with _open_lock:
            for shared in opened:
                shared.num_users -= 1
                if shared.num_users == 0:
                    _open.pop(shared.identity, None)
                    shared.env.close()

    def take_over(self, fresh: Index) -> None:
        """Switch to another opened index, after the file of this index was lost. For the owner.

        The previous memory map stays open until `close`, because threads may still be reading it.
        """
        if self._shared is not None:
            self._retired.append(self._shared)
        self._shared, self.db = fresh._shared, fresh.db

    def entry(self, txn: Any, kind: RecordKind, block_hash: bytes) -> IndexEntry | None:
        value = txn.get(block_hash, db=self.db[TABLE_OF_KIND[kind]])
        return None if value is None else unpack_entry(value, block_hash)

    def entries(self, txn: Any, kind: RecordKind, hashes: Sequence[bytes]) -> Iterator[IndexEntry | None]:
        """The entries of several records, as by `entry`. Many keys are read in one call, which takes a third of the
        time.
        """
        with txn.cursor(db=self.db[TABLE_OF_KIND[kind]]) as cursor:
            for first in range(0, len(hashes), _GROUP_KEYS):
                part = hashes[first : first + _GROUP_KEYS]
                found = dict(cursor.getmulti(part))
                for block_hash in part:
                    value = found.get(block_hash)
                    yield None if value is None else unpack_entry(value, block_hash)

    def fingerprint_id(self, txn: Any, fingerprint: bytes) -> int | None:
        value = txn.get(b"f" + fingerprint, db=self.db["names"])
        return None if value is None else int.from_bytes(value, "little")

    def owner_id(self, txn: Any, owner: bytes) -> int | None:
        """The id of an owner; None if the owner has no records. owner: in the form of `record_header.owner_row`."""
        value = txn.get(owner, db=self.db["names"])
        return None if value is None else int.from_bytes(value, "little")

    def owner_ids(self, txn: Any, owners: Collection[bytes] | None) -> frozenset[int] | None:
        """The ids of those owners that have stored records; None if `owners` is None, which means any owner."""
        if owners is None:
            return None
        found = (self.owner_id(txn, owner) for owner in owners)
        return frozenset(number for number in found if number is not None)

    def owners(self, txn: Any) -> dict[int, bytes]:
        """All owners with stored records, by id, in the form of `owner_row`."""
        named = {number: owner_of(b"t", value) for number, value in self._named(txn, b"T")}
        return named | {number: owner_of(b"o", value) for number, value in self._named(txn, b"O")}

    def generations(self, txn: Any) -> dict[int, int]:
        """The generation of the secret that made each owner's digest, by the owner's id."""
        return {number: int.from_bytes(value[-GENERATION_BYTES:], "little") for number, value in self._named(txn, b"O")}

    def statement(self, txn: Any, fingerprint: bytes) -> bytes:
        """The statement of a fingerprint (the values that it was hashed from); empty if the store does not know it."""
        value = txn.get(STATEMENT_PREFIX + fingerprint, db=self.db["meta"])
        return b"" if value is None else bytes(value)

    def fingerprints(self, txn: Any) -> dict[int, bytes]:
        """The digests of all fingerprints, by id."""
        return {number: bytes(value[:32]) for number, value in self._named(txn, b"F")}

    def _named(self, txn: Any, prefix: bytes) -> Iterator[tuple[int, bytes]]:
        with txn.cursor(db=self.db["names"]) as cursor:
            for key, value in cursor:
                if key[:1] == prefix and len(key) == 5:
                    yield int.from_bytes(key[1:], "little"), value

    def block_tokens(self, txn: Any, fingerprint: bytes) -> int:
        """Tokens per block of this fingerprint; 0: not known yet."""
        number = txn.get(b"f" + fingerprint, db=self.db["names"])
        value = None if number is None else txn.get(b"F" + number, db=self.db["names"])
        return 0 if value is None else int.from_bytes(value[32:], "little")

    def _tokens_of(self, txn: Any, fingerprint_id: int) -> int:
        value = txn.get(b"F" + fingerprint_id.to_bytes(4, "little"), db=self.db["names"])
        return 0 if value is None else int.from_bytes(value[32:], "little")

    def num_quarantined(self, txn: Any) -> int:
        return self._number(txn, QUARANTINED_KEY)

    def num_apart(self, txn: Any) -> int:
        """How many records have their parent in another store."""
        return self._number(txn, APART_KEY)

    def _number(self, txn: Any, key: bytes) -> int:
        value = txn.get(key, db=self.db["meta"])
        return 0 if value is None else int(_U64.unpack(value)[0])

    def lookup(
        self, chain: Sequence[bytes], *, fingerprint: bytes, now_ms: int, owners: Collection[bytes] | None = None
    ) -> LookupResult:
        """The longest stored prefix of `chain` and the checkpoints inside it.

        The process that owns the store looks records up in one snapshot of the index. In another process a transaction
        may be committed during the look-up; a block that it evicts is then found missing when the block is read.

        owners: only records of these owners count, in the form of `owner_row`; None: records of all owners.
        """
        with self.txn() as txn:
            fingerprint_id = self.fingerprint_id(txn, fingerprint)
            if fingerprint_id is None or not chain:
                return LookupResult(num_blocks=0)
            wanted = _Live(fingerprint_id, self.owner_ids(txn, owners), now_ms)
            # 1. If all parents are in this store, the stored blocks are a prefix, which a binary search finds.
            if self.num_quarantined(txn) or self.num_apart(txn):
                num_blocks = self._scan(txn, chain, wanted)
            else:
                num_blocks = self._bisect(txn, chain, wanted)
            if not num_blocks:
                return LookupResult(num_blocks=0)
            # 2. There are few checkpoints, so most of these keys miss quickly in a small table.
            last = self.entry(txn, RecordKind.BLOCK, chain[num_blocks - 1])
            return LookupResult(
                num_blocks=num_blocks,
                checkpoints=self._checkpoints(txn, chain[:num_blocks], wanted),
                block_bytes=last.prefix_bytes if last else 0,
            )

    def _present(self, txn: Any, block_hash: bytes, wanted: _Live) -> bool:
        entry = self.entry(txn, RecordKind.BLOCK, block_hash)
        return entry is not None and wanted.has(entry)

    def _bisect(self, txn: Any, chain: Sequence[bytes], wanted: _Live) -> int:
        low, high = 0, len(chain)
        while low < high:
            middle = (low + high + 1) // 2
            if self._present(txn, chain[middle - 1], wanted):
                low = middle
            else:
                high = middle - 1
        return low

    def _scan(self, txn: Any, chain: Sequence[bytes], wanted: _Live) -> int:
        """The length of the stored prefix, checked block by block. A quarantined record is a gap in the chain: the
        blocks after it stay stored until the record is put again.
        """
        for index, there in enumerate(self._flags(txn, chain, wanted)):
            if not there:
                return index
        return len(chain)

    def held(
        self, chain: Sequence[bytes], *, fingerprint: bytes, now_ms: int, owners: Collection[bytes] | None = None
    ) -> Held:
        """All blocks and checkpoints of `chain` that are stored, in one snapshot. owners: as for `lookup`."""
        with self.txn() as txn:
            fingerprint_id = self.fingerprint_id(txn, fingerprint)
            if fingerprint_id is None or not chain:
                return Held()
            wanted = _Live(fingerprint_id, self.owner_ids(txn, owners), now_ms)
            checkpoints = self._checkpoints(txn, chain, wanted)
            if not self.num_quarantined(txn) and not self.num_apart(txn):
                num_blocks = self._bisect(txn, chain, wanted)
                return Held(spans=((0, num_blocks),) if num_blocks else (), checkpoints=checkpoints)
            return Held.of_flags(self._flags(txn, chain, wanted), checkpoints)

    def _flags(self, txn: Any, chain: Sequence[bytes], wanted: _Live) -> Iterator[bool]:
        """For each block, whether it is stored."""
        return (entry is not None and wanted.has(entry) for entry in self.entries(txn, RecordKind.BLOCK, chain))

    def _checkpoints(self, txn: Any, chain: Sequence[bytes], wanted: _Live) -> tuple[int, ...]:
        block_tokens = self._tokens_of(txn, wanted.fingerprint_id)
        counts = []
        with txn.cursor(db=self.db["checkpoints"]) as cursor:
            for key, value in self._of_chain(txn, cursor, chain, block_tokens):
                entry = unpack_entry(value, key)
                if entry is not None and wanted.has_owned(entry):
                    after_blocks = entry.position // block_tokens if block_tokens else 0
                    is_there = 0 < after_blocks <= len(chain) and chain[after_blocks - 1] == key
                    counts.append(after_blocks if is_there else chain.index(key) + 1)
        return tuple(sorted(counts))

    def _of_chain(
        self, txn: Any, cursor: Any, chain: Sequence[bytes], block_tokens: int
    ) -> Iterable[tuple[bytes, bytes]]:
        """Keys and values of the checkpoints in `chain`, by look-ups or by a walk over the table,
        whichever is faster.
        """
        num_stored = txn.stat(self.db["checkpoints"])["entries"]
        if isinstance(txn, PageTxn):
            if num_stored >= _WALKED_PAGES_MAX * len(chain):
                return cursor.getmulti(chain)  # type: ignore[no-any-return]
            asked = frozenset(chain)
            keys = [key for key in cursor.iternext(keys=True, values=False) if key in asked]
            return cursor.getmulti(keys) if keys else ()
        if num_stored < _WALKED_MAP_MAX * len(chain) and block_tokens:
            return _in_their_places(cursor, chain, block_tokens)
        return cursor.getmulti(chain)  # type: ignore[no-any-return]


def _in_their_places(cursor: Any, chain: Sequence[bytes], block_tokens: int) -> Iterator[tuple[bytes, bytes]]:
    """The checkpoints of the whole table that are in `chain`, at the position that their entries give."""
    for key, value in cursor:
        after_blocks = position_in(value) // block_tokens
        if 0 < after_blocks <= len(chain) and chain[after_blocks - 1] == key:
            yield key, value


def owner_of(letter: bytes, value: bytes) -> bytes:
    """The owner in a row of the table `names`, without the secret's generation, which follows a digest there."""
    return letter + bytes(value[:-GENERATION_BYTES] if letter == b"o" else value)


def _identity(directory: Path) -> tuple[int, int] | None:
    try:
        stat = (directory / DATA_FILE).stat()
    except OSError:
        return None
    return stat.st_dev, stat.st_ino


def _acquire(directory: Path, map_bytes: int, write: bool, durable: bool) -> _Shared:
    identity = _identity(directory)
    shared = _open.get(identity) if identity else None
    if shared is not None:
        if write and shared.env.flags()["readonly"]:
            raise Unavailable(
                f"a reader in this process has {directory} open; in one process, the writer must open it before readers"
            )
        shared.num_users += 1
        return shared
    try:
        with lmdb_path(directory) as path:
            env = lmdb.Environment(
                path,
                # 0: the map size that the file records.
                map_size=map_bytes,
                readonly=not write,
                create=write,
                sync=durable,
                metasync=durable,
                mode=0o600,
                max_dbs=len(TABLES),
                max_readers=READERS_MAX,
                # A look-up touches random pages, so read-ahead would fetch megabytes that are not used.
                readahead=False,
                # Zero pages before they are written. Otherwise earlier memory contents, such as unencrypted payloads,
                # would be written to the disk.
                meminit=True,
                max_spare_txns=16,
            )
    except lmdb.MemoryError as err:
        # The index is not damaged, so it must not be rebuilt.
        raise ConfigError(
            f"the index in {directory} does not fit the address space that is left (the index maps {map_bytes} "
            "bytes): raise `ulimit -v`, or lower --budget-bytes"
        ) from err
    except lmdb.Error as err:
        raise Unavailable(f"the store's index cannot be opened in {directory}: {err}") from err
    identity = _identity(directory)
    assert identity is not None
    shared = _Shared(env, identity)
    shared.num_users = 1
    _open[identity] = shared
    return shared
