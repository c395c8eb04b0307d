"""Identifies a store's directory: its STORE file and its lock. A directory that is not a store's is left untouched."""

from __future__ import annotations

import dataclasses
import logging
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Final

from antefix.directory_lock import DirectoryLock
from antefix.errors import BlockCorrupt, ConfigError
from antefix.own_files import put_aside, read_small
from antefix.store_files.gone_blocks import GONE_FILE
from antefix.store_files.read_log import USAGE_LOG_FILE
from antefix.store_files.record_format import (
    FORMAT_VERSION,
    FORMAT_VERSIONS,
    INDEX_DIR,
    LOCK_FILE,
    SEGMENT_DIR,
    SEGMENT_HEADER_BYTES,
    STORE_FILE,
    STORE_HEADER,
    StoreIdentity,
    pack_identity,
    segment_number,
    unpack_identity,
    unpack_segment_header,
)
from antefix_kvstore.disk import Disk
from antefix_kvstore.disk_reserve import RESERVE_FILE

log = logging.getLogger("antefix_kvstore.identity")

# Holds the index's checksum while the store is closed.
CLEAN_FILE: Final = "CLEAN"
REBUILT_DIR: Final = "index.new"
DISCARDED_DIR: Final = "index.old"
_KNOWN_FILES: Final = {
    STORE_FILE,
    LOCK_FILE,
    CLEAN_FILE,
    RESERVE_FILE,
    GONE_FILE,
    USAGE_LOG_FILE,
    INDEX_DIR,
    SEGMENT_DIR,
    REBUILT_DIR,
    DISCARDED_DIR,
}


def no_store(directory: Path, why: str = "") -> ConfigError:
    """The error for a directory that is not a store's. It names the store if the directory has one, as the data
    directory of `antefix up` has.
    """
    inside = directory / "store"
    hint = f"; its store is {inside}" if (inside / STORE_FILE).exists() else ""
    return ConfigError(f"{directory} is not an Antefix store{why and ': '}{why}{hint}")


def prepare_directory(directory: Path) -> None:
    """Raises:  ConfigError: the directory cannot be made or read, or it contains something other than a store."""
    try:
        # KV reveals much of the prompts it was made from, so no other user of the host may read it, whatever the umask.
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        names = {path.name for path in directory.iterdir()} - {"lost+found"}
    except OSError as err:
        raise _unusable(directory, err) from err
    if names and STORE_FILE not in names and SEGMENT_DIR not in names and not names <= _KNOWN_FILES:
        raise ConfigError(
            f"the directory {directory} is not an Antefix store and is not empty; name an empty directory"
        )


def put_aside_misplaced(directory: Path) -> None:
    """Rename directory entries that have the names of a store's files but are of another kind (a directory for a file).
    Needs the lock.

    Raises:  ConfigError: the segment directory is a link to nothing. The disk that it leads to may not be mounted.
    """
    segments = directory / SEGMENT_DIR
    if segments.is_symlink() and not segments.exists():
        raise ConfigError(
            f"{segments} is a link to a path that does not exist: mount that path, or remove the link to start with"
            " an empty store"
        )
    present = set(os.listdir(directory))  # noqa: PTH208 - names, not paths
    for name in present & {STORE_FILE, CLEAN_FILE, RESERVE_FILE, GONE_FILE, USAGE_LOG_FILE}:
        put_aside(directory / name)
    for name in present & {SEGMENT_DIR, INDEX_DIR, REBUILT_DIR, DISCARDED_DIR}:
        put_aside(directory / name, stat.S_ISDIR)
    if INDEX_DIR in present:
        for name in ("data.mdb", "lock.mdb"):
            put_aside(directory / INDEX_DIR / name)


def _unusable(directory: Path, err: OSError) -> ConfigError:
    return ConfigError(f"{directory} cannot be used as a store: {err}; nothing in it was changed")


def lock_directory(directory: Path) -> DirectoryLock:
    """The store's lock, held until it is closed.

    Raises:  ConfigError: another process has the store open, or we may not write there.
    """
    try:
        return DirectoryLock(directory, LOCK_FILE)
    except BlockingIOError as err:
        raise ConfigError(
            f"the store in {directory} is open in another process: stop that process, or name another directory"
        ) from err
    except OSError as err:
        raise _unusable(directory, err) from err


def read_identity(directory: Path, disk: Disk, clock_ms: Callable[[], int]) -> StoreIdentity:
    """Read the STORE file. If it is lost or damaged, the identity is taken from the segments; if there are none, a new
    identity is made.
    """
    path = directory / STORE_FILE
    segment_dir = directory / SEGMENT_DIR
    identity = None
    if path.exists():
        try:
            identity = unpack_identity(read_small(path, STORE_HEADER.size))
        except (BlockCorrupt, FileNotFoundError) as err:
            log.warning("%s", err)
    if identity is None and segment_dir.exists():
        identity = _identity_of_segments(segment_dir)
        if identity is not None:
            disk.replace_file(path, pack_identity(identity))
    if identity is None:
        if path.exists() and segment_dir.exists() and any(segment_dir.iterdir()):
            raise ConfigError(
                f"{directory} is not an Antefix store: neither the STORE file nor any segment can be read"
            )
        identity = StoreIdentity(store_id=secrets.token_bytes(16), created_ms=clock_ms())
        segment_dir.mkdir(mode=0o700, exist_ok=True)
        disk.replace_file(path, pack_identity(identity))
    if identity.version not in FORMAT_VERSIONS:
        raise ConfigError(
            f"{directory} has format version {identity.version}; this build reads"
            f" {' and '.join(map(str, FORMAT_VERSIONS))}"
        )
    segment_dir.mkdir(mode=0o700, exist_ok=True)
    if identity.version != FORMAT_VERSION:
        # From here on, a build that knows the old version only would not find all records.
        identity = dataclasses.replace(identity, version=FORMAT_VERSION)
        disk.replace_file(path, pack_identity(identity))
    return identity


def _identity_of_segments(segment_dir: Path) -> StoreIdentity | None:
    # The newest segment first: its version is the store's.
    for path in sorted(segment_dir.iterdir(), reverse=True):
        if segment_number(path.name) is None:
            continue
        try:
            return unpack_segment_header(read_small(path, SEGMENT_HEADER_BYTES)[:SEGMENT_HEADER_BYTES])[0]
        except (BlockCorrupt, OSError):
            continue  # recovery reports it; any whole header tells the store's identity
    return None
