"""AntefixHiCache keeps SGLang's contract. Runs over a stand-in; `make test-engines` runs it over SGLang itself."""

import dataclasses
import inspect
import random
import urllib.request
from typing import ClassVar

import pytest
import torch

from antefix.errors import ConfigError
from tests.foreign_engines import sglang_stand_in
from tests.foreign_engines.sglang_world import IS_REAL, world

PAGE = 8
NUM_PAGES = 64
# SGLang starts a process to find the C library.
pytestmark = [pytest.mark.services] if IS_REAL else []
real_only = pytest.mark.skipif(not IS_REAL, reason="needs SGLang itself: `make test-engines`")


@pytest.fixture(scope="module")
def sglang():
    with world() as made:
        yield made


def config_of(sglang, directory, **other):
    extra = {
        "backend_name": "antefix",
        "module_path": "antefix_engines.sglang.hicache",
        "class_name": "AntefixHiCache",
        "interface_v1": 1,
        "directory": str(directory),
        "budget_bytes": "64M",
        "weights_revision": "r1",
    }
    fields = {
        "tp_rank": 0, "tp_size": 1, "pp_rank": 0, "pp_size": 1, "attn_cp_rank": 0, "attn_cp_size": 1,
        "is_mla_model": True, "enable_storage_metrics": False, "is_page_first_layout": True, "model_name": "m",
    }  # fmt: skip
    extra |= other.pop("extra", {})
    extra = {name: value for name, value in extra.items() if value is not None}
    return sglang.storage.HiCacheStorageConfig(**(fields | other), extra_config=extra)


class Rig:
    """A backend with V4's pools: a logical anchor, C4 and C128 for all pages, SWA and a state for trailing pages."""

    ITEM_BYTES: ClassVar = {"deepseek_v4_c4": 512, "deepseek_v4_c128": 64, "swa": 320, "deepseek_v4_c4_state": 96}
    TRAILING = ("swa", "deepseek_v4_c4_state")

    def __init__(self, sglang, directory, layout="page_first", seed=0, backend=None, **other):
        self.sglang, self.names = sglang, sglang.storage.PoolName
        self.backend = backend or sglang.hicache.AntefixHiCache(config_of(sglang, directory, **other), {})
        self.anchor = sglang.pools.LogicalHostPool(NUM_PAGES * PAGE, PAGE, layout=layout)
        self.backend.register_mem_pool_host(self.anchor)
        self.pools = {}
        draw = torch.Generator().manual_seed(seed)
        for name, item_bytes in self.ITEM_BYTES.items():
            device = [torch.zeros(NUM_PAGES, item_bytes, dtype=torch.uint8) for _ in range(3)]
            pool = sglang.pools.DeepSeekV4PagedHostPool(
                pool_name=name, device_buffers=device, item_bytes=item_bytes, num_host_pages=NUM_PAGES,
                slot_page_size=PAGE, layout=layout, pin_memory=False,
            )  # fmt: skip
            for buffer in pool.kv_buffer if isinstance(pool.kv_buffer, list) else [pool.kv_buffer]:
                buffer.random_(0, 256, generator=draw)
            self.pools[name] = pool
            self.backend.register_mem_host_pool_v2(pool, self.names(name))
        self.backend.on_host_pools_registered()

    def transfer(self, name, keys, first_page):
        policies = self.sglang.storage.PoolHitPolicy
        policy = policies.TRAILING_PAGES if name in self.TRAILING else policies.ALL_PAGES
        indices = torch.arange(first_page * PAGE, (first_page + len(keys)) * PAGE)
        return self.sglang.storage.PoolTransfer(
            name=self.names(name), host_indices=indices, keys=list(keys), hit_policy=policy
        )

    def info(self, prefix):
        return self.sglang.storage.HiCacheStorageExtraInfo(prefix_keys=prefix)

    def write(self, keys, start, width=2):
        """Back up a span as SGLang does: the sidecars first (windows only for the last pages), then the anchor."""
        prefix, span = list(keys[:start]), list(keys[start:])
        full = [self.transfer(name, span, start) for name in self.pools if name not in self.TRAILING]
        width = min(width, len(span))
        tail = [self.transfer(name, span[-width:], len(keys) - width) for name in self.TRAILING]
        done = dict(self.backend.batch_set_v2(full, self.info(prefix)))
        done |= self.backend.batch_set_v2(tail, self.info(prefix + span[:-width]))
        return self.write_anchor(span, start, prefix), {str(name): results for name, results in done.items()}

    def write_anchor(self, span, start, prefix):
        if type(self.backend).__name__ == "HiCacheFile":
            # The backend has no calls of version 1, so SGLang gives it the pages themselves.
            return self.backend.batch_set(span, [torch.empty(0, dtype=torch.uint8)] * len(span))
        indices = torch.arange(start * PAGE, (start + len(span)) * PAGE)
        return all(self.backend.batch_set_v1(span, indices, self.info(prefix)))

    def query(self, keys, width=2):
        wanted = [self.transfer(name, [] if name not in self.TRAILING else keys[-width:], 0) for name in self.pools]
        return self.backend.batch_exists_v2(keys, wanted, self.info(None))

    def page(self, name, page):
        return self.pools[name].get_data_page(page * PAGE, flat=True).clone()

    def read(self, name, keys, into_page):
        return self.backend.batch_get_v2([self.transfer(name, keys, into_page)], self.info(None))[self.names(name)]


@pytest.fixture
def rig(sglang, tmp_path):
    made = Rig(sglang, tmp_path / "data")
    yield made
    made.backend.close()


def keys_of(sglang, tokens, salt=None):
    return sglang.hashes(list(tokens), salt, page_size=PAGE)


@pytest.mark.parametrize("layout", ["page_first", "layer_first"])
def test_pages_come_back_to_the_bit_in_another_process_memory(sglang, tmp_path, layout):
    keys = keys_of(sglang, range(10 * PAGE))
    writer = Rig(sglang, tmp_path / "data", layout)
    assert writer.write(keys, 0, width=3) == (True, {
        "deepseek_v4_c4": [True] * 10, "deepseek_v4_c128": [True] * 10,
        "swa": [True] * 3, "deepseek_v4_c4_state": [True] * 3,
    })  # fmt: skip
    writer.backend.close()
    reader = Rig(sglang, tmp_path / "data", layout, seed=7)
    assert all(reader.backend.batch_get_v1(keys, torch.arange(10 * PAGE)))
    for name, count in (("deepseek_v4_c4", 10), ("deepseek_v4_c128", 10), ("swa", 3), ("deepseek_v4_c4_state", 3)):
        assert reader.read(name, keys[-count:], 40) == [True] * count
        for index in range(count):
            assert torch.equal(reader.page(name, 40 + index), writer.page(name, 10 - count + index))
        assert not torch.equal(reader.page(name, 39), writer.page(name, 39))
    reader.backend.close()


def test_page_first_is_read_and_written_in_place(rig):
    pool = rig.pools["swa"]
    (page,) = rig.backend._pages["swa"].at(torch.arange(5 * PAGE, 6 * PAGE), 1)
    assert page.payload() is page.landing() and page.payload().nbytes == 3 * 320
    page.landing()[:4] = b"\1\2\3\4"
    assert pool.kv_buffer[5].flatten()[:4].tolist() == [1, 2, 3, 4]


def test_every_boundary_that_can_be_restored_is_named(sglang, rig):
    """Windows were written at 4, 5 and 9 pages. Prefixes of other lengths have blocks but no window."""
    keys = keys_of(sglang, range(12 * PAGE))
    rig.write(keys[:4], 0, width=1)
    rig.write(keys[:5], 4, width=1)
    rig.write(keys[:9], 5, width=1)
    assert rig.query(keys[:9], width=1).restorable_prefix_pages == [4, 5, 9]
    found = rig.query(keys, width=1)
    assert (found.kv_hit_pages, found.restorable_prefix_pages) == (9, [4, 5, 9])
    assert {str(name): pages for name, pages in found.extra_pool_hit_pages.items()} == {
        "kv": 9, "deepseek_v4_c4": 9, "deepseek_v4_c128": 9, "swa": 9, "deepseek_v4_c4_state": 9,
    }  # fmt: skip
    assert rig.query(keys[:7], width=1).kv_hit_pages == 5
    assert rig.query(keys[:9], width=2).restorable_prefix_pages == [5]
    assert rig.query(keys[:3], width=1).restorable_prefix_pages == []


def test_a_fork_shares_its_prefix_alone(sglang, rig):
    base = keys_of(sglang, range(8 * PAGE))
    fork = keys_of(sglang, [*range(3 * PAGE), *range(900, 900 + 5 * PAGE)])
    assert base[:3] == fork[:3] and base[3] != fork[3]
    rig.write(base[:3], 0)
    rig.write(base, 3)
    assert rig.query(fork).kv_hit_pages == 3


def test_a_pool_that_lacks_a_page_makes_the_prefix_shorter(sglang, rig):
    keys = keys_of(sglang, range(6 * PAGE))
    rig.write(keys, 0)
    other = keys_of(sglang, range(1000, 1000 + 6 * PAGE))
    indices = torch.arange(6 * PAGE)
    assert all(rig.backend.batch_set_v1(other, indices, rig.info([])))
    assert rig.backend.batch_exists(other) == 6 and rig.query(other).kv_hit_pages == 0


def test_salts_are_kept_apart(sglang, rig):
    """SGLang's keys include the salt, because a salted prompt's chain begins with a digest of cache_salt."""
    keys, salted = (keys_of(sglang, range(4 * PAGE), salt) for salt in (None, "a" * 64))
    rig.write(keys, 0)
    assert rig.query(salted).kv_hit_pages == 0 and rig.query(keys).kv_hit_pages == 4


@pytest.mark.parametrize(
    "other",
    [
        {"extra": {"weights_revision": "r2"}},
        {"extra": {"namespace": "n"}},
        {"extra": {"kv_cache_dtype": "fp8_e5m2"}},
        {"extra": {"tenant": "t"}},
        {"layout": "layer_first"},
    ],
    ids=str,
)
def test_another_model_or_layout_hits_nothing(sglang, tmp_path, other):
    keys = keys_of(sglang, range(4 * PAGE))
    first = Rig(sglang, tmp_path / "data")
    first.write(keys, 0)
    first.backend.close()
    second = Rig(sglang, tmp_path / "data", **other)
    assert second.query(keys).kv_hit_pages == 0
    second.backend.close()


def test_ranks_share_what_is_equal_and_keep_apart_what_is_not(sglang):
    from antefix_engines.sglang.settings import shard_of

    def config(**other):
        return config_of(sglang, "unused", **other)

    assert shard_of(config(), "kv") == shard_of(config(tp_size=4, tp_rank=3), "swa") == ""
    assert shard_of(config(tp_size=4, tp_rank=3), "mamba") == "tp3/4"
    assert shard_of(config(is_mla_model=False, tp_size=4, tp_rank=3), "kv") == "tp3/4"
    assert shard_of(config(pp_size=2, pp_rank=1), "swa") == "pp1/2"


def test_what_sglang_does_not_say_is_not_guessed(sglang, rig, caplog):
    """Without the keys before it, a page's position is unknown, so the page is not stored.

    The log names the setting.
    """
    keys = keys_of(sglang, range(4 * PAGE))
    indices = torch.arange(4 * PAGE)
    assert rig.backend.batch_set_v1(keys, indices, rig.info(None)) == [False] * 4
    assert rig.backend.store.counters.refused_records == 4 and "hicache_storage_pass_prefix_keys" in caplog.text
    assert rig.backend.batch_set_v1(keys[2:], indices[2 * PAGE :], rig.info(keys[:2])) == [False] * 2
    assert rig.backend.batch_exists(keys) == 0


def test_wrong_indices_and_unknown_pools_are_misses(sglang, rig):
    keys = keys_of(sglang, range(2 * PAGE))
    short = rig.transfer("swa", keys, 0)
    short.host_indices = short.host_indices[:-1]
    assert list(rig.backend.batch_set_v2([short], rig.info([])).values()) == [[False, False]]
    assert list(rig.backend.batch_get_v2([short], rig.info([])).values()) == [[False, False]]
    unknown = dataclasses.replace(rig.transfer("swa", keys, 0), name=rig.names.MAMBA)
    assert rig.backend.batch_get_v2([unknown], rig.info([])) == {rig.names.MAMBA: [False, False]}


def test_a_damaged_page_and_those_after_it_are_misses(sglang, tmp_path):
    keys = keys_of(sglang, range(6 * PAGE))
    writer = Rig(sglang, tmp_path / "data")
    writer.write(keys, 0, width=6)
    target = writer.page("deepseek_v4_c4", 2).numpy().tobytes()
    window = writer.page("swa", 4).numpy().tobytes()
    writer.backend.close()
    (segment,) = (tmp_path / "data" / "store" / "segments").glob("*.seg")
    content = bytearray(segment.read_bytes())
    for payload in (target, window):
        content[content.index(payload) + 9] ^= 1
    segment.write_bytes(bytes(content))
    reader = Rig(sglang, tmp_path / "data", seed=7)
    assert reader.read("deepseek_v4_c4", keys, 0) == [True, True, False, False, False, False]
    assert reader.read("swa", keys, 0) == [True, True, True, True, False, True]
    reader.backend.close()


def test_single_keys(rig):
    page = torch.arange(300, dtype=torch.float32).reshape(3, 100)
    assert not rig.backend.exists("k1")
    assert rig.backend.set("k1", page) and rig.backend.batch_set(["k2", "k3"], [page + 1, page + 2])
    assert rig.backend.exists("k1") and rig.backend.exists("k3") and not rig.backend.exists("k4")
    into = [torch.zeros(300) for _ in range(3)]
    got = rig.backend.batch_get(["k2", "k4", "k3"], into)
    assert torch.equal(got[0], page.flatten() + 1) and got[1] is None and torch.equal(got[2], page.flatten() + 2)
    assert rig.backend.get("k1", torch.zeros(299)) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weights_revision": None}, "weights_revision is missing"),
        ({"interface_v1": 0}, "interface_v1 must be 1"),
        ({"budget": "1G"}, "unknown settings of the store: budget"),
        ({"directory": None}, "name the store"),
        ({"weights_revision": "files"}, "needs the model as a folder"),
    ],
)
def test_settings_that_make_no_sense_are_named(sglang, tmp_path, change, said):
    with pytest.raises(ConfigError, match=said):
        sglang.hicache.AntefixHiCache(config_of(sglang, tmp_path / "data", extra=change), {})


def test_several_ranks_need_a_service(sglang, tmp_path):
    with pytest.raises(ConfigError, match="kvstore service"):
        sglang.hicache.AntefixHiCache(config_of(sglang, tmp_path / "data", tp_size=2), {})


def test_weights_may_be_hashed(sglang, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    revisions = []
    for weights in (b"one", b"two"):
        (model / "model.safetensors").write_bytes(weights)
        config = config_of(sglang, tmp_path / "data", model_name=str(model), extra={"weights_revision": "files"})
        backend = sglang.hicache.AntefixHiCache(config, {})
        revisions.append(backend._settings.weights_revision)
        backend.close()
    assert revisions[0] != revisions[1] and len(revisions[0]) == 32


def test_counters_are_served(sglang, tmp_path):
    rig = Rig(sglang, tmp_path / "data", extra={"metrics_address": "127.0.0.1:0"})
    rig.write(keys_of(sglang, range(4 * PAGE)), 0)
    with urllib.request.urlopen(f"http://{rig.backend._metrics.address}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    # Two pools of four pages, a logical one, and two pages of two windows with a byte for each page before them.
    assert 'antefix_engine_stored_records_total{engine="sglang"} 24.0' in text
    rig.backend.close()


def test_a_store_that_dies_is_a_miss(sglang, tmp_path):
    rig = Rig(sglang, tmp_path / "data")
    keys = keys_of(sglang, range(4 * PAGE))
    rig.write(keys, 0)
    rig.backend.close()
    assert rig.query(keys).kv_hit_pages == 0
    assert rig.read("swa", keys, 0) == [False] * 4
    assert rig.write(keys, 0)[0] is False


def steps(seed):
    """Spans that the prompts of a small tree write and ask for."""
    draw = random.Random(seed)
    prompts = [[(branch if page >= cut else 0) * 1000 + page * PAGE + i for page in range(10) for i in range(PAGE)]
               for branch in range(3) for cut in (2, 5)]  # fmt: skip
    for _ in range(40):
        prompt, end, width = draw.choice(prompts), draw.randrange(1, 11), draw.randrange(1, 4)
        yield prompt[: end * PAGE], width, draw.random() < 0.6


def expected(written, keys, pools, width):
    """The reference: hits by SGLang's rules, from a dict of the written pages."""
    return [
        end
        for end in range(1, len(keys) + 1)
        if all(key in written["kv"] for key in keys[:end])
        and all(
            key in written[name]
            for name in pools
            for key in (keys[max(0, end - width) : end] if name in Rig.TRAILING else keys[:end])
        )
    ]


@pytest.mark.parametrize("seed", range(3))
def test_any_history_answers_as_sglangs_rules_say(sglang, tmp_path, seed):
    rig = Rig(sglang, tmp_path / "data")
    written = {name: set() for name in ("kv", *rig.pools)}
    for tokens, width, writes in steps(seed):
        keys = keys_of(sglang, tokens)
        found = rig.query(keys, width)
        assert found.restorable_prefix_pages == expected(written, keys, rig.pools, width)
        assert found.kv_hit_pages == max(found.restorable_prefix_pages, default=0)
        start = next((i for i, key in enumerate(keys) if key not in written["kv"]), len(keys))
        if writes and start < len(keys):
            rig.write(keys, start, width)
            kept = min(width, len(keys) - start)
            for name, pages in written.items():
                pages.update(keys[-kept:] if name in rig.TRAILING else keys[start:])
    assert len(written["kv"]) > 10
    rig.backend.close()


@real_only
def test_the_stand_in_has_sglangs_signatures(sglang):
    storage = sglang.storage
    for small in sglang_stand_in.STORAGE:
        real = getattr(storage, small.__name__)
        if dataclasses.is_dataclass(small):
            theirs = {field.name for field in dataclasses.fields(real)}
            assert {field.name for field in dataclasses.fields(small)} <= theirs
            required = [
                f.name for f in dataclasses.fields(real) if f.default is f.default_factory is dataclasses.MISSING
            ]
            assert set(required) <= {field.name for field in dataclasses.fields(small)}
        elif small.__name__.startswith("Pool"):
            assert {(item.name, item.value) for item in small} <= {(item.name, item.value) for item in real}
    for name, method in inspect.getmembers(sglang_stand_in.HiCacheStorage, inspect.isfunction):
        theirs = inspect.signature(getattr(storage.HiCacheStorage, name))
        assert list(inspect.signature(method).parameters) == list(theirs.parameters), name
        ours = inspect.signature(getattr(sglang.hicache.AntefixHiCache, name))
        assert list(ours.parameters) == list(theirs.parameters), name
    assert sglang_stand_in.HiCacheStorage.__abstractmethods__ == storage.HiCacheStorage.__abstractmethods__


@real_only
@pytest.mark.parametrize("seed", range(3))
def test_any_history_answers_as_sglangs_file_tier(sglang, tmp_path, seed):
    """The same calls to SGLang's own file storage give equal answers and equal pages."""
    ours = Rig(sglang, tmp_path / "data")
    file = sglang.storage.HiCacheFile(config_of(sglang, tmp_path / "unused"), str(tmp_path / "files"))
    theirs = Rig(sglang, tmp_path / "unused", backend=file)
    for tokens, width, writes in steps(seed):
        keys = keys_of(sglang, tokens)
        answers = [rig.query(keys, width) for rig in (ours, theirs)]
        assert answers[0].restorable_prefix_pages == answers[1].restorable_prefix_pages
        assert answers[0].kv_hit_pages == answers[1].kv_hit_pages
        start = answers[0].extra_pool_hit_pages.get("kv", 0)
        if writes and start < len(keys):
            for rig in (ours, theirs):
                rig.write(keys, start, width)
        elif answers[0].kv_hit_pages:
            end = answers[0].kv_hit_pages
            for name in ours.pools:
                wanted = keys[max(0, end - width) : end] if name in Rig.TRAILING else keys[:end]
                for rig in (ours, theirs):
                    assert all(rig.read(name, wanted, 40))
                for index in range(len(wanted)):
                    assert torch.equal(ours.page(name, 40 + index), theirs.page(name, 40 + index))
    ours.backend.close()


@real_only
def test_sglang_loads_it_and_its_failure_injector_makes_misses(sglang, tmp_path, monkeypatch):
    """SGLang's factory loads the backend, as with `--hicache-storage-backend dynamic`. A third of the calls fail."""
    monkeypatch.setenv("SGLANG_TEST_HICACHE_BACKEND_RANDOM_FAILURE", "0.3")
    config = config_of(sglang, tmp_path / "data")
    backend = sglang.factory.create_backend("dynamic", config, None)
    assert type(backend).__name__ == "HiCacheStorageFailureInjector"
    rig = Rig(sglang, tmp_path / "data", backend=backend)
    written = {name: {} for name in rig.pools}
    num_read = 0
    for number in range(60):
        keys = keys_of(sglang, range(number * 100, number * 100 + 4 * PAGE))
        _, done = rig.write(keys, 0)
        for name, results in done.items():
            pages = range(4 - len(results), 4)
            written[name] |= {
                keys[page]: rig.page(name, page) for page, good in zip(pages, results, strict=True) if good
            }
        found = rig.query(keys)
        for end in found.restorable_prefix_pages or []:
            for name in rig.pools:
                wanted = keys[max(0, end - 2) : end] if name in Rig.TRAILING else keys[:end]
                for index, good in enumerate(rig.read(name, wanted, 40)):
                    num_read += good
                    assert not good or torch.equal(rig.page(name, 40 + index), written[name][wanted[index]])
    assert num_read > 50
    backend.close()


@real_only
def test_sglangs_own_salts_and_hash(sglang):
    from types import SimpleNamespace

    def key(salt):
        found = SimpleNamespace(extra_key=None, cache_salt=salt)
        return sglang.hashes.__globals__["storage_namespace_seed"](found.extra_key, found.cache_salt)

    assert key("a") != key("b") and key(None) is None
