"""The code that all engines share: layouts as names, records of any shape in a real store, errors as misses."""

import dataclasses
import random

import pytest

from antefix import BlockingStore
from antefix.block import Family, Fingerprint, HashKind
from antefix.errors import ConfigError, InvalidRequest
from antefix.secret import Keyring
from antefix_engines.engine_layout import EngineLayout, Part, plain_rows, views_of
from antefix_engines.engine_store import EngineStore, StoreSettings
from antefix_engines.metrics import engine_metrics
from antefix_engines.verify import findings_of

BLOCK = 16
KEYS = Part(layer=0, group="keys", num_rows=BLOCK, record=plain_rows(32, 2), dtype="bfloat16")
WINDOW = Part(layer=1, group="window", num_rows=7, record=plain_rows(64, 4), dtype="float32")
LAYOUT = EngineLayout(
    engine="test", family=Family.GQA, block_size=BLOCK, block=(KEYS,), checkpoint=(WINDOW,), num_checkpoints=1
)


GOLDEN_KEY = "b85bb723d054db1047441b630c278c7bb5e5476d4f01ea22d6a34aeaf170fc5a"
GOLDEN_LAYOUT = "148ab9f2b895a69392f15d26fc233d58"


def fingerprint(layout=LAYOUT, **other):
    fields = {"weights_revision": "w", "kv_format": "bfloat16", "tokenizer": "", "family": layout.family} | other
    return Fingerprint(geometry=layout, **fields)


@pytest.fixture
def store(tmp_path):
    with EngineStore.open(StoreSettings(directory=str(tmp_path / "data"), budget_bytes="8M")) as opened:
        yield opened


def records_of(kv, tokens):
    chain = kv.chain(tokens)
    made = []
    for index, name in enumerate(chain.hashes):
        end = (index + 1) * BLOCK
        made.append(kv.block(name, chain.parent(index), end, bytes([index]) * LAYOUT.block_bytes))
        made.append(kv.checkpoint(name, chain.parent(index), end, bytes([index]) * LAYOUT.checkpoint_bytes))
    return chain, made


def test_what_was_put_comes_back(store):
    kv = store.kv(fingerprint(), LAYOUT)
    chain, records = records_of(kv, range(3 * BLOCK))
    assert kv.put(records) == 6
    found = kv.lookup(chain.hashes)
    assert (found.num_blocks, found.checkpoints) == (3, (1, 2, 3))
    rows = [memoryview(bytearray(LAYOUT.block_bytes)) for _ in range(3)]
    assert kv.get_blocks(chain.hashes, rows) == 3 and [row[0] for row in rows] == [0, 1, 2]
    assert kv.get_checkpoint(chain.hashes[1]) == bytes([1]) * LAYOUT.checkpoint_bytes


def test_a_layout_without_parts_has_blocks_of_one_byte(store):
    layout = EngineLayout(
        engine="test", family=Family.GQA, block_size=BLOCK, block=(), checkpoint=(WINDOW,), num_checkpoints=1
    )
    kv = store.kv(fingerprint(layout), layout)
    name = kv.chain(range(BLOCK)).hashes[0]
    assert kv.put([kv.block(name, kv.root, BLOCK, bytes(1))]) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"engine": "other"},
        {"block": (dataclasses.replace(KEYS, dtype="float16"),)},
        {"block": (dataclasses.replace(KEYS, group="values"),)},
        {"block": (KEYS, dataclasses.replace(KEYS, layer=2))},
        {"checkpoint": (dataclasses.replace(WINDOW, num_rows=8),)},
        {"num_checkpoints": 2},
    ],
    ids=str,
)
def test_another_layout_is_another_name(store, change):
    kv = store.kv(fingerprint(), LAYOUT)
    chain, records = records_of(kv, range(BLOCK))
    kv.put(records)
    other = dataclasses.replace(LAYOUT, **change)
    assert store.kv(fingerprint(other), other).lookup(chain.hashes).num_blocks == 0
    assert store.kv(fingerprint(other), other).chain(range(BLOCK)).hashes != chain.hashes


def test_names_by_an_engines_own_keys(store):
    kv = store.kv(fingerprint(hash_kind=HashKind.ENGINE_KEY), LAYOUT)
    name = kv.hash_of(b"sha256 of some engine")
    assert name != kv.hash_of(b"sha256 of some enginf") and len(name) == 32
    other = store.kv(fingerprint(hash_kind=HashKind.ENGINE_KEY, weights_revision="v"), LAYOUT)
    assert other.hash_of(b"sha256 of some engine") != name


def test_the_names_of_engines_keys_stay_what_they_are():
    """A golden value. A change of it makes every stored block of every engine a miss."""
    keyring = Keyring(b"sixteen bytes or more")
    with EngineStore(BlockingStore(Dead()), keyring) as store:
        kv = store.kv(fingerprint(hash_kind=HashKind.ENGINE_KEY), LAYOUT)
        assert kv.hash_of(b"key").hex() == GOLDEN_KEY
        assert LAYOUT.digest().hex() == GOLDEN_LAYOUT


class Dead:
    """A store that cannot be reached."""

    def __getattr__(self, name):
        async def call(*_, **__):
            from antefix.errors import Unavailable

            raise Unavailable("nobody there")

        return call

    async def close(self):
        pass


def test_a_dead_store_is_a_miss_and_is_counted():
    with EngineStore(BlockingStore(Dead()), Keyring(b"sixteen bytes or more")) as store:
        kv = store.kv(fingerprint(), LAYOUT)
        chain, records = records_of(kv, range(BLOCK))
        assert kv.lookup(chain.hashes).num_blocks == 0
        assert kv.get_blocks(chain.hashes, [memoryview(bytearray(LAYOUT.block_bytes))]) == 0
        assert kv.get_checkpoint(chain.hashes[0]) is None
        assert kv.put(records) == 0
        assert store.counters.by_kind == {"Unavailable": 5} and store.counters.errors == 5
        shown = {
            sample.name: sample.value for each in engine_metrics("test", store.counters) for sample in each.samples
        }
        assert shown["antefix_engine_store_errors_total"] == 5


def test_a_damaged_block_is_a_short_read(tmp_path):
    settings = StoreSettings(directory=str(tmp_path / "data"), budget_bytes="8M")
    with EngineStore.open(settings) as store:
        kv = store.kv(fingerprint(), LAYOUT)
        noise = [random.Random(i).randbytes(LAYOUT.block_bytes) for i in range(3)]
        chain = kv.chain(range(3 * BLOCK))
        kv.put([kv.block(chain.hashes[i], chain.parent(i), (i + 1) * BLOCK, noise[i]) for i in range(3)])
    (segment,) = (tmp_path / "data" / "store" / "segments").glob("*.seg")
    content = bytearray(segment.read_bytes())
    at = content.index(noise[1])
    content[at] ^= 1
    segment.write_bytes(bytes(content))
    with EngineStore.open(settings) as store:
        kv = store.kv(fingerprint(), LAYOUT)
        rows = [memoryview(bytearray(LAYOUT.block_bytes)) for _ in range(3)]
        assert kv.get_blocks(chain.hashes, rows) == 1 and store.counters.damaged_records == 1


def test_views_are_the_payload_itself():
    payload = bytearray(LAYOUT.block_bytes + LAYOUT.checkpoint_bytes)
    for part, view in views_of(memoryview(payload), (KEYS, WINDOW)):
        view[:] = bytes([part.layer + 1]) * part.nbytes
    assert bytes(payload) == bytes([1]) * KEYS.nbytes + bytes([2]) * WINDOW.nbytes


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "directory"),
        ({"address": "127.0.0.1:1"}, "secret_file"),
        ({"directory": "d", "root_dir": "d"}, "unknown settings of the store: root_dir"),
        ({"directory": "d", "budget_bytes": "much"}, "much"),
    ],
)
def test_settings_that_make_no_sense_are_named(values, said):
    with pytest.raises(ConfigError, match=said):
        StoreSettings.from_mapping(values)


def test_a_layout_that_contradicts_itself_is_refused():
    with pytest.raises(InvalidRequest):
        dataclasses.replace(LAYOUT, num_checkpoints=0)


def test_an_engine_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match="transformers, vllm"):
        findings_of("tensorrt")
