"""AntefixL2Adapter keeps LMCache's contract. Runs over a stand-in; `make test-engines` runs it over LMCache itself."""

import importlib
import inspect
import os
import random
import select
from types import SimpleNamespace

import pytest

from antefix.errors import ConfigError
from tests.foreign_engines import lmcache_stand_in

IS_REAL = bool(os.environ.get("ANTEFIX_LMCACHE_REAL"))
pytestmark = [pytest.mark.services] if IS_REAL else []
real_only = pytest.mark.skipif(not IS_REAL, reason="needs LMCache itself: `make test-engines`")
NBYTES = 5000


@pytest.fixture(scope="module")
def lmcache():
    if IS_REAL:
        base = importlib.import_module("lmcache.v1.distributed.l2_adapters.base")
        api = importlib.import_module("lmcache.v1.distributed.api")
        plugin = importlib.import_module("lmcache.v1.distributed.l2_adapters.plugin_l2_adapter")
        adapter = importlib.import_module("antefix_engines.lmcache.l2_adapter")
        yield SimpleNamespace(
            L2AdapterInterface=base.L2AdapterInterface, ObjectKey=api.ObjectKey, plugin=plugin, adapter=adapter
        )
        return
    with lmcache_stand_in.stand_in():
        small = lmcache_stand_in
        adapter = importlib.import_module("antefix_engines.lmcache.l2_adapter")
        yield SimpleNamespace(
            L2AdapterInterface=small.L2AdapterInterface, ObjectKey=small.ObjectKey, plugin=None, adapter=adapter
        )


def params(tmp_path, **other):
    return {"directory": str(tmp_path / "data"), "budget_bytes": "8M", "weights_revision": "r1"} | other


def opened(lmcache, tmp_path, **other):
    """An adapter made as LMCache's own plug-in loader makes it."""
    if lmcache.plugin is None:
        return lmcache.adapter.AntefixL2Adapter(params(tmp_path, **other))
    config = lmcache.plugin.PluginL2AdapterConfig(
        "antefix_engines.lmcache.l2_adapter", "AntefixL2Adapter", params(tmp_path, **other)
    )
    return lmcache.plugin._create_plugin_adapter(config)


@pytest.fixture
def adapter(lmcache, tmp_path):
    made = opened(lmcache, tmp_path)
    yield made
    made.close()


def keys_of(lmcache, count, **other):
    fields = {"model_name": "org/m", "kv_rank": 0} | other
    return [lmcache.ObjectKey(chunk_hash=bytes([i]) * 32, **fields) for i in range(count)]


def objects_of(count, seed=None, nbytes=NBYTES):
    draw = random.Random(seed)
    make = bytes if seed is None else draw.randbytes
    return [SimpleNamespace(byte_array=memoryview(bytearray(make(nbytes)))) for _ in range(count)]


def wait(fd):
    assert select.select([fd], [], [], 60)[0]
    os.eventfd_read(fd)


def store(adapter, keys, objects):
    task = adapter.submit_store_task(keys, objects)
    wait(adapter.get_store_event_fd())
    return adapter.pop_completed_store_tasks()[task]


def look_up(adapter, keys):
    task = adapter.submit_lookup_and_lock_task(keys, {})
    wait(adapter.get_lookup_and_lock_event_fd())
    found = adapter.query_lookup_and_lock_result(task)
    assert adapter.query_lookup_and_lock_result(task) is None
    return [bool(found.test(i)) for i in range(len(keys))]


def load(adapter, keys, objects):
    task = adapter.submit_load_task(keys, objects)
    wait(adapter.get_load_event_fd())
    loaded = adapter.query_load_result(task)
    assert adapter.query_load_result(task) is None
    return [bool(loaded.test(i)) for i in range(len(keys))]


def test_objects_come_back_after_a_restart(lmcache, tmp_path):
    keys, objects = keys_of(lmcache, 4), objects_of(4, seed=1)
    first = opened(lmcache, tmp_path)
    done = store(first, keys[:3], objects[:3])
    assert done.is_successful() and done.bytes_transferred() == 3 * NBYTES
    first.close()
    second = opened(lmcache, tmp_path)
    assert look_up(second, keys) == [True, True, True, False]
    landed = objects_of(4)
    assert load(second, keys, landed) == [True, True, True, False]
    assert [each.byte_array == made.byte_array for each, made in zip(landed, objects, strict=True)][:3] == [True] * 3
    second.submit_unlock(keys[:3])
    second.close()


def test_what_is_there_is_not_written_or_counted_again(lmcache, adapter):
    keys, objects = keys_of(lmcache, 3), objects_of(3, seed=1)
    store(adapter, keys[:2], objects[:2])
    done = store(adapter, keys, objects)
    assert done.is_successful() and done.bytes_transferred() == NBYTES


def test_the_three_event_fds_differ(adapter):
    fds = {adapter.get_store_event_fd(), adapter.get_lookup_and_lock_event_fd(), adapter.get_load_event_fd()}
    assert len(fds) == 3


@pytest.mark.parametrize(
    "other", [{"cache_salt": "s"}, {"kv_rank": 1}, {"object_group_id": 2}, {"model_name": "org/n"}], ids=str
)
def test_other_keys_are_other_objects(lmcache, adapter, other):
    store(adapter, keys_of(lmcache, 2), objects_of(2, seed=1))
    assert look_up(adapter, keys_of(lmcache, 2, **other)) == [False, False]


def test_other_weights_are_other_objects(lmcache, tmp_path):
    first = opened(lmcache, tmp_path)
    store(first, keys_of(lmcache, 2), objects_of(2, seed=1))
    first.close()
    second = opened(lmcache, tmp_path, weights_revision="r2")
    assert look_up(second, keys_of(lmcache, 2)) == [False, False]
    second.close()


def test_an_object_of_another_size_is_a_miss(lmcache, adapter):
    store(adapter, keys_of(lmcache, 1), objects_of(1, seed=1))
    for nbytes in (NBYTES - 1, NBYTES + 1):
        assert load(adapter, keys_of(lmcache, 1), objects_of(1, nbytes=nbytes)) == [False]
    assert load(adapter, keys_of(lmcache, 1), objects_of(1)) == [True]


def test_a_damaged_object_is_a_miss(lmcache, tmp_path):
    keys, objects = keys_of(lmcache, 3), objects_of(3, seed=1)
    first = opened(lmcache, tmp_path)
    store(first, keys, objects)
    first.close()
    (segment,) = (tmp_path / "data" / "store" / "segments").glob("*.seg")
    content = bytearray(segment.read_bytes())
    content[content.index(bytes(objects[1].byte_array)) + 7] ^= 1
    segment.write_bytes(bytes(content))
    second = opened(lmcache, tmp_path)
    assert load(second, keys, objects_of(3)) == [True, False, True]
    second.close()


def test_what_is_locked_is_not_evicted(lmcache, adapter):
    locked = keys_of(lmcache, 4, cache_salt="locked")
    store(adapter, locked, objects_of(4, seed=1, nbytes=100_000))
    assert look_up(adapter, locked) == [True] * 4
    for number in range(40):
        store(adapter, keys_of(lmcache, 4, kv_rank=number), objects_of(4, seed=number, nbytes=100_000))
    assert adapter.store._store.stats().evictions > 0
    assert load(adapter, locked, objects_of(4, nbytes=100_000)) == [True] * 4
    adapter.submit_unlock(locked)
    for number in range(40, 80):
        store(adapter, keys_of(lmcache, 4, kv_rank=number), objects_of(4, seed=number, nbytes=100_000))
    assert look_up(adapter, locked) == [False] * 4


def test_delete(lmcache, adapter):
    keys = keys_of(lmcache, 3)
    store(adapter, keys, objects_of(3, seed=1))
    adapter.delete(keys[1:2])
    assert look_up(adapter, keys) == [True, False, True]


def test_a_dead_store_answers_and_says_so(lmcache, adapter):
    keys = keys_of(lmcache, 2)
    store(adapter, keys, objects_of(2, seed=1))
    adapter.store.close()
    assert look_up(adapter, keys) == [False, False] == load(adapter, keys, objects_of(2))
    assert not store(adapter, keys, objects_of(2, seed=1)).is_successful()
    assert adapter.report_status()["errors"] > 0 and adapter.report_status()["is_healthy"]


def test_a_task_that_fails_is_answered(lmcache, adapter):
    """A failed task must still be answered, because LMCache would wait for ever."""
    assert load(adapter, keys_of(lmcache, 2), objects_of(1)) == [False, False]
    assert not store(adapter, keys_of(lmcache, 1), [SimpleNamespace()]).is_successful()


@pytest.mark.parametrize(
    ("change", "said"), [({"weights_revision": ""}, "weights_revision is missing"), ({"dir": "d"}, "unknown settings")]
)
def test_settings_that_make_no_sense_are_named(lmcache, tmp_path, change, said):
    with pytest.raises(ConfigError, match=said):
        lmcache.adapter.AntefixL2Adapter(params(tmp_path, **change))


@real_only
def test_the_stand_in_has_lmcaches_signatures(lmcache):
    small = lmcache_stand_in.L2AdapterInterface
    assert small.__abstractmethods__ == lmcache.L2AdapterInterface.__abstractmethods__
    for name, method in inspect.getmembers(small, inspect.isfunction):
        theirs = list(inspect.signature(getattr(lmcache.L2AdapterInterface, name)).parameters)
        assert list(inspect.signature(method).parameters) == theirs, name
        if not name.startswith("_"):
            assert list(inspect.signature(getattr(lmcache.adapter.AntefixL2Adapter, name)).parameters) == theirs, name
