"""The behaviour that the object tier needs of any bucket, on any server."""

from __future__ import annotations

import asyncio

import pytest

from antefix.objects.bucket import Bucket, ObjectGone

# More objects than one page of a listing has.
NUM_OBJECTS = 1203


async def keeps_what_any_bucket_must(bucket: Bucket, *, num_objects: int = NUM_OBJECTS) -> None:
    """Check an empty bucket, which is empty again and closed afterwards."""
    assert await bucket.list_objects("segments/") == []
    names = [f"segments/{number:05d}" for number in range(num_objects)]
    await asyncio.gather(*(bucket.put(name, [name.encode(), b"!"]) for name in names))
    assert [each.name for each in await bucket.list_objects("segments/")] == names
    assert [each.name for each in await bucket.list_objects("segments/", after=names[4], num_max=3)] == names[5:8]
    assert [each.name for each in await bucket.list_objects("segments/", after="segments/01")] == names[1000:]
    assert bytes(await bucket.read(names[7], 10, 14)) == b"0007"
    assert bytes(await bucket.read(names[7], 500, 600)) == b""
    await bucket.delete([*names, "segments/never"])
    assert await bucket.list_objects("segments/") == []
    with pytest.raises(ObjectGone):
        await bucket.read(names[0], 0, 4)
    await bucket.close()
