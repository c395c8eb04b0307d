"""Decides who calls with an API key, and whether the caller may make the call, by the keys that are now in force. Keys
can change while requests run.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum

from antefix.errors import PermissionDenied, Unauthenticated
from antefix_billing.api_keys import USUAL_SCOPES, ApiKey, KeyBook, Scope, digest_of


class Refused(StrEnum):
    """The reason why a key was refused, as a label of metrics."""

    MISSING = "missing"
    UNKNOWN = "unknown"
    EXPIRED = "expired"
    REVOKED = "revoked"
    SCOPE = "scope"


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyHolder:
    """The caller of a request. key_id: empty for a key from a tenants file, or where no keys are needed."""

    tenant: str
    scopes: frozenset[Scope] = USUAL_SCOPES
    key_id: str = ""


@dataclass(slots=True)
class KeyRegister:
    """The keys of the tenants file, which never change, and those of the list of API keys. Thread-safe.

    open_as: the tenant of all callers, if no keys are needed; None if each caller must have a key.
    """

    named: Mapping[bytes, str] = field(default_factory=dict)
    open_as: str | None = None
    refused: Counter[Refused] = field(default_factory=Counter)
    _book: KeyBook = field(default_factory=KeyBook)
    _keys: dict[bytes, ApiKey] = field(default_factory=dict)
    _mutex: threading.Lock = field(default_factory=threading.Lock)

    @property
    def number(self) -> int:
        return self._book.number

    @property
    def book(self) -> KeyBook:
        return self._book

    def take(self, book: KeyBook) -> bool:
        """Put this list of keys in force, unless a newer list is in force. An older list still names keys as valid that
        were revoked later.
        """
        with self._mutex:
            if book.number < self._book.number or book == self._book:
                return False
            self._book, self._keys = book, {key.digest: key for key in book.keys}
        return True

    def authenticate(
        self, api_key: str, scope: Scope | None = Scope.GENERATE, now: datetime | None = None
    ) -> KeyHolder:
        """Find the holder of a key. The lookup of a key is by its hash, so the time that it takes reveals nothing about
        the key.

        scope: the scope that the call needs; None: any.
        Raises:  Unauthenticated: the key is unknown, expired or revoked.  PermissionDenied: the key lacks the scope.
        """
        if self.open_as is not None:
            return KeyHolder(tenant=self.open_as)
        if not api_key:
            raise self._refuse(Refused.MISSING)
        digest = digest_of(api_key)
        key = self._keys.get(digest)
        if key is not None:
            state = key.state(now or datetime.now(UTC))
            if state != "valid":
                raise self._refuse(Refused(state))
            holder = KeyHolder(tenant=key.tenant, scopes=key.scopes, key_id=key.id)
        elif (tenant := self.named.get(digest)) is not None:
            holder = KeyHolder(tenant=tenant)
        else:
            raise self._refuse(Refused.UNKNOWN)
        # A key that may read all tenants' records may also read its own tenant's.
        is_enough = scope in (None, *holder.scopes) or (scope is Scope.USAGE and Scope.ADMIN in holder.scopes)
        if not is_enough:
            self._count(Refused.SCOPE)
            raise PermissionDenied(f"this API key does not have the scope {scope}")
        return holder

    def states(self, now: datetime | None = None) -> Counter[str]:
        """How many keys there are in each state."""
        moment = now or datetime.now(UTC)
        counts = Counter(key.state(moment) for key in self._book.keys)
        counts["valid"] += len(self.named)
        return counts

    def refused_counts(self) -> dict[Refused, int]:
        with self._mutex:
            return {why: self.refused[why] for why in Refused}

    def _refuse(self, why: Refused) -> Unauthenticated:
        self._count(why)
        if why in (Refused.EXPIRED, Refused.REVOKED):
            return Unauthenticated(f"the API key is {why}")
        return Unauthenticated("the API key is missing or not known")

    def _count(self, why: Refused) -> None:
        with self._mutex:
            self.refused[why] += 1
