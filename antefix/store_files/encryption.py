"""Encryption at rest: AES-256-GCM with one key per tenant, so that dropping a key drops all that the tenant has stored.

The keys file is JSON, {"tenant": "64 hex digits", ...}, and readable by its owner only. A tenant is named, which takes
the deployment's secret, or given by the digest that `antefix inspect` shows, behind "digest:". Its key opens what all
its users have stored, unless one of them has a key of his own. What is encrypted is the coded payload; hashes, sizes
and times stay readable, tokens and text are in none of them. The associated data bind a ciphertext to its record, so it
cannot be served under another name. The cryptography package does the work.
"""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from antefix.errors import BlockCorrupt, ConfigError
from antefix.store_files.owners import NO_OWNERS, Owners, account_of, without_user
from antefix.store_files.record_format import NONCE_BYTES
from antefix.store_files.record_header import RecordHeader, signed_part_of

KEY_BYTES: Final = 32
TAG_BYTES: Final = 16


class KeyRing:
    """The tenants' keys. Immutable; thread-safe."""

    def __init__(self, keys: dict[str, bytes], owners: Owners = NO_OWNERS) -> None:
        """owners: who is meant by a tenant's name.  Raises:  ConfigError: a key has not 32 bytes."""
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
            raw = json.loads(path.read_text())
            return cls({str(tenant): bytes.fromhex(key) for tenant, key in raw.items()}, owners)
        except (OSError, ValueError, AttributeError, TypeError) as err:
            raise ConfigError(f"keys file {path}: {err}") from err

    def __contains__(self, owner: bytes) -> bool:
        return self._cipher(owner) is not None

    def _cipher(self, owner: bytes) -> AESGCM | None:
        return self._ciphers.get(owner) or self._ciphers.get(account_of(owner))

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
        cipher = self._cipher(header.owner)
        if cipher is None:
            raise BlockCorrupt(f"no key for tenant {header.tenant.hex()}")
        try:
            return cipher.decrypt(header.nonce, stored, _bound_to(header))
        except InvalidTag as err:
            raise BlockCorrupt("a record does not open with its tenant's key") from err


def fresh_nonce() -> bytes:
    """Random: with 96 bits a key may write 2^32 records before two nonces are likely to meet (NIST SP 800-38D)."""
    return secrets.token_bytes(NONCE_BYTES)


def _bound_to(header: RecordHeader) -> bytes:
    """All of a record that compaction does not change."""
    if header.version == 2:
        return signed_part_of(header) + bytes([header.codec])
    numbers = (header.kind, header.codec, header.payload_bytes, header.position)
    return b"".join((header.hash, header.parent, header.fingerprint, *(n.to_bytes(8, "little") for n in numbers)))
