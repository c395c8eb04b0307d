"""A bucket of S3, GCS, Azure or a server with the same protocol, through the library obstore."""

from __future__ import annotations

import asyncio
import contextlib
import os
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from functools import partial
from ipaddress import ip_address
from typing import Any, Final

from antefix.errors import ConfigError, Unavailable
from antefix.extras import needs
from antefix.objects.bucket import ObjectGone, StoredObject
from antefix.objects.range_source import RangeSource
from antefix.objects.signed_ranges import SIGNED_URL, SignedRanges, reads_directly
from antefix.record import Buffer
from antefix.split_url import split_url

# The library retries after a connection reset or a status of 5xx or 429, with growing pauses. A read that needs more
# retries is a miss, because a request waits for it.
_NUM_RETRIES: Final = 4
_RETRY_S: Final = 8.0
# The time limit of one request with its answer: enough for a segment at 2 MB/s.
_REQUEST_S: Final = 30.0
_CONNECT_S: Final = 3.0
_ENDING_S: Final = 0.05
# The error for a range that starts after an object's end: the object has become shorter since its length was read.
_PAST_THE_END: Final = "416 Range Not Satisfiable"
# The most deletes in one request: S3 accepts 1,000, Azure 256. More deletes in one call would become several requests
# at once, and on a slow server the last of them would time out.
_DELETES_MAX: Final = 1000
_AZURE_DELETES_MAX: Final = 256
_AZURE: Final = "az://"
# S3's signature may include a digest of the object, which takes a third of an upload's processor time. It is skipped
# where nothing can change the bytes on their way. Readers check the checksums and seals of the records in any case.
_UNSIGNED: Final = {"unsigned_payload": True}
# The variables from which the library takes the address of an S3 server.
_ENDPOINTS: Final = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")


def signs_objects(environment: Mapping[str, str]) -> bool:
    """Whether the signature of a PUT to S3 includes the object's digest: over plain HTTP to another host it does, so
    that the server refuses an object that changed on its way. Over TLS, and on this host, nothing can change an object
    on its way.
    """
    endpoints = [split_url(environment[name], name) for name in _ENDPOINTS if environment.get(name)]
    return any(each.scheme == "http" and not _is_here(each.hostname or "") for each in endpoints)


def _is_here(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class CloudBucket:
    """A bucket in the cloud. Credentials, region and endpoint come from the environment variables that the object
    stores' own tools read.
    """

    def __init__(self, url: str) -> None:
        """Raises:  ConfigError: obstore is not installed, or the settings in the environment are invalid."""
        try:
            import obstore
            from obstore import exceptions
            from obstore.store import from_url
        except ImportError as err:
            raise ConfigError(needs(url, "obstore", "s3")) from err
        self.url = url
        self._library: Any = obstore
        self._errors: Any = exceptions
        try:
            self._store: Any = from_url(
                url,
                config=_UNSIGNED if url.startswith("s3://") and not signs_objects(os.environ) else None,
                client_options={
                    "timeout": timedelta(seconds=_REQUEST_S),
                    "connect_timeout": timedelta(seconds=_CONNECT_S),
                    # Allows plain HTTP if the endpoint in the environment uses it; S3's own endpoints use https.
                    "allow_http": True,
                },
                retry_config={"max_retries": _NUM_RETRIES, "retry_timeout": timedelta(seconds=_RETRY_S)},
            )
        except (exceptions.BaseError, ValueError, TypeError) as err:
            raise ConfigError(f"object store {url}: {err}") from err
        self._direct = self._signed_ranges()

    @property
    def num_asked_again(self) -> int:
        return self._direct.num_asked_again if self._direct is not None else 0

    async def put(self, name: str, parts: Sequence[Buffer]) -> None:
        views = [memoryview(part).cast("B") for part in parts if memoryview(part).nbytes] or [memoryview(b"")]
        with self._telling(name):
            # The library takes an iterator's parts as they are. One joined buffer would be another copy of all bytes.
            # Always one request, even for large objects, so that an interrupted upload leaves nothing behind.
            await self._library.put_async(self._store, name, iter(views), use_multipart=False)

    async def read(self, name: str, start: int, stop: int) -> Buffer:
        if stop <= start:
            return b""
        with self._telling(name):
            try:
                data = await self._library.get_range_async(self._store, name, start=start, end=stop)
            except self._errors.BaseError as err:
                if _PAST_THE_END not in str(err):
                    raise
                return b""
        return memoryview(data)

    async def open_range(self, name: str, start: int, stop: int) -> RangeSource | None:
        return await self._direct.open(name, start, stop) if self._direct is not None and start < stop else None

    def _signed_ranges(self) -> SignedRanges | None:
        endpoint = next((os.environ[name] for name in _ENDPOINTS if os.environ.get(name)), "")
        if not self.url.startswith("s3://") or not reads_directly(endpoint, urllib.request.getproxies()):
            return None
        sign = partial(self._library.sign_async, self._store, "GET", expires_in=SIGNED_URL)
        return SignedRanges(sign, (self._errors.BaseError,))

    async def list_objects(self, under: str, *, after: str = "", num_max: int | None = None) -> list[StoredObject]:
        # List in a thread: the library's asynchronous listing may still run when Python exits, and then crashes it.
        return await asyncio.to_thread(self._list_names, under, after, num_max)

    def _list_names(self, under: str, after: str, num_max: int | None) -> list[StoredObject]:
        found: list[StoredObject] = []
        with self._telling(under):
            pages = self._library.list(
                self._store, prefix=under.rstrip("/"), offset=after or None, chunk_size=min(num_max or 1000, 1000)
            )
            for page in pages:
                # Skip the prefix itself, which some servers list.
                found += [StoredObject(each["path"], each["size"]) for each in page if each["path"].startswith(under)]
                if num_max is not None and len(found) >= num_max:
                    break
        found.sort(key=lambda each: each.name)
        return found[:num_max]

    async def delete(self, names: Sequence[str]) -> None:
        num_max = _AZURE_DELETES_MAX if self.url.startswith(_AZURE) else _DELETES_MAX
        for first in range(0, len(names), num_max):
            part = list(names[first : first + num_max])
            try:
                with self._telling(part[0]):
                    await self._library.delete_async(self._store, part)
            except ObjectGone:
                # S3 reports missing objects as deleted. Other stores report an error, and may have stopped at that
                # object.
                for name in part if len(part) > 1 else ():
                    await self.delete([name])

    async def clean(self) -> int:
        return 0

    async def close(self) -> None:
        if self._direct is not None:
            self._direct.close()
        # Let the library's threads finish, because they may crash when Python exits.
        await asyncio.sleep(_ENDING_S)

    @contextlib.contextmanager
    def _telling(self, name: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, self._errors.NotFoundError) as err:
            raise ObjectGone(f"{self.url}: no {name}") from err
        except (self._errors.BaseError, OSError) as err:
            raise Unavailable(f"{self.url}: {name}: {_first_line(err)}") from err


def _first_line(err: Exception) -> str:
    """The first line of an error message from the library. The library's error messages continue with the whole chain
    of causes.
    """
    return str(err).strip().partition("\n")[0][:300]
