"""Buckets, which hold objects: an object store by its URL, or a shared directory. This module knows names and bytes of
objects, but no format.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol
from urllib.parse import unquote

from antefix.errors import AntefixError, ConfigError
from antefix.objects.range_source import RangeSource
from antefix.record import Buffer
from antefix.split_url import split_url

CLOUD_SCHEMES: Final = ("s3", "gs", "az")
SCHEMES: Final = (*CLOUD_SCHEMES, "file")


class ObjectGone(AntefixError):
    """The object does not exist, or was deleted. A caller treats a missing object as a cache miss."""


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object in a listing.  name: relative to the bucket's prefix."""

    name: str
    nbytes: int


class Bucket(Protocol):
    """A bucket. Names are relative to the URL's prefix. Each call may raise Unavailable, also if the object store
    denies permission.
    """

    @property
    def url(self) -> str:
        """The URL as it was given, to show to people."""

    @property
    def num_asked_again(self) -> int:
        """How many requests of `open_range` were sent a second time, because no answer began."""

    async def put(self, name: str, parts: Sequence[Buffer]) -> None:
        """Write an object with these bytes, atomically. The new object replaces an object of the same name."""

    async def read(self, name: str, start: int, stop: int) -> Buffer:
        """Bytes [start, stop) of an object; fewer bytes if the object ends before `stop`.  Raises:  ObjectGone."""

    async def open_range(self, name: str, start: int, stop: int) -> RangeSource | None:
        """The same bytes of the object, read while they arrive. None: this bucket cannot give the bytes while they
        arrive, or not now; `read` must then be called.
        """

    async def list_objects(self, under: str, *, after: str = "", num_max: int | None = None) -> list[StoredObject]:
        """Objects below a folder such as `segments/`, by name.

        after: only objects whose names come later in order; a name with its folder. num_max: at most this many objects,
        the first by name.
        """

    async def delete(self, names: Sequence[str]) -> None:
        """Delete objects. Deleting a name that does not exist is no error."""

    async def clean(self) -> int:
        """Delete the leftovers of unfinished uploads. Returns how many there were."""

    async def close(self) -> None: ...


def is_object_url(text: str) -> bool:
    """Whether this is the URL of an object store, not a directory or an address."""
    return text.partition("://")[0] in SCHEMES and "://" in text


def scheme_of(url: str) -> str:
    """Raises:  ConfigError: not the URL of an object store."""
    parts = split_url(url)
    if parts.scheme not in SCHEMES:
        raise ConfigError(f"an object store is given as s3://BUCKET/PREFIX, gs://, az:// or file:///PATH, not {url!r}")
    if parts.query or parts.fragment or parts.username:
        raise ConfigError(
            f"{url!r}: an object store's URL has only bucket and prefix; give credentials as environment variables"
        )
    if parts.scheme == "file" and (parts.netloc or not parts.path.startswith("/")):
        raise ConfigError(f"{url!r}: a directory is given as file:///PATH, with three slashes")
    if parts.scheme != "file" and not parts.netloc:
        raise ConfigError(f"{url!r} names no bucket")
    return parts.scheme


def open_bucket(url: str) -> Bucket:
    """Connects when first used. Raises: ConfigError: the text is not the URL of an object store, or the library for it
    is not installed.
    """
    if scheme_of(url) == "file":
        from antefix.objects.file_bucket import FileBucket

        return FileBucket(url, Path(unquote(split_url(url).path)))
    # Imported here, because the library is only installed where an object store is used.
    from antefix.objects.cloud_bucket import CloudBucket

    return CloudBucket(url)
