"""A bucket in a directory, which hosts may share. Objects are written to temporary files and then renamed."""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, TypeVar

from antefix.errors import Unavailable
from antefix.objects.bucket import ObjectGone, StoredObject
from antefix.record import Buffer

T = TypeVar("T")
_DRAFT: Final = ".draft-"
# Longer than any upload takes. An older temporary file is a leftover.
_DRAFT_LIFE_S: Final = 3600.0

_NUM_THREADS: Final = 8


class FileBucket:
    """A bucket in a directory. Blocking calls run in threads."""

    def __init__(self, url: str, directory: Path) -> None:
        self.url = url
        self.directory: Final = directory
        # A separate thread pool, so that a hanging mount of the directory blocks nothing else.
        self._threads: Final = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="antefix-bucket")

    @property
    def num_asked_again(self) -> int:
        return 0

    async def put(self, name: str, parts: Sequence[Buffer]) -> None:
        await self._in_thread(lambda: self._put(name, parts))

    def _put(self, name: str, parts: Sequence[Buffer]) -> None:
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f"{_DRAFT}{secrets.token_hex(8)}")
        try:
            with draft.open("xb") as file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            draft.rename(path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
        _sync_directory(path.parent)

    async def read(self, name: str, start: int, stop: int) -> Buffer:
        return await self._in_thread(lambda: self._read(name, start, stop))

    def _read(self, name: str, start: int, stop: int) -> bytes:
        try:
            with (self.directory / name).open("rb") as file:
                return os.pread(file.fileno(), max(0, stop - start), start)
        except FileNotFoundError as err:
            raise ObjectGone(f"{self.url}: no {name}") from err

    async def open_range(self, name: str, start: int, stop: int) -> None:
        return None

    async def list_objects(self, under: str, *, after: str = "", num_max: int | None = None) -> list[StoredObject]:
        return await self._in_thread(lambda: self._list_names(under, after, num_max))

    def _list_names(self, under: str, after: str, num_max: int | None) -> list[StoredObject]:
        try:
            with os.scandir(self.directory / under) as entries:
                names = sorted(entry.name for entry in entries if not entry.name.startswith(_DRAFT))
        except FileNotFoundError:
            return []
        found: list[StoredObject] = []
        for name in names:
            if under + name <= after:
                continue
            if num_max is not None and len(found) >= num_max:
                break
            try:
                found.append(StoredObject(under + name, (self.directory / under / name).stat().st_size))
            except FileNotFoundError:
                continue  # deleted since its name was read
        return found

    async def delete(self, names: Sequence[str]) -> None:
        def delete() -> None:
            for name in names:
                (self.directory / name).unlink(missing_ok=True)

        await self._in_thread(delete)

    async def clean(self) -> int:
        return await self._in_thread(self._clean)

    def _clean(self) -> int:
        num_gone = 0
        for draft in self._drafts():
            if time.time() - draft.stat().st_mtime > _DRAFT_LIFE_S:
                draft.unlink(missing_ok=True)
                num_gone += 1
        return num_gone

    def _drafts(self) -> Iterator[Path]:
        return self.directory.glob(f"*/{_DRAFT}*")

    async def close(self) -> None:
        """Stop the threads, without waiting for a thread that hangs."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _in_thread(self, call: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, call)
        except OSError as err:
            raise Unavailable(f"{self.url}: {err}") from err


def _sync_directory(path: Path) -> None:
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
