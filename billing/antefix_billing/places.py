"""Where copies of the bill are kept: a directory, or an object store by its URL. These functions are for callers
outside an event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from antefix.objects.bucket import Bucket, is_object_url, open_bucket

T = TypeVar("T")


def with_bucket(place: str, act: Callable[[Bucket], Awaitable[T]]) -> T:
    """Call `act` with the bucket at `place`, and return its result.

    Raises:  ConfigError: this is not a valid place.  Unavailable: the object store does not answer, or refuses.
    """
    url = place if is_object_url(place) else Path(place).absolute().as_uri()

    async def run() -> T:
        bucket = open_bucket(url)
        try:
            return await act(bucket)
        finally:
            await bucket.close()

    return asyncio.run(run())
