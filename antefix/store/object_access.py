"""Opening the object tier as a tier to read from, by the settings of a reader of stores."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from antefix.config import require
from antefix.objects.bucket import open_bucket, scheme_of
from antefix.objects.object_tier import ObjectTier
from antefix.secret import Keyring
from antefix.store.tier import Tier, TierKind
from antefix.store_files.encryption import KeyRing
from antefix.store_files.owners import NO_OWNERS, Owners
from antefix.store_files.seal import Seals


class ReadsObjects(Protocol):
    """Settings that name an object store. object_encrypt_key_file, object_keys_file: what it is encrypted with."""

    @property
    def object_store(self) -> str: ...
    @property
    def object_encrypt_key_file(self) -> str: ...
    @property
    def object_keys_file(self) -> str: ...


def check_object_store(url: str, encrypt_key_file: str = "", keys_file: str = "") -> None:
    """Raises:  ConfigError: not the URL of an object store, or two kinds of keys."""
    if url:
        scheme_of(url)
    require(
        not (encrypt_key_file and keys_file), "--object-encrypt-key-file and --object-keys-file: give one of the two"
    )


def object_keys(encrypt_key_file: str, keys_file: str, owners: Owners = NO_OWNERS) -> KeyRing | None:
    """What the tier is encrypted with; None: with nothing.  Raises:  ConfigError: a file cannot be used."""
    if encrypt_key_file:
        return KeyRing.from_master_file(Path(encrypt_key_file))
    return KeyRing.from_file(Path(keys_file), owners) if keys_file else None


def object_tiers(
    config: ReadsObjects, *, seals: Seals | None = None, keyring: Keyring | None = None
) -> tuple[Tier, ...]:
    """The object tier of these settings, or none.

    seals: with them only sealed records are taken.  keyring: knows tenants of `object_keys_file` by name.
    Raises:  ConfigError: the URL, or a key file, cannot be used.
    """
    if not config.object_store:
        return ()
    keys = object_keys(config.object_encrypt_key_file, config.object_keys_file, Owners(keyring))
    source = ObjectTier(open_bucket(config.object_store), seals=seals, decrypt=keys.decrypt if keys else None)
    return (Tier(scheme_of(config.object_store), TierKind.OBJECT, source),)
