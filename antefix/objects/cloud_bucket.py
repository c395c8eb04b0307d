"""A bucket of S3, GCS, Azure or a server that speaks as one of them, through the library obstore."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, Final

from antefix.errors import ConfigError, Unavailable
from antefix.objects.bucket import ObjectGone, StoredObject
from antefix.record import Buffer

# The library asks again by itself after a reset or an answer of 5xx or 429, with growing pauses. A read that takes
# longer is a miss: somebody waits for it.
_NUM_RETRIES: Final = 4
_RETRY_S: Final = 8.0
# Of one request with its answer: a segment at 2 MB/s.
_REQUEST_S: Final = 30.0
_CONNECT_S: Final = 3.0
_ENDING_S: Final = 0.05
# An object that is shorter than the range's start: cut, since its length was read.
_PAST_THE_END: Final = "416 Range Not Satisfiable"
# Deletes in one request: S3 takes so many, Azure 256. More of them in a call would be several requests at once, and a
# slow server lets the last of these run out of time.
_DELETES_MAX: Final = 1000
_AZURE_DELETES_MAX: Final = 256
_AZURE: Final = "az://"
# What is put is put together in one buffer that is used again: fresh memory costs more than the copy. Larger ones go.
_SPARE_BYTES_MAX: Final = 64 << 20
_SPARE_STEP_BYTES: Final = 4 << 20
# S3 may be told a digest of what is put, which takes a third of an upload's processor time. Records have checksums and
# seals of their own, which each reader holds against what comes.
_S3_CONFIG: Final = {"unsigned_payload": True}


class CloudBucket:
    """Credentials, region and endpoint come from the variables that the stores' own tools read."""

    def __init__(self, url: str) -> None:
        """Raises:  ConfigError: obstore is not installed, or the environment's settings make no store."""
        try:
            import obstore
            from obstore import exceptions
            from obstore.store import from_url
        except ImportError as err:
            raise ConfigError(f"{url} takes the library obstore: pip install 'antefix[s3]'") from err
        self.url = url
        self._library: Any = obstore
        self._errors: Any = exceptions
        self._spare: bytearray | None = None
        try:
            self._store: Any = from_url(
                url,
                config=_S3_CONFIG if url.startswith("s3://") else None,
                client_options={
                    "timeout": timedelta(seconds=_REQUEST_S),
                    "connect_timeout": timedelta(seconds=_CONNECT_S),
                    # Plain HTTP where the endpoint in the environment says so: S3's own are https.
                    "allow_http": True,
                },
                retry_config={"max_retries": _NUM_RETRIES, "retry_timeout": timedelta(seconds=_RETRY_S)},
            )
        except (exceptions.BaseError, ValueError, TypeError) as err:
            raise ConfigError(f"object store {url}: {err}") from err

    async def put(self, name: str, parts: Sequence[Buffer]) -> None:
        buffer, nbytes = self._joined(parts)
        with self._telling(name):
            # One request, however large: what it leaves when it breaks off is nothing.
            await self._library.put_async(self._store, name, memoryview(buffer)[:nbytes], use_multipart=False)
        # Of a put that failed or was cancelled the library may be sending still: its buffer is nobody's again.
        if len(buffer) <= _SPARE_BYTES_MAX:
            self._spare = buffer

    def _joined(self, parts: Sequence[Buffer]) -> tuple[bytearray, int]:
        """The parts one behind the other, and how long they are; the buffer may be longer."""
        views = [memoryview(part).cast("B") for part in parts]
        nbytes = sum(view.nbytes for view in views)
        buffer, self._spare = self._spare, None
        if buffer is None or len(buffer) < nbytes:
            buffer = bytearray(-(-nbytes // _SPARE_STEP_BYTES) * _SPARE_STEP_BYTES)
        at = 0
        for view in views:
            buffer[at : at + view.nbytes] = view
            at += view.nbytes
        return buffer, nbytes

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

    async def list_objects(self, under: str, *, after: str = "", num_max: int | None = None) -> list[StoredObject]:
        # In a thread: the library's own asynchronous listing may still be at work when Python ends, which aborts it.
        return await asyncio.to_thread(self._list_names, under, after, num_max)

    def _list_names(self, under: str, after: str, num_max: int | None) -> list[StoredObject]:
        found: list[StoredObject] = []
        with self._telling(under):
            pages = self._library.list(
                self._store, prefix=under.rstrip("/"), offset=after or None, chunk_size=min(num_max or 1000, 1000)
            )
            for page in pages:
                # The prefix's own name counts as none below it; some servers list it.
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
                # S3 takes what is not there for deleted. Others say so, and may have stopped there.
                for name in part if len(part) > 1 else ():
                    await self.delete([name])

    async def clean(self) -> int:
        return 0

    async def close(self) -> None:
        # What the library's threads have begun may end, so that it does not meet the end of Python.
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
    """The library's messages continue with the whole chain of causes."""
    return str(err).strip().partition("\n")[0][:300]
