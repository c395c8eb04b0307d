"""The object tier over a directory: every host finds, reads and verifies what another host uploads."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from antefix.errors import Unavailable
from antefix.objects.bucket import ObjectGone
from antefix.objects.object_tier import ObjectTier
from antefix.objects.segment_object import SegmentRef
from antefix.record import Held, RecordKind
from antefix.secret import Keyring
from antefix.store_files.encryption import KeyRing
from antefix.store_files.seal import Seals
from tests.kvstore.small_store import BLOCK, FINGERPRINT, Prompt, owner
from tests.kvstore.test_compression import PLAN
from tests.objects.small_tier import OWNER, num_restored, tier_of, upload, url_of

pytestmark = pytest.mark.asyncio
PROMPT = Prompt(list(range(BLOCK * 40)))


async def test_a_host_that_has_nothing_finds_and_reads_what_another_one_uploaded(tmp_path: Path) -> None:
    url = url_of(tmp_path)
    await upload(url, [*PROMPT.blocks(), PROMPT.checkpoint(9)])
    tier = tier_of(url)
    assert await tier.held(PROMPT.hashes, fingerprint=FINGERPRINT) == Held(spans=((0, 40),), checkpoints=(10,))
    assert await num_restored(tier, PROMPT) == 40
    payload = await tier.get(RecordKind.CHECKPOINT, PROMPT.hashes[9], fingerprint=FINGERPRINT, tenant=OWNER)
    assert payload == PROMPT.payload(9, RecordKind.CHECKPOINT)
    records = await tier.get_records(RecordKind.BLOCK, PROMPT.hashes[3:6], fingerprint=FINGERPRINT)
    assert [bytes(each.payload) for each in records] == [PROMPT.payload(number) for number in (3, 4, 5)]
    await tier.close()


async def test_neighbours_come_in_one_read(tmp_path: Path) -> None:
    await upload(url_of(tmp_path), PROMPT.blocks(), segment_bytes=1 << 20)
    tier = tier_of(url_of(tmp_path))
    assert await num_restored(tier, PROMPT) == 40
    assert tier.counters.num_ranges == 1
    await tier.close()


async def test_what_was_never_uploaded_ends_the_prefix(tmp_path: Path) -> None:
    await upload(url_of(tmp_path), [PROMPT.block(number) for number in range(40) if number != 17])
    tier = tier_of(url_of(tmp_path))
    assert (await tier.held(PROMPT.hashes, fingerprint=FINGERPRINT)).spans == ((0, 17), (18, 40))
    assert await num_restored(tier, PROMPT) == 17
    await tier.close()


@pytest.mark.parametrize("seals", [None, Seals(Keyring(b"s" * 32))], ids=["checksums", "seals"])
@pytest.mark.parametrize("at", [100, 4096 + 10, 4096 + 300, -40, -4])
async def test_a_flipped_byte_is_never_returned(tmp_path: Path, at: int, seals: Seals | None) -> None:
    records = PROMPT.blocks() if seals is None else [seals.seal(record) for record in PROMPT.blocks()]
    await upload(url_of(tmp_path), records, segment_bytes=1 << 20)
    (path,) = (tmp_path / "segments").iterdir()
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)
    tier = tier_of(url_of(tmp_path), seals=seals)
    # Damage in a record's header or payload loses the first block. Damage in the trailer or footer hides the segment.
    assert await num_restored(tier, PROMPT) == (0 if at != 100 else 40)
    # The bytes count as damaged, not as forged.
    assert seals is None or seals.num_broken == 0
    await tier.close()


async def test_a_segment_that_is_deleted_under_a_reader_is_a_miss_then_forgotten(tmp_path: Path) -> None:
    await upload(url_of(tmp_path), PROMPT.blocks())
    tier = tier_of(url_of(tmp_path))
    assert (await tier.held(PROMPT.hashes, fingerprint=FINGERPRINT)).num_leading == 40
    place = tier.catalog.find(RecordKind.BLOCK, PROMPT.hashes[-1:])[0]
    assert place is not None
    (tmp_path / place.segment.name).unlink()
    num_good = await num_restored(tier, PROMPT)
    assert 0 < num_good < 40
    assert tier.counters.num_gone == 1
    assert (await tier.held(PROMPT.hashes, fingerprint=FINGERPRINT)).num_leading < 40
    await tier.close()


async def test_two_hosts_that_upload_the_same_cost_space_only(tmp_path: Path) -> None:
    await asyncio.gather(upload(url_of(tmp_path), PROMPT.blocks()), upload(url_of(tmp_path), PROMPT.blocks(20)))
    tier = tier_of(url_of(tmp_path))
    assert await num_restored(tier, PROMPT) == 40
    # If the copy that reads choose is deleted, the other copy is read.
    place = tier.catalog.find(RecordKind.BLOCK, PROMPT.hashes[:1])[0]
    assert place is not None
    (tmp_path / place.segment.name).unlink()
    assert await num_restored(tier, PROMPT) > 0
    assert tier.counters.num_gone == 1
    await tier.close()


async def test_a_half_finished_upload_is_invisible_and_is_cleaned_up(tmp_path: Path) -> None:
    await upload(url_of(tmp_path), PROMPT.blocks(10))
    draft = tmp_path / "segments" / ".draft-0011"
    draft.write_bytes(b"AFXSEGMT" + bytes(5000))
    tier = tier_of(url_of(tmp_path))
    assert await num_restored(tier, PROMPT) == 10
    assert tier.catalog.num_unreadable == 0
    assert await tier.bucket.clean() == 0
    os.utime(draft, (0, 0))
    assert await tier.bucket.clean() == 1
    assert not draft.exists()
    await tier.close()


async def test_only_sealed_records_of_the_tenant_are_taken(tmp_path: Path) -> None:
    ours, others = Seals(Keyring(b"s" * 32)), Seals(Keyring(b"t" * 32))
    sealed = [ours.seal(record) for record in PROMPT.blocks(10)] + [others.seal(PROMPT.block(10)), PROMPT.block(11)]
    await upload(url_of(tmp_path), sealed)
    tier = tier_of(url_of(tmp_path), seals=ours)
    assert await num_restored(tier, PROMPT) == 10
    into = PROMPT.buffers(1)
    assert await tier.get_blocks(PROMPT.hashes[:1], into, fingerprint=FINGERPRINT, tenant=owner("you")) == 0
    await tier.close()


async def test_compressed_and_encrypted_with_keys_of_its_own(tmp_path: Path) -> None:
    keys = KeyRing({}, masters=[b"k" * 32])
    prompt = Prompt(list(range(BLOCK * 6)), payload_bytes=PLAN.payload_bytes)
    await upload(url_of(tmp_path), prompt.blocks(), keys=keys, plans=lambda: {(FINGERPRINT, RecordKind.BLOCK): PLAN})
    stored = b"".join(path.read_bytes() for path in (tmp_path / "segments").iterdir())
    assert prompt.payload(0)[:66] not in stored
    tier = tier_of(url_of(tmp_path), decrypt=keys.decrypt)
    assert await num_restored(tier, prompt) == 6
    await tier.close()
    without = tier_of(url_of(tmp_path))
    assert await num_restored(without, prompt) == 0
    await without.close()


async def test_what_comes_later_is_found_at_the_next_refresh(tmp_path: Path) -> None:
    tier = tier_of(url_of(tmp_path), refresh_s=0.0)
    assert (await tier.held(PROMPT.hashes, fingerprint=FINGERPRINT)).num_leading == 0
    await upload(url_of(tmp_path), PROMPT.blocks(10))
    await tier.catalog.refresh()
    assert (await tier.held(PROMPT.hashes, fingerprint=FINGERPRINT)).num_leading == 10
    await tier.close()


async def test_records_past_their_time_are_misses(tmp_path: Path) -> None:
    writer = await upload(url_of(tmp_path), PROMPT.blocks(10), ttl_s={RecordKind.BLOCK: 100.0})
    (ref,) = writer.catalog.segments()[:1]
    now_ms = ref.created_ms
    tier = tier_of(url_of(tmp_path), clock_ms=lambda: now_ms)
    assert await num_restored(tier, PROMPT) == 10
    now_ms += 100_001
    assert await num_restored(tier, PROMPT) == 0
    await tier.close()


class Failing:
    """A bucket whose calls all fail."""

    url = "file:///nowhere"

    async def list_objects(self, *_: object, **__: object) -> list[object]:
        raise Unavailable("this bucket is down")

    async def close(self) -> None: ...


async def test_a_bucket_that_does_not_answer_is_an_error_that_readers_take_for_a_miss() -> None:
    tier = ObjectTier(Failing())  # type: ignore[arg-type]
    with pytest.raises(Unavailable):
        await tier.held(PROMPT.hashes, fingerprint=FINGERPRINT)
    await tier.close()


async def test_names_are_read_as_they_are_written() -> None:
    ref = SegmentRef(created_ms=1, expires_ms=2, kind=RecordKind.BLOCK, tenant=b"t" * 16, id=b"i" * 16, nbytes=9)
    assert SegmentRef.of_name(ref.name, 9) == ref
    for name in (ref.name + "x", ref.name.replace("-b-", "-x-"), "segments/", "index/0-0000000001.idx"):
        assert SegmentRef.of_name(name, 9) is None


async def test_gone_is_told_apart_from_down(tmp_path: Path) -> None:
    tier = tier_of(url_of(tmp_path))
    with pytest.raises(ObjectGone):
        await tier.bucket.read("segments/none", 0, 10)
    await tier.close()
