"""Converts a tenant's name, or its digest, to the owners that stand for the tenant in a store's records.

Records hold digests, which are made with the deployment's secret. With the secret, tenants can be given by name;
without it, by digest.
"""

from __future__ import annotations

from typing import Final

from antefix.block import USER_SEPARATOR
from antefix.errors import ConfigError
from antefix.secret import OWNER_BYTES, TENANT_BYTES, USER_BYTES, Keyring
from antefix.store_files.record_header import owner_row

DIGEST_PREFIX: Final = "digest:"
_NO_USER: Final = bytes(USER_BYTES)
_ACCOUNT_ROW_BYTES: Final = 1 + TENANT_BYTES


class Owners:
    """Maps names to owners. keyring: None: the secret is not known, so a tenant's name finds only records of
    version 1.
    """

    def __init__(self, keyring: Keyring | None = None) -> None:
        self._keyring = keyring

    def rows(self, tenant: str) -> tuple[bytes, ...]:
        """All forms of a tenant as owner: its digest under each secret, and its name in records of version 1.

        Raises:  ConfigError: the text after "digest:" is not a digest.
        """
        if tenant.startswith(DIGEST_PREFIX):
            return (owner_row(2, _digest_of(tenant)),)
        named = owner_row(1, tenant.encode())
        if self._keyring is None:
            return (named,)
        digests = [self._keyring.owner(tenant, number) for number in self._keyring.generations]
        return (*(owner_row(2, digest) for digest in digests), named)


NO_OWNERS: Final = Owners()


class KnownNames:
    """Maps owners back to names, for names that the user gave. A name cannot be computed back from its digest."""

    def __init__(self, tenants: tuple[str, ...] = (), owners: Owners = NO_OWNERS) -> None:
        self._names = {row: tenant for tenant in ("", *tenants) for row in owners.rows(tenant)}

    def name(self, owner: bytes) -> str:
        """The owner as shown to people: its name if it is known, else its digest."""
        if owner[:1] == b"t":
            return owner[1:].decode(errors="replace")
        if owner in self._names:
            return self._names[owner]
        account, user = owner[:_ACCOUNT_ROW_BYTES] + _NO_USER, owner[_ACCOUNT_ROW_BYTES:]
        if user == _NO_USER:
            return DIGEST_PREFIX + owner[1:_ACCOUNT_ROW_BYTES].hex()
        if account in self._names:
            return f"{self._names[account]}{USER_SEPARATOR}{DIGEST_PREFIX}{user.hex()}"
        return DIGEST_PREFIX + owner[1:].hex()


def account_of(owner: bytes) -> bytes:
    """The owner that stands for the whole tenant, with all of its users."""
    return owner[:_ACCOUNT_ROW_BYTES] if owner[:1] == b"o" else owner


def without_user(owner: bytes) -> bytes:
    """The owner without the zeros of an empty user: the tenant's digest alone, or tenant and user."""
    return account_of(owner) if owner.endswith(_NO_USER) else owner


def _digest_of(tenant: str) -> bytes:
    text = tenant.removeprefix(DIGEST_PREFIX)
    try:
        digest = bytes.fromhex(text)
    except ValueError:
        digest = b""
    if len(digest) not in (TENANT_BYTES, OWNER_BYTES):
        raise ConfigError(f"a tenant's digest has {2 * TENANT_BYTES} or {2 * OWNER_BYTES} hex digits, is {text!r}")
    return digest.ljust(OWNER_BYTES, b"\0")
