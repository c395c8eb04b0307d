"""Operators' tools for an object tier: inspect, fsck with repair, copies in both directions, purge."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from antefix.block import digest_of
from antefix.record import RecordKind
from antefix_console.cli import main
from antefix_kvstore.kvstore_config import KvStoreConfig
from antefix_kvstore.storage_engine import StorageEngine
from tests.kvstore.small_store import BLOCK, FINGERPRINT, Prompt, owner
from tests.objects.small_tier import num_restored, tier_of, upload, url_of

PROMPT = Prompt(list(range(BLOCK * 12)))
OTHER = Prompt(list(range(500, 500 + BLOCK * 6)))
MINE = owner("me")
USER = MINE[:16] + b"user-one"


def restored(url: str, prompt: Prompt) -> int:
    async def read() -> int:
        tier = tier_of(url)
        try:
            return await num_restored(tier, prompt)
        finally:
            await tier.close()

    return asyncio.run(read())


def run_json(capsys: pytest.CaptureFixture[str], *args: str, code: int = 0):
    assert main([*args, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def test_inspect_says_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = url_of(tmp_path)
    said = b'{"family":"gqa","namespace":"x"}'
    named = Prompt(list(range(BLOCK * 4)), fingerprint=digest_of(said))
    asyncio.run(upload(url, [*named.blocks(), named.checkpoint(2)], statements=lambda: {named.fingerprint: said}))
    asyncio.run(upload(url, named.blocks(2)))
    report = run_json(capsys, "inspect", url)
    assert (report["num_records"], report["num_twice"]) == (7, 2)
    blocks, checkpoints = report["holdings"]
    assert (blocks["num_records"], checkpoints["num_records"]) == (6, 1)
    assert blocks["about"]["family"] == "gqa"
    assert main(["inspect", url]) == 0
    assert "uploaded more than once" in capsys.readouterr().out


def test_a_sound_tier_is_sound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asyncio.run(upload(url_of(tmp_path), PROMPT.blocks()))
    report = run_json(capsys, "fsck", url_of(tmp_path))
    assert (report["sound"], report["num_records"]) == (True, 12)


@pytest.mark.parametrize(("at", "num_saved"), [(4096 + 300, 11), (-4, 12), (-40, 12), (100, 12)])
def test_fsck_finds_a_flipped_byte_and_saves_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], at: int, num_saved: int
) -> None:
    asyncio.run(upload(url_of(tmp_path), PROMPT.blocks(), segment_bytes=1 << 20))
    (path,) = (tmp_path / "segments").iterdir()
    flip(path, at)
    # A changed byte of a header's padding has no effect.
    sound = at == 100
    assert run_json(capsys, "fsck", url_of(tmp_path), code=0 if sound else 1)["sound"] is sound
    report = run_json(capsys, "fsck", url_of(tmp_path), "--repair")
    assert report["repaired"] is not sound
    again = run_json(capsys, "fsck", url_of(tmp_path))
    assert (again["sound"], again["num_records"]) == (True, num_saved)
    assert restored(url_of(tmp_path), PROMPT) == (0 if num_saved < 12 else 12)


def test_a_segment_that_nothing_can_be_saved_of_is_deleted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asyncio.run(upload(url_of(tmp_path), PROMPT.blocks(), segment_bytes=1 << 20))
    (path,) = (tmp_path / "segments").iterdir()
    path.write_bytes(bytes(path.stat().st_size))
    assert run_json(capsys, "fsck", url_of(tmp_path), code=1)["problems"] == {"segment header": 1}
    run_json(capsys, "fsck", url_of(tmp_path), "--repair")
    assert list((tmp_path / "segments").iterdir()) == []


def store_of(directory: Path) -> StorageEngine:
    return StorageEngine(KvStoreConfig(dir=str(directory), budget_bytes=8 << 20, scrub_bytes_per_s=0))


def test_a_store_is_backed_up_to_a_bucket_and_restored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = store_of(tmp_path / "a")
    engine.register(FINGERPRINT, BLOCK, {})
    engine.put([*PROMPT.blocks(), PROMPT.checkpoint(5), *OTHER.blocks()])
    engine.close()
    url = url_of(tmp_path / "bucket")
    report = run_json(capsys, "store", "copy", str(tmp_path / "a"), url)
    assert (report["num_copied"], report["num_missing"]) == (19, 0)
    again = run_json(capsys, "store", "copy", str(tmp_path / "a"), url)
    assert (again["num_copied"], again["num_there"]) == (0, 19)
    assert restored(url, PROMPT) == 12
    back = run_json(capsys, "store", "copy", url, str(tmp_path / "b"))
    assert (back["num_copied"], back["num_missing"]) == (19, 0)
    engine = store_of(tmp_path / "b")
    assert (PROMPT.check(engine), OTHER.check(engine)) == (12, 6)
    assert engine.read(RecordKind.CHECKPOINT, PROMPT.hashes[5], fingerprint=FINGERPRINT)
    engine.close()
    there = run_json(capsys, "store", "copy", url, url_of(tmp_path / "second"))
    assert (there["num_copied"], there["num_missing"]) == (19, 0)
    assert restored(url_of(tmp_path / "second"), OTHER) == 6


def test_a_purge_takes_all_of_a_tenant_or_of_one_user(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = url_of(tmp_path)
    asyncio.run(upload(url, [PROMPT.block(number, tenant=MINE) for number in range(6)], segment_bytes=1 << 20))
    asyncio.run(
        upload(
            url,
            [OTHER.block(number, tenant=MINE if number % 2 else USER) for number in range(6)],
            segment_bytes=1 << 20,
        )
    )
    third = Prompt(list(range(300, 300 + BLOCK * 3)))
    asyncio.run(upload(url, third.blocks()))
    assert run_json(capsys, "store", "purge", url, "--tenant", f"digest:{USER.hex()}")["purged"] == {url: 3}
    assert run_json(capsys, "inspect", url)["num_records"] == 6 + 3 + 3
    assert run_json(capsys, "store", "purge", url, "--tenant", f"digest:{MINE.hex()}")["purged"] == {url: 9}
    assert restored(url, third) == 3
    assert run_json(capsys, "inspect", url)["num_records"] == 3
    assert run_json(capsys, "fsck", url)["sound"]
