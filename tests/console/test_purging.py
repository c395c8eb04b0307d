"""One purge command reaches all stores, named or found in Redis, and the object tier."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from pathlib import Path

import pytest

from antefix.discovery import Found
from antefix.errors import ConfigError
from antefix.record import RecordKind
from antefix.secret import Keyring, create_secret_file
from antefix.window_pool import RedisWindowPool
from antefix_console import purging
from antefix_console.cli import main
from antefix_console.purging import purge_all, stores_of
from antefix_kvstore.kvstore_config import KvStoreConfig
from antefix_kvstore.storage_engine import StorageEngine
from tests.kvstore.small_store import BLOCK, FINGERPRINT, Prompt
from tests.objects.small_tier import upload, url_of

PROMPT = Prompt(list(range(BLOCK * 8)))


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    return create_secret_file(tmp_path / "secret")


@pytest.fixture
def owner(secret: Path) -> bytes:
    return Keyring.from_file(secret).owner("acme")


def fill(directory: Path, owner: bytes, num_blocks: int = 8) -> str:
    engine = StorageEngine(KvStoreConfig(dir=str(directory), budget_bytes=8 << 20, scrub_bytes_per_s=0))
    engine.register(FINGERPRINT, BLOCK, {})
    engine.put([PROMPT.block(index, tenant=owner) for index in range(num_blocks)])
    engine.close()
    return str(directory)


def test_one_command_purges_every_tier_in_whatever_order_it_names_them(
    tmp_path: Path, secret: Path, owner: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    url = url_of(tmp_path / "bucket")
    asyncio.run(upload(url, [PROMPT.block(index, tenant=owner) for index in range(5)]))
    stores = [fill(tmp_path / name, owner) for name in "ab"]
    command = ["store", "purge", url, *stores, "--tenant", "acme", "--secret-file", str(secret), "--json"]
    assert main(command) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == {"purged": {stores[0]: 8, stores[1]: 8, url: 5}, "failed": {}}
    # The object tier is purged last, whatever the order of the flags.
    assert list(said["purged"])[-1] == url
    assert main(command) == 0
    assert sum(json.loads(capsys.readouterr().out)["purged"].values()) == 0


def test_the_same_command_purges_the_window_pool_in_redis(
    redis, tmp_path: Path, secret: Path, owner: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    """The purge removes only this tenant's records. A second purge finds none."""
    others = Keyring.from_file(secret).owner("other")

    async def fill_pool() -> None:
        pool = RedisWindowPool(redis.url, bytes_max=1 << 30)
        for index in range(4):
            record = dataclasses.replace(PROMPT.block(index), kind=RecordKind.CHECKPOINT, ttl_s=600.0)
            assert await pool.put(dataclasses.replace(record, tenant=owner if index < 3 else others))
        await pool.close()

    asyncio.run(fill_pool())
    store = fill(tmp_path / "a", owner)
    command = ["store", "purge", redis.url, store, "--tenant", "acme", "--secret-file", str(secret), "--json"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out) == {"purged": {store: 8, redis.url: 3}, "failed": {}}
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["purged"] == {store: 0, redis.url: 0}


def test_a_window_pool_that_does_not_answer_is_named(tmp_path: Path, owner: bytes) -> None:
    away = f"unix://{tmp_path}/nobody.sock"
    store = fill(tmp_path / "a", owner)
    report = asyncio.run(purge_all([store, away], [owner]))
    assert report.purged == {store: 8, away: 0} and "does not answer" in report.failed[away]


def test_what_was_uploaded_while_the_tier_was_purged_is_found_by_the_next_round(
    tmp_path: Path, owner: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = url_of(tmp_path / "bucket")
    late = [[PROMPT.block(index, tenant=owner) for index in range(3)], [PROMPT.block(3, tenant=owner)]]
    purge = purging._purge

    async def overtaken(text, owners, access):
        purged = await purge(text, owners, access)
        if late and text == url:
            await upload(url, late.pop())
        return purged

    monkeypatch.setattr(purging, "_purge", overtaken)
    store = fill(tmp_path / "a", owner)
    assert asyncio.run(purge_all([store, url], [owner])).purged == {store: 8, url: 4}


def test_a_store_that_does_not_answer_holds_up_no_other_and_is_named(
    tmp_path: Path, secret: Path, owner: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    store = fill(tmp_path / "a", owner)
    away = f"unix:{tmp_path}/nobody.sock"
    assert main(["store", "purge", away, store, "--tenant", "acme", "--secret-file", str(secret)]) == 1
    said = capsys.readouterr().out
    assert f"{store}: 8 records dropped" in said and f"{away}: NOT purged" in said


async def test_stores_are_named_as_roles_name_them_and_found_as_they_find_them(
    tmp_path: Path, secret: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Told:
        def __init__(self, *args, **kwargs) -> None:
            self.is_closed = False

        async def find(self):
            return frozenset({Found(name="b", address="host-b:7010"), Found(name="a", address="host-a:7010")})

        async def close(self) -> None:
            self.is_closed = True

    monkeypatch.setattr(purging, "LeaseReader", Told)
    monkeypatch.setattr(purging, "DnsName", Told)
    keyring = Keyring.from_file(secret)
    found = ["host-a:7010", "host-b:7010"]
    url = "s3://kv-cache/prod"
    # A Redis that names stores may also be a window pool. It is purged after the stores and before the object tier.
    redis = "redis://127.0.0.1:6379/0"
    assert await stores_of([url, redis], keyring) == [*found, redis, url]
    assert await stores_of(["dns:stores:7010", "host-a:7010"], None) == found
    assert await stores_of(["c=host-c:7010@/data/c", str(tmp_path), url, url], None) == [
        "host-c:7010",
        str(tmp_path),
        url,
    ]
    with pytest.raises(ConfigError, match="--secret-file"):
        await stores_of(["redis://127.0.0.1:6379/0"], None)
