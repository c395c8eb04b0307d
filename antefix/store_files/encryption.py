"""Encryption at rest: AES-256-GCM with one key a tenant, so that dropping a key drops all that the tenant has stored.

The keys file is JSON, {"tenant": "64 hex digits", ...}, and readable by its owner only. What is encrypted is the coded
payload; hashes, sizes and times stay readable, tokens and text are in none of them. The associated data bind a
ciphertext to its record, so it cannot be served under another name. The cryptography package does the work.
"""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Final

from antefix.errors import BlockCorrupt, ConfigError
from antefix.store_files.record_format import NONCE_BYTES, RecordHeader

KEY_BYTES: Final = 32
TAG_BYTES: Final = 16


class KeyRing:
    """The tenants' keys. Immutable; thread-safe."""

    def __init__(self, keys: dict[str, bytes]) -> None:
        """Raises:  ConfigError: the cryptography package is missing, or a key has not 32 bytes."""
        try:
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        except ImportError as err:
            raise ConfigError("encryption needs the cryptography package: pip install cryptography") from err
        for tenant, key in keys.items():
            if len(key) != KEY_BYTES:
                raise ConfigError(f"the key of tenant {tenant!r} must have {KEY_BYTES} bytes, has {len(key)}")
        self._ciphers = {tenant: AESGCM(key) for tenant, key in keys.items()}

    @classmethod
    def from_file(cls, path: Path) -> KeyRing:
        """Raises:  ConfigError: not readable, not of the form above, or readable by others."""
        try:
            if path.stat().st_mode & 0o077:
                raise ConfigError(f"{path} must be readable by its owner only: chmod 600 {path}")
            raw = json.loads(path.read_text())
            return cls({str(tenant): bytes.fromhex(key) for tenant, key in raw.items()})
        except (OSError, ValueError, AttributeError, TypeError) as err:
            raise ConfigError(f"keys file {path}: {err}") from err

    def __contains__(self, tenant: str) -> bool:
        return tenant in self._ciphers

    def encrypt(self, header: RecordHeader, coded: bytes | bytearray | memoryview) -> bytes:
        """The stored bytes; `header.nonce` must be fresh.

        Raises:  KeyError: the tenant has no key.
        """
        return self._ciphers[header.tenant].encrypt(header.nonce, coded, _bound_to(header))

    def decrypt(self, header: RecordHeader, stored: memoryview) -> bytes:
        """Raises:  BlockCorrupt: no key for the tenant, another key, or a forged record."""
        from cryptography.exceptions import InvalidTag

        cipher = self._ciphers.get(header.tenant)
        if cipher is None:
            raise BlockCorrupt(f"no key for tenant {header.tenant!r}")
        try:
            return cipher.decrypt(header.nonce, stored, _bound_to(header))
        except InvalidTag as err:
            raise BlockCorrupt("a record does not open with its tenant's key") from err


def fresh_nonce() -> bytes:
    """Random: with 96 bits a key may write 2^32 records before two nonces are likely to meet (NIST SP 800-38D)."""
    return secrets.token_bytes(NONCE_BYTES)


def _bound_to(header: RecordHeader) -> bytes:
    """All of a record that compaction does not change."""
    numbers = (header.kind, header.codec, header.payload_bytes, header.position)
    return b"".join((header.hash, header.parent, header.fingerprint, *(n.to_bytes(8, "little") for n in numbers)))
