"""Encryption at rest: AES-256-GCM with one key per tenant, so that dropping a key drops all that the tenant has stored.

The keys file is JSON, {"tenant": "64 hex digits", ...}, and readable by its owner only. A tenant is named, which takes
the deployment's secret, or given by the digest that `antefix inspect` shows, behind "digest:". Its key opens what all
its users have stored, unless one of them has a key of his own. What is encrypted is the coded payload; hashes, sizes
and times stay readable, tokens and text are in none of them. The associated data bind a ciphertext to its record, so it
cannot be served under another name. The cryptography package does the work.

Where nobody needs to drop single tenants' keys, one file makes them all (`KeyRing.from_master_file`).
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from antefix.checked_files import read_json
from antefix.errors import BlockCorrupt, ConfigError
from antefix.secret import read_generations
from antefix.store_files.owners import NO_OWNERS, Owners, account_of, without_user
from antefix.store_files.record_format import NONCE_BYTES
from antefix.store_files.record_header import RecordHeader, signed_part_of

KEY_BYTES: Final = 32
TAG_BYTES: Final = 16
# Owners come from callers.
_NUM_DERIVED_MAX: Final = 4096


class KeyRing:
    """The tenants' keys. Immutable; thread-safe."""

    def __init__(self, keys: dict[str, bytes], owners: Owners = NO_OWNERS, *, masters: Sequence[bytes] = ()) -> None:
        """owners: who is meant by a tenant's name.  masters: what tenants' keys are made of, the current one first.

        Raises:  ConfigError: a key has not 32 bytes.
        """
        self._masters = tuple(masters)
        self._derived: dict[bytes, tuple[AESGCM, ...]] = {}
        # By what stands for the tenant in a record, without its user where that has no key of its own.
        self._ciphers: dict[bytes, AESGCM] = {}
        # Whether each key was given for records of version 2 as well: by digest, or by a name that can be made one.
        self.is_complete = all(any(row[:1] == b"o" for row in owners.rows(tenant)) for tenant in keys)
        for tenant, key in keys.items():
            if len(key) != KEY_BYTES:
                raise ConfigError(f"the key of tenant {tenant!r} must have {KEY_BYTES} bytes, has {len(key)}")
            for owner in owners.rows(tenant):
                self._ciphers[without_user(owner)] = AESGCM(key)

    @classmethod
    def from_file(cls, path: Path, owners: Owners = NO_OWNERS) -> KeyRing:
        """Raises:  ConfigError: not readable, not of the form above, or readable by others."""
        try:
            if path.stat().st_mode & 0o077:
                raise ConfigError(f"{path} must be readable by its owner only: chmod 600 {path}")
            raw = read_json(path, "keys file")
            return cls({str(tenant): bytes.fromhex(key) for tenant, key in raw.items()}, owners)
        except (OSError, ValueError, AttributeError, TypeError) as err:
            raise ConfigError(f"keys file {path}: {err}") from err

    @classmethod
    def from_master_file(cls, path: Path) -> KeyRing:
        """One file for all tenants, of a secret file's form: each has a key of its own, made of the first line's and
        its digest. The other lines' are read with: so the key changes, while what was written with the old one drains.

        Raises:  ConfigError: it cannot be read, is open to others, or a key has not 32 bytes.
        """
        masters = [key for _, key in read_generations(path, "encrypt_key_file")]
        if any(len(key) != KEY_BYTES for key in masters):
            raise ConfigError(
                f"encrypt_key_file {path}: a key must have {KEY_BYTES} bytes, as {2 * KEY_BYTES} hex digits"
            )
        return cls({}, masters=masters)

    def __contains__(self, owner: bytes) -> bool:
        return bool(self._masters) or self._cipher(owner) is not None

    def _cipher(self, owner: bytes) -> AESGCM | None:
        return next(iter(self._all(owner)), None)

    def _all(self, owner: bytes) -> tuple[AESGCM, ...]:
        """Those that a record of this owner may open with, the one that is written with first."""
        if not self._masters:
            named = self._ciphers.get(owner) or self._ciphers.get(account_of(owner))
            return () if named is None else (named,)
        account = account_of(owner)
        found = self._derived.get(account)
        if found is None:
            if len(self._derived) >= _NUM_DERIVED_MAX:
                self._derived.clear()
            found = self._derived[account] = tuple(AESGCM(_tenant_key(master, account)) for master in self._masters)
        return found

    def encrypt(self, header: RecordHeader, coded: bytes | bytearray | memoryview) -> bytes:
        """The stored bytes; `header.nonce` must be fresh.

        Raises:  KeyError: the tenant has no key.
        """
        cipher = self._cipher(header.owner)
        if cipher is None:
            raise KeyError(header.owner)
        return cipher.encrypt(header.nonce, coded, _bound_to(header))

    def decrypt(self, header: RecordHeader, stored: memoryview) -> bytes:
        """Raises:  BlockCorrupt: no key for the tenant, another key, or a forged record."""
        ciphers = self._all(header.owner)
        if not ciphers:
            raise BlockCorrupt(f"no key for tenant {header.tenant.hex()}")
        for cipher in ciphers:
            with contextlib.suppress(InvalidTag):
                return cipher.decrypt(header.nonce, stored, _bound_to(header))
        raise BlockCorrupt("a record does not open with its tenant's key")


def _tenant_key(master: bytes, account: bytes) -> bytes:
    return hashlib.blake2b(account, digest_size=KEY_BYTES, key=master, person=b"antefix-disk").digest()


def fresh_nonce() -> bytes:
    """Random: with 96 bits a key may write 2^32 records before two nonces are likely to meet (NIST SP 800-38D)."""
    return secrets.token_bytes(NONCE_BYTES)


def _bound_to(header: RecordHeader) -> bytes:
    """All of a record that compaction does not change."""
    if header.version == 2:
        return signed_part_of(header) + bytes([header.codec])
    numbers = (header.kind, header.codec, header.payload_bytes, header.position)
    return b"".join((header.hash, header.parent, header.fingerprint, *(n.to_bytes(8, "little") for n in numbers)))
