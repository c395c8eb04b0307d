"""API keys: which tenant has which key, what each key may do, and until when. Pure. A plaintext key exists only where
it is created.

A key is `afx-<id>-<48 hex digits>`. The key's id names it in lists and logs. Of the key itself only the SHA-256 is
kept: 192 random bits cannot be guessed, so a slower hash would add nothing.

The list of API keys is stored as JSON:

    {"version": 1, "number": 7, "keys": [
        {"id": "3f9c01ab", "tenant": "acme", "sha256": "<64 hex digits>", "scopes": ["generate", "usage"],
         "created": "2026-09-10T04:00:00Z", "expires": "2026-12-01T00:00:00Z", "revoked": "", "note": "laptop"}]}

`number` counts the book's changes. A process that has a list of keys never accepts a list with a smaller number,
because an older list still names keys as valid that were revoked later.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Final

from antefix.errors import ConfigError, InvalidRequest

# Control characters of ASCII and Latin-1: a terminal obeys them instead of showing them.
CONTROL: Final = re.compile("[\x00-\x1f\x7f-\x9f]")
BOOK_VERSION: Final = 1
NUM_KEYS_MAX: Final = 100_000
_ID: Final = re.compile(r"[0-9a-f]{8}")
_NAME_BYTES_MAX: Final = 512
# The SHA-256 of the empty text. It must not be any tenant's key, because a request without a key has this digest.
_NO_KEY: Final = hashlib.sha256(b"").digest()


class Scope(StrEnum):
    """What a key may do.  generate: send requests to the model.  usage: read the tenant's own receipts and records.
    admin: read those of all tenants.
    """

    GENERATE = "generate"
    USAGE = "usage"
    ADMIN = "admin"


# The scopes of a key that names none, such as a key in a tenants file.
USUAL_SCOPES: Final = frozenset({Scope.GENERATE, Scope.USAGE})


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """The row of one key in the list. digest: the SHA-256 of the key. expires, revoked: None means never."""

    id: str
    tenant: str
    digest: bytes
    scopes: frozenset[Scope]
    created: datetime
    expires: datetime | None = None
    revoked: datetime | None = None
    note: str = ""

    def state(self, now: datetime) -> str:
        """The state of a key: valid, expired or revoked."""
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and now >= self.expires else "valid"


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyBook:
    """All API keys of a deployment. number: counts the changes of the list."""

    number: int = 0
    keys: tuple[ApiKey, ...] = ()

    def find(self, key_id: str) -> ApiKey:
        """The key with this id.  Raises:  InvalidRequest: no key has this id."""
        for key in self.keys:
            if key.id == key_id:
                return key
        raise InvalidRequest(f"there is no key {key_id!r}")

    def added(self, key: ApiKey) -> KeyBook:
        """The list of keys with one more key.  Raises:  InvalidRequest: the book is full."""
        if len(self.keys) >= NUM_KEYS_MAX:
            raise InvalidRequest(f"there are {NUM_KEYS_MAX} keys already")
        return KeyBook(number=self.number + 1, keys=(*self.keys, key))

    def changed(self, key: ApiKey) -> KeyBook:
        """The list of keys with this row in place of the row with the same id."""
        keys = tuple(key if each.id == key.id else each for each in self.keys)
        return KeyBook(number=self.number + 1, keys=keys)


def new_key(
    tenant: str,
    scopes: Iterable[Scope] = USUAL_SCOPES,
    *,
    expires: datetime | None = None,
    note: str = "",
    now: datetime | None = None,
) -> tuple[str, ApiKey]:
    """Create a key. Returns the plaintext key, which is stored nowhere, and its row.

    Raises:  InvalidRequest: a name is too long or has control characters, there is no scope, or the expiry is in the
    past.
    """
    now = (now or datetime.now(UTC)).replace(microsecond=0)
    if expires is not None and expires <= now:
        raise InvalidRequest(f"the key would be expired already: its expiry is {_written(expires)}")
    key_id = secrets.token_hex(4)
    text = f"afx-{key_id}-{secrets.token_hex(24)}"
    row = ApiKey(
        id=key_id,
        tenant=tenant,
        digest=digest_of(text),
        scopes=frozenset(scopes),
        created=now,
        expires=expires,
        note=note,
    )
    _check(row)
    return text, row


def revoke(book: KeyBook, key_id: str, *, now: datetime | None = None) -> KeyBook:
    """The list of keys with this key revoked. Raises: InvalidRequest: no key has this id, or the key is already
    revoked.
    """
    key = book.find(key_id)
    if key.revoked is not None:
        raise InvalidRequest(f"key {key_id} is revoked already")
    return book.changed(replace(key, revoked=(now or datetime.now(UTC)).replace(microsecond=0)))


def rotate(book: KeyBook, key_id: str, *, until: datetime, expires: datetime | None = None) -> tuple[str, KeyBook]:
    """Create a successor of a key, with the same tenant and scopes. The old key stays valid up to `until`.

    Raises:  InvalidRequest: no such key exists, or it is no longer valid.
    """
    old = book.find(key_id)
    if (state := old.state(datetime.now(UTC))) != "valid":
        raise InvalidRequest(f"key {key_id} is {state}: make another one for its tenant")
    text, fresh = new_key(old.tenant, old.scopes, expires=expires, note=old.note)
    ends = until if old.expires is None else min(until, old.expires)
    return text, book.changed(replace(old, expires=ends)).added(fresh)


def digest_of(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def to_json(book: KeyBook) -> str:
    rows = [
        {
            "id": key.id,
            "tenant": key.tenant,
            "sha256": key.digest.hex(),
            "scopes": sorted(key.scopes),
            "created": _written(key.created),
            "expires": _written(key.expires),
            "revoked": _written(key.revoked),
            "note": key.note,
        }
        for key in book.keys
    ]
    return json.dumps({"version": BOOK_VERSION, "number": book.number, "keys": rows}, indent=1) + "\n"


def from_json(text: str | bytes) -> KeyBook:
    """Read a book of keys.  Raises:  ConfigError: the text is not a list of keys, or it holds an unknown field."""
    try:
        table = json.loads(text)
        if table["version"] != BOOK_VERSION:
            raise ConfigError(f"this build does not know version {table['version']} of the file of API keys")
        number, rows = int(table["number"]), table["keys"]
        if set(table) != {"version", "number", "keys"} or number < 0 or not isinstance(rows, list):
            raise ConfigError("the file of API keys must have exactly the names version, number and keys")
        keys = tuple(_row(row) for row in rows)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as err:
        raise ConfigError(f"the file has no valid list of API keys: {type(err).__name__}: {err}") from err
    if len({key.id for key in keys}) < len(keys) or len({key.digest for key in keys}) < len(keys):
        raise ConfigError("a key is there twice")
    return KeyBook(number=number, keys=keys)


def _row(row: dict[str, Any]) -> ApiKey:
    names = {"id", "tenant", "sha256", "scopes", "created", "expires", "revoked", "note"}
    if set(row) != names or not all(isinstance(row[name], str) for name in names - {"scopes"}):
        raise ConfigError(
            f"a key's row must have exactly the names {', '.join(sorted(names))}, and all values but scopes must be "
            "strings"
        )
    created = _moment(row["created"])
    if created is None:
        raise ConfigError("a key's row must say when it was created")
    key = ApiKey(
        id=row["id"],
        tenant=row["tenant"],
        digest=bytes.fromhex(row["sha256"]),
        scopes=frozenset(Scope(scope) for scope in row["scopes"]),
        created=created,
        expires=_moment(row["expires"]),
        revoked=_moment(row["revoked"]),
        note=row["note"],
    )
    _check(key)
    return key


def _check(key: ApiKey) -> None:
    if not _ID.fullmatch(key.id):
        raise ConfigError(f"a key's id must have 8 hex digits, is {key.id!r}")
    for name, text in (("tenant", key.tenant), ("note", key.note)):
        if CONTROL.search(text) or len(text.encode()) > _NAME_BYTES_MAX:
            raise ConfigError(f"{name} of key {key.id} has control characters or more than {_NAME_BYTES_MAX} bytes")
    if key.tenant == "*":
        raise ConfigError(f"key {key.id}: the tenant * stands for all tenants, so it cannot have a key")
    if not key.tenant or not key.scopes:
        raise ConfigError(f"key {key.id} needs a tenant and at least one scope of {', '.join(Scope)}")
    check_digest(key.digest, f"key {key.id}")


def check_digest(digest: bytes, whose: str) -> None:
    """Check the digest of an API key.

    Raises:  ConfigError: it is not a SHA-256, or it is the SHA-256 of the empty text, which every caller without a key
    has.
    """
    if len(digest) != hashlib.sha256().digest_size:
        raise ConfigError(f"{whose}: an API key's SHA-256 must have 64 hex digits")
    if digest == _NO_KEY:
        raise ConfigError(f"{whose}: this is the SHA-256 of an empty key, which would let everybody in")


def _written(moment: datetime | None) -> str:
    return "" if moment is None else moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _moment(text: str) -> datetime | None:
    if not text:
        return None
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        return moment.replace(tzinfo=UTC)
    try:
        return moment.astimezone(UTC)
    except OverflowError as err:  # the years 1 and 9999 overflow when some time zones are converted to UTC
        raise ValueError(
            f"the time {text!r} cannot be converted to UTC, because it is before or after all times there"
        ) from err
