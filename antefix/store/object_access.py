"""Opens the object store as a tier to read from, by the settings of a process that reads stores."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from antefix.config import require
from antefix.objects.bucket import open_bucket, scheme_of
from antefix.objects.object_tier import ObjectTier
from antefix.secret import Keyring
from antefix.store.tier import Tier
from antefix.store_files.encryption import KeyRing
from antefix.store_files.owners import NO_OWNERS, Owners
from antefix.store_files.seal import Seals
from antefix.tier_kind import TierKind


class ReadsObjects(Protocol):
    """Settings that name an object store.  object_encrypt_key_file, object_keys_file: files with
    its encryption keys.
    """

    @property
    def object_store(self) -> str: ...
    @property
    def object_encrypt_key_file(self) -> str: ...
    @property
    def object_keys_file(self) -> str: ...


def check_object_store(url: str, encrypt_key_file: str = "", keys_file: str = "") -> None:
    """Raises:  ConfigError: the URL is not an object store's, or both key files are given."""
    if url:
        scheme_of(url)
    require(
        not (encrypt_key_file and keys_file), "--object-encrypt-key-file and --object-keys-file: give one of the two"
    )


def object_keys(encrypt_key_file: str, keys_file: str, owners: Owners = NO_OWNERS) -> KeyRing | None:
    """The encryption keys of the object store; None if it is not encrypted. Raises: ConfigError: one of the key files
    cannot be used.
    """
    if encrypt_key_file:
        return KeyRing.from_master_file(Path(encrypt_key_file))
    return KeyRing.from_file(Path(keys_file), owners) if keys_file else None


def object_tiers(
    config: ReadsObjects, *, seals: Seals | None = None, keyring: Keyring | None = None
) -> tuple[Tier, ...]:
    """The object tier that these settings name; an empty tuple if they name none.

    seals: if given, only sealed records are accepted.  keyring: resolves the tenant names of `object_keys_file`.
    Raises:  ConfigError: the URL, or a key file, cannot be used.
    """
    if not config.object_store:
        return ()
    keys = object_keys(config.object_encrypt_key_file, config.object_keys_file, Owners(keyring))
    source = ObjectTier(open_bucket(config.object_store), seals=seals, decrypt=keys.decrypt if keys else None)
    return (Tier(scheme_of(config.object_store), TierKind.OBJECT, source),)
