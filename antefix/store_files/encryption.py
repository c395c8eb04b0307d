"""Encryption at rest: AES-256-GCM with one key per tenant. Deleting a key makes all the tenant's records unreadable.

The keys file is JSON, {"tenant": "64 hex digits", ...}, and only its owner may read it. A tenant is given by name,
which needs the deployment's secret, or as "digest:" and the digest that `antefix inspect` shows. A tenant's key
decrypts the records of all its users, except users with their own keys. The coded payload is encrypted. Hashes, sizes
and times stay readable; they contain no tokens and no text. The associated data bind a ciphertext to its record, so it
cannot be used under another name. The encryption itself is done by the cryptography package.

If it is not necessary to delete the keys of single tenants, all keys can be made from one master file
(`KeyRing.from_master_file`).
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
# Owners come from callers, so the cache of derived keys is bounded.
_NUM_DERIVED_MAX: Final = 4096


class KeyRing:
    """The tenants' keys. Immutable; thread-safe."""

    def __init__(self, keys: dict[str, bytes], owners: Owners = NO_OWNERS, *, masters: Sequence[bytes] = ()) -> None:
        """owners: resolves tenants' names.  masters: master keys from which tenants' keys are made, the current one
        first.

        Raises:  ConfigError: a key does not have 32 bytes.
        """
        self._masters = tuple(masters)
        self._derived: dict[bytes, tuple[AESGCM, ...]] = {}
        # By the owner in a record: tenant and user if the user has its own key, else the tenant alone.
        self._ciphers: dict[bytes, AESGCM] = {}
        # Whether every key also works for records of version 2: it was given by digest, or its name can be hashed.
        self.is_complete = all(any(row[:1] == b"o" for row in owners.rows(tenant)) for tenant in keys)
        for tenant, key in keys.items():
            if len(key) != KEY_BYTES:
                raise ConfigError(f"the key of tenant {tenant!r} must have {KEY_BYTES} bytes, has {len(key)}")
            for owner in owners.rows(tenant):
                self._ciphers[without_user(owner)] = AESGCM(key)

    @classmethod
    def from_file(cls, path: Path, owners: Owners = NO_OWNERS) -> KeyRing:
        """Raises:  ConfigError: the file cannot be read, does not have the form above, or other users may read it."""
        try:
            if path.stat().st_mode & 0o077:
                raise ConfigError(f"{path} must be readable by its owner only: chmod 600 {path}")
            raw = read_json(path, "keys file")
            return cls({str(tenant): bytes.fromhex(key) for tenant, key in raw.items()}, owners)
        except (OSError, ValueError, AttributeError, TypeError) as err:
            raise ConfigError(f"keys file {path}: {err}") from err

    @classmethod
    def from_master_file(cls, path: Path) -> KeyRing:
        """Read master keys for all tenants, from a file in the form of a secret file. Each tenant's key is made from
        the first line's key and the tenant's digest. The master keys of further lines are used only to decrypt. So the
        master key can be changed while records under the old key expire.

        Raises:  ConfigError: it cannot be read, other users may read it, or a key does not have 32 bytes.
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
        """The ciphers that may decrypt this owner's records; the first one is used for new records."""
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
        """The encrypted bytes to store. `header.nonce` must be fresh.

        Raises:  KeyError: the tenant has no key.
        """
        cipher = self._cipher(header.owner)
        if cipher is None:
            raise KeyError(header.owner)
        return cipher.encrypt(header.nonce, coded, _bound_to(header))

    def decrypt(self, header: RecordHeader, stored: memoryview) -> bytes:
        """The decrypted bytes.  Raises:  BlockCorrupt: the tenant has no key or another key, or
        the record is forged.
        """
        ciphers = self._all(header.owner)
        if not ciphers:
            raise BlockCorrupt(f"no key for tenant {header.tenant.hex()}")
        for cipher in ciphers:
            with contextlib.suppress(InvalidTag):
                return cipher.decrypt(header.nonce, stored, _bound_to(header))
        raise BlockCorrupt("a record cannot be decrypted with its tenant's key")


def _tenant_key(master: bytes, account: bytes) -> bytes:
    return hashlib.blake2b(account, digest_size=KEY_BYTES, key=master, person=b"antefix-disk").digest()


def fresh_nonce() -> bytes:
    """A random nonce. With nonces of 96 bits, a key may write 2^32 records before equal nonces become likely (NIST SP
    800-38D).
    """
    return secrets.token_bytes(NONCE_BYTES)


def _bound_to(header: RecordHeader) -> bytes:
    """The fields of a record's header that compaction does not change, as the associated data of encryption."""
    if header.version == 2:
        return signed_part_of(header) + bytes([header.codec])
    numbers = (header.kind, header.codec, header.payload_bytes, header.position)
    return b"".join((header.hash, header.parent, header.fingerprint, *(n.to_bytes(8, "little") for n in numbers)))
