"""Ranges that are read over HTTP straight into their buffers: right bytes or none, whatever the server does."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from antefix.errors import Unavailable
from antefix.objects import http_ranges, object_reads, signed_ranges
from antefix.objects.file_bucket import FileBucket
from antefix.objects.http_ranges import HttpRanges, RangeMissing
from antefix.objects.object_tier import ObjectTier
from antefix.objects.range_source import RangeSource
from antefix.objects.signed_ranges import SignedRanges, reads_directly
from antefix.record import RecordKind
from antefix.secret import Keyring
from antefix.store_files.encryption import KeyRing
from antefix.store_files.seal import Seals
from tests.kvstore.small_store import BLOCK, FINGERPRINT, Prompt
from tests.kvstore.test_compression import PLAN
from tests.objects.range_server import Manners, range_server
from tests.objects.small_tier import OWNER, num_restored, upload, url_of
from tests.waiting import AT_MOST_S, until

pytestmark = pytest.mark.asyncio
# Records of 40 KB, so that a range is longer than what is read ahead with an answer's head.
PROMPT = Prompt(list(range(BLOCK * 12)), payload_bytes=40_001)
NUM_BLOCKS = len(PROMPT.hashes)
SEALS = Seals(Keyring(b"s" * 32))


class ServedBucket(FileBucket):
    """A directory whose ranges come from a server; all else is read from the directory."""

    def __init__(self, directory: Path, endpoint: str) -> None:
        super().__init__(url_of(directory), directory)
        self.num_library_reads = 0
        self.clock_s = 0.0

        async def sign(name: str) -> str:
            return f"{endpoint}/{name}?signature=x"

        self.ranges = SignedRanges(sign, clock_s=lambda: self.clock_s)

    @property
    def num_asked_again(self) -> int:
        return self.ranges.num_asked_again

    async def open_range(self, name: str, start: int, stop: int) -> RangeSource | None:  # type: ignore[override]
        return await self.ranges.open(name, start, stop)

    async def read(self, name: str, start: int, stop: int) -> bytes:
        self.num_library_reads += name.startswith("segments/") and start > 0
        return await super().read(name, start, stop)  # type: ignore[return-value]

    async def close(self) -> None:
        self.ranges.close()
        await super().close()


async def _signed(endpoint: str, name: str) -> str:
    return f"{endpoint}/{name}?signature=x"


@pytest.fixture
def manners(tmp_path: Path) -> Manners:
    return Manners(tmp_path)


@pytest.fixture
def endpoint(manners: Manners) -> Iterator[str]:
    with range_server(manners) as url:
        yield url


async def served_tier(tmp_path: Path, endpoint: str, **settings: object) -> tuple[ObjectTier, ServedBucket]:
    """A tier that knows the prompt's records, before any is read."""
    bucket = ServedBucket(tmp_path, endpoint)
    tier = ObjectTier(bucket, **settings)  # type: ignore[arg-type]
    assert (await tier.held(PROMPT.hashes, fingerprint=FINGERPRINT)).num_leading == NUM_BLOCKS
    bucket.num_library_reads = 0
    return tier, bucket


@pytest.mark.parametrize("seals", [None, SEALS], ids=["checksums", "seals"])
async def test_records_come_without_the_library_over_few_connections(tmp_path, manners, endpoint, seals) -> None:
    records = PROMPT.blocks() if seals is None else [seals.seal(each) for each in PROMPT.blocks()]
    await upload(url_of(tmp_path), [*records, PROMPT.checkpoint(3)], segment_bytes=100_000)
    tier, bucket = await served_tier(tmp_path, endpoint, seals=seals)
    for _ in range(3):
        assert await num_restored(tier, PROMPT) == NUM_BLOCKS
    assert tier.counters.num_direct_ranges == tier.counters.num_ranges == manners.num_requests >= 18
    assert tier.counters.bytes_read > 3 * NUM_BLOCKS * 40_001
    # A connection carries one answer after another.
    assert manners.num_connections <= manners.num_requests // 3
    # A gap between records is read and skipped.
    some = [0, 1, 3, 5]
    found = await asyncio.gather(
        *(tier.get(RecordKind.BLOCK, PROMPT.hashes[n], fingerprint=FINGERPRINT, tenant=OWNER) for n in some)
    )
    assert found == [PROMPT.payload(number) for number in some]
    assert bucket.num_library_reads == 0
    await tier.close()


async def test_compressed_and_encrypted_records(tmp_path, manners, endpoint) -> None:
    keys = KeyRing({}, masters=[b"k" * 32])
    prompt = Prompt(list(range(BLOCK * 6)), payload_bytes=PLAN.payload_bytes)
    await upload(url_of(tmp_path), prompt.blocks(), keys=keys, plans=lambda: {(FINGERPRINT, RecordKind.BLOCK): PLAN})
    tier = ObjectTier(ServedBucket(tmp_path, endpoint), decrypt=keys.decrypt)
    assert await num_restored(tier, prompt) == 6
    assert tier.counters.num_direct_ranges == manners.num_requests > 0
    await tier.close()


@pytest.mark.parametrize("harm", ["503", "no ranges", "truncate", "flip", "close", "close silently"])
async def test_under_each_harm_all_bytes_are_right(tmp_path, manners, endpoint, harm) -> None:
    await upload(url_of(tmp_path), [SEALS.seal(each) for each in PROMPT.blocks()], segment_bytes=1 << 20)
    tier, bucket = await served_tier(tmp_path, endpoint, seals=SEALS)
    assert await num_restored(tier, PROMPT) == NUM_BLOCKS
    assert bucket.num_library_reads == 0
    manners.harm = harm
    num_good = await num_restored(tier, PROMPT)
    if harm == "flip":
        # Both tries have a wrong bit, each in another place.
        assert num_good < NUM_BLOCKS
        assert tier.counters.num_bad == 1
    else:
        assert num_good == NUM_BLOCKS
    assert tier.counters.num_broken_ranges == (harm == "truncate")
    assert bucket.num_library_reads == (harm in ("503", "no ranges", "truncate"))
    manners.harm = ""
    bucket.clock_s += 2
    assert await num_restored(tier, PROMPT) == NUM_BLOCKS
    await tier.close()


async def test_after_failures_direct_reads_rest_twice_as_long_each_time(tmp_path, manners, endpoint) -> None:
    await upload(url_of(tmp_path), PROMPT.blocks(), segment_bytes=1 << 20)
    tier, bucket = await served_tier(tmp_path, endpoint)
    manners.harm = "503"
    asked = []
    for second in range(8):
        bucket.clock_s = 0.5 + second
        assert await num_restored(tier, PROMPT) == NUM_BLOCKS
        asked.append(manners.num_requests)
    # Asked at 0.5 s, then 1 s later, then 2 s, then 4 s.
    assert asked == [1, 2, 2, 3, 3, 3, 3, 4]
    await tier.close()


async def test_reads_that_fail_together_cost_one_rest(tmp_path, manners, endpoint) -> None:
    bucket = ServedBucket(tmp_path, endpoint)
    (tmp_path / "object").write_bytes(bytes(1000))
    manners.harm = "503"
    assert await asyncio.gather(*(bucket.open_range("object", 0, 10) for _ in range(8))) == [None] * 8
    manners.harm = ""
    assert await bucket.open_range("object", 0, 10) is None
    bucket.clock_s += 1.1
    source = await bucket.open_range("object", 0, 10)
    assert source is not None and source.take(10) == bytes(10)
    source.close()
    await bucket.close()


async def test_a_request_that_waits_longer_than_others_is_sent_again(tmp_path, manners, endpoint, monkeypatch) -> None:
    monkeypatch.setattr(signed_ranges, "_LATE_S", 0.1)
    await upload(url_of(tmp_path), PROMPT.blocks(), segment_bytes=100_000)
    tier, bucket = await served_tier(tmp_path, endpoint)
    assert await num_restored(tier, PROMPT) == NUM_BLOCKS
    num_ranges, num_requests = tier.counters.num_ranges, manners.num_requests
    manners.harm, manners.once = "silence", True
    assert await num_restored(tier, PROMPT) == NUM_BLOCKS
    assert manners.hanging.is_set()
    # One on an idle machine. On a busy one, others may be late too.
    assert tier.counters.num_asked_again == manners.num_requests - num_requests - num_ranges >= 1
    # The second request was answered: nothing failed, so the library reads nothing, and direct reads do not rest.
    assert tier.counters.num_direct_ranges == tier.counters.num_ranges == 2 * num_ranges
    assert bucket.num_library_reads == 0
    await tier.close()


async def test_a_request_that_was_sent_again_may_fail(tmp_path, manners, endpoint, monkeypatch) -> None:
    monkeypatch.setattr(signed_ranges, "_LATE_S", 0.1)
    (tmp_path / "object").write_bytes(bytes(1000))
    ranges = SignedRanges(partial(_signed, endpoint))
    manners.harm, manners.once = "slow", True
    opening = asyncio.create_task(ranges.open("object", 0, 10))
    await asyncio.to_thread(manners.hanging.wait, AT_MOST_S)
    manners.harm = "503"
    await until(lambda: manners.num_requests == 2)
    manners.released.set()
    source = await opening
    assert source is not None and source.take(10) == bytes(10)
    source.close()
    ranges.close()


async def test_a_range_whose_bytes_stop_is_read_by_the_library_soon(tmp_path, manners, endpoint, monkeypatch) -> None:
    monkeypatch.setattr(object_reads, "_LATE_S", 0.1)
    await upload(url_of(tmp_path), PROMPT.blocks(), segment_bytes=100_000)
    tier, bucket = await served_tier(tmp_path, endpoint)
    assert await num_restored(tier, PROMPT) == NUM_BLOCKS
    manners.harm, manners.once = "hang", True
    async with asyncio.timeout(object_reads._DIRECT_S / 2):
        assert await num_restored(tier, PROMPT) == NUM_BLOCKS
    assert tier.counters.num_broken_ranges == bucket.num_library_reads >= 1
    await tier.close()


async def test_connections_that_are_given_back_together_are_kept_or_closed(tmp_path, endpoint, monkeypatch) -> None:
    (tmp_path / "object").write_bytes(bytes(100))
    ranges = HttpRanges(1)
    opened = [await ranges.open(f"{endpoint}/object", 0, 100) for _ in range(2)]
    for each in opened:
        each.take(100)
    # Each thread stops where it reads the clock, until the other one is there.
    both = threading.Barrier(2, timeout=AT_MOST_S)
    monkeypatch.setattr(http_ranges, "time", SimpleNamespace(monotonic=both.wait))
    await asyncio.gather(*(asyncio.to_thread(each.close) for each in opened))
    assert set(ranges._idle) == ranges._links and len(ranges._links) == 1
    ranges.close()


async def test_what_was_skipped_last_keeps_no_connection_from_its_next_read(tmp_path, manners, endpoint) -> None:
    (tmp_path / "object").write_bytes(bytes(range(256)) * 1000)
    ranges = HttpRanges(2)
    for _ in range(3):
        source = await ranges.open(f"{endpoint}/object", 0, 200_000)
        source.fill(memoryview(bytearray(199_995)))
        source.skip(5)
        source.finish()
        source.close()
    assert manners.num_connections == 1
    # A source that was not read to its end is no longer used.
    (await ranges.open(f"{endpoint}/object", 0, 200_000)).close()
    (await ranges.open(f"{endpoint}/object", 0, 200_000)).close()
    assert manners.num_connections == 2
    ranges.close()


async def test_a_cancelled_read_ends_at_once_and_writes_nothing_more(tmp_path, manners, endpoint) -> None:
    await upload(url_of(tmp_path), PROMPT.blocks(), segment_bytes=1 << 20)
    tier, _ = await served_tier(tmp_path, endpoint)
    manners.harm = "hang"
    into = PROMPT.buffers()
    reading = asyncio.create_task(tier.get_blocks(PROMPT.hashes, into, fingerprint=FINGERPRINT, tenant=OWNER))
    await asyncio.to_thread(manners.hanging.wait, AT_MOST_S)
    reading.cancel()
    async with asyncio.timeout(AT_MOST_S):
        with pytest.raises(asyncio.CancelledError):
            await reading
    before = [bytes(each) for each in into]
    manners.released.set()
    manners.harm = ""
    assert await num_restored(tier, PROMPT) == NUM_BLOCKS
    assert [bytes(each) for each in into] == before
    await tier.close()


async def test_an_answer_is_refused_before_its_body_is_used(tmp_path, manners, endpoint) -> None:
    (tmp_path / "object").write_bytes(bytes(range(256)) * 1000)
    ranges = HttpRanges(2)
    with pytest.raises(RangeMissing):
        await ranges.open(f"{endpoint}/none?secret", 0, 10)
    # The object ends before the range does; and TLS is left to the library.
    for url, stop in (
        (f"{endpoint}/object?secret", 300_000),
        (f"{endpoint}/object?secret".replace("http", "https"), 9),
    ):
        with pytest.raises(Unavailable) as caught:
            await ranges.open(url, 0, stop)
        assert "secret" not in str(caught.value)
    source = await ranges.open(f"{endpoint}/object", 3, 200_003)
    source.skip(253)
    assert bytes(source.take(3)) == bytes([0, 1, 2])
    rest = bytearray(200_000 - 256)
    source.fill(memoryview(rest))
    assert rest == (bytes(range(256)) * 1000)[259:200_003]
    source.close()
    ranges.close()


@pytest.mark.parametrize(
    ("endpoint_url", "proxies", "directly"),
    [
        ("http://10.0.0.7:9000", {}, True),
        ("HTTP://minio.rack", {"https": "http://proxy"}, True),
        ("http://10.0.0.7:9000", {"http": "http://proxy"}, False),
        ("http://10.0.0.7:9000", {"all": "socks5://proxy"}, False),
        ("https://s3.example", {}, False),
        ("", {}, False),
    ],
)
async def test_only_plain_http_without_a_proxy_is_read_directly(endpoint_url, proxies, directly) -> None:
    assert reads_directly(endpoint_url, proxies) is directly
