"""The tier under a stand-in for vLLM: what is stored, what is restored, and every way in which the store may fail."""

import shutil
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from antefix.block import Family
from antefix.errors import ConfigError, Unavailable
from antefix_engines.vllm.faults import flip_blocks
from antefix_engines.vllm.shape import Group, Shape, split_key
from antefix_engines.vllm.v4_pages import Kind, V4Pages
from tests.foreign_engines import vllm_stand_in
from tests.foreign_engines.vllm_stand_in import TINY_V4, TINY_V4_ROW, Engine, LookupResult, config_of, key_of

pytestmark = pytest.mark.slow

PROMPT = list(range(1100))
FORK = [*PROMPT[:800], *range(5000, 5120)]
PLAIN = (Group(id=0, num_tokens=16, layers=("model.layers.0.self_attn", "model.layers.1.self_attn")),)
HYBRID = (
    Group(id=0, num_tokens=16, layers=("model.layers.0.self_attn",), num_window_rows=4),
    Group(id=1, num_tokens=16, layers=("model.layers.1.self_attn",), num_window_rows=0),
)


@pytest.fixture(scope="module")
def vllm():
    with vllm_stand_in.stand_in() as modules:
        yield modules


@pytest.fixture
def start(vllm, tmp_path):
    """start(...): starts an engine over the test's store; engines run one after the other."""
    started = []

    def start(config=None, *, is_aligned=True, windows=None, **settings):
        own = {
            "directory": str(tmp_path / "data"),
            "budget_bytes": "64M",
            "weights_revision": "w",
            "lookup_wait_s": 30.0,
        }
        started.append(Engine(vllm, own | settings, config, is_aligned=is_aligned, windows=windows))
        return started[-1]

    yield start
    for engine in started:
        engine.close()


def plain_config(**other):
    return config_of(PLAIN, row_bytes=5000, dtype="bfloat16", kv_cache_layout="LBHNC", **other)


def pages_of(engine):
    return engine.tier.rows.pages


def parts_of(engine, row, group):
    """The used bytes of a row, by kind. CSA's states also have an entry for the live series."""
    found = {}
    for run in pages_of(engine).runs[group]:
        found[run.kind] = run.used(row)
        if run.kind in (Kind.CSA_STATE, Kind.KEYS_STATE):
            found[run.kind, "live"] = run.live(row)
    return found


def written(engine, tokens, row):
    return vllm_stand_in.row_bytes(tokens, *row, engine.config.worker_kv_bytes_per_block)


# --- what comes back -------------------------------------------------------------------------------------------------


def test_a_hit_gives_every_byte_that_it_needs_and_zeros_for_the_rest(start):
    engine = start()
    assert all(result.success for result in engine.store(PROMPT))
    engine.close()
    engine = start()
    assert engine.num_hit(PROMPT) == 1024
    rows, result = engine.restore(PROMPT, 1024)
    assert result.success and result.transfer_bytes == 4 * 92816 + 414720
    for (group, end), row in rows.items():
        mine, theirs = parts_of(engine, row, group), parts_of(engine, written(engine, PROMPT, (group, end)), group)
        for kind, used in mine.items():
            if kind == Kind.HCA_STATE:
                assert not used.any()
            elif kind in (Kind.CSA_STATE, Kind.KEYS_STATE):
                assert used.any() == (end == 1024)
            elif isinstance(kind, tuple) and end < 1024:
                continue
            else:
                assert np.array_equal(used, theirs[kind]), (group, end, kind)


def test_padding_is_neither_stored_nor_written(start):
    engine = start()
    engine.store(PROMPT)
    rows, _ = engine.restore(PROMPT, 1024)
    for (group, end), row in rows.items():
        is_used = np.zeros(len(row), bool)
        for run in pages_of(engine).runs[group]:
            run.used(is_used.view(np.uint8))[...] = 1
        assert (row[~is_used] == 0xEE).all(), (group, end)


def test_a_fork_inside_a_prompt_hits_up_to_the_last_window_before_it(start):
    engine = start()
    engine.store(PROMPT)
    assert engine.num_hit(FORK) == 768
    rows, result = engine.restore(FORK, 768)
    assert result.success
    row = rows[3, 512]
    assert np.array_equal(
        parts_of(engine, row, 3)[Kind.CSA], parts_of(engine, written(engine, PROMPT, (3, 512)), 3)[Kind.CSA]
    )


def test_blocks_behind_the_last_window_are_not_promised(start):
    engine = start()
    engine.store(PROMPT, ends=[512])
    context = engine.request(PROMPT)
    assert engine.num_hit(PROMPT, context) == 512
    assert engine.ask(context, key_of(PROMPT, 3, 512)) is LookupResult.HIT
    assert engine.ask(context, key_of(PROMPT, 3, 768)) is LookupResult.MISS


@pytest.mark.parametrize("num_jobs", [2, 7, 30])
def test_a_window_whose_rows_come_in_several_jobs_is_stored(start, num_jobs):
    engine = start()
    engine.store(PROMPT, num_jobs=num_jobs)
    assert engine.num_hit(PROMPT) == 1024


def test_a_window_that_lacks_a_row_is_not_stored(start):
    engine = start()
    context, rows = engine.request(PROMPT), engine.rows_of(PROMPT, ends=[1024])
    engine.submit_store(context, PROMPT, [row for row in rows if row != (1, 960)])
    engine.tier.drain_jobs()
    assert engine.num_hit(PROMPT) == 0


def test_rows_that_no_hit_needs_may_be_missing(start):
    engine = start()
    context, rows = engine.request(PROMPT), engine.rows_of(PROMPT, ends=[1024])
    engine.submit_store(context, PROMPT, [row for row in rows if row[0] != 5 and row != (4, 1020)])
    engine.tier.drain_jobs()
    assert engine.num_hit(PROMPT) == 1024


def test_a_prompt_that_ends_where_its_block_ends_hits_the_block_before(start):
    """vLLM would load 1,023 tokens and compute the last one from states that compact windows do not have."""
    engine = start()
    engine.store(PROMPT)
    assert engine.num_hit(PROMPT[:1024]) == 768
    # Restored rows are in vLLM's own memory, so vLLM does not ask the tier.
    engine.manager.primary |= dict.fromkeys(key_of(PROMPT, *row) for row in engine.rows_of(PROMPT[:1024]))
    assert engine.num_hit(PROMPT[:1024]) == 768
    assert engine.num_hit([*PROMPT[:1024], 1, 2, 3, 4]) == 1024


def test_without_the_rule_windows_have_all_states(start):
    engine = start(is_aligned=False)
    engine.store(PROMPT)
    assert engine.num_hit(PROMPT[:1024]) == 1023
    rows, result = engine.restore(PROMPT[:1024], 1024)
    assert result.success
    for (group, end), row in rows.items():
        theirs = parts_of(engine, written(engine, PROMPT, (group, end)), group)
        for kind, used in parts_of(engine, row, group).items():
            assert np.array_equal(used, theirs[kind]), (group, end, kind)


def test_compact_windows_are_not_read_without_the_rule(start):
    engine = start()
    engine.store(PROMPT)
    engine.close()
    assert start(is_aligned=False).num_hit(PROMPT) == 0


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        ({}, {"weights_revision": "other"}),
        ({}, {"namespace": "other"}),
        ({}, {"arithmetic": "other"}),
        ({"dtype": "bfloat16"}, {}),
        ({"kv_cache_layout": "BHLNC"}, {}),
        ({"tp_size": 2, "world_size": 2}, {}),
    ],
    ids=str,
)
def test_another_model_or_layout_misses(start, config, settings):
    engine = start()
    engine.store(PROMPT)
    engine.close()
    engine = start(config_of(**config), **settings)
    assert engine.num_hit(PROMPT) == 0


def test_ranks_that_an_operator_calls_alike_share(start):
    engine = start(arithmetic="mine")
    engine.store(PROMPT)
    engine.close()
    assert start(config_of(tp_size=2, world_size=2), arithmetic="mine").num_hit(PROMPT) == 1024


def test_a_model_of_the_hub_needs_a_revision(vllm, tmp_path):
    with pytest.raises(ConfigError, match="weights_revision"):
        Engine(vllm, {"directory": str(tmp_path / "data")})


def test_a_folder_is_named_by_its_weights_or_its_commit(vllm, tmp_path):
    names = set()
    for number, path in enumerate((tmp_path / "a", tmp_path / "b", tmp_path / "snapshots" / ("0" * 40))):
        path.mkdir(parents=True)
        (path / "config.json").write_text("{}")
        (path / "model.safetensors").write_bytes(bytes([number]) * 100)
        with Engine(vllm, {"directory": str(tmp_path / f"data{number}")}, config_of(model=str(path))) as engine:
            names.add(engine.tier.rows._kv.fingerprint.weights_revision)
    assert len(names) == 3 and "0" * 40 in names


def test_short_hashes_are_not_used(start, caplog):
    engine = start()
    engine.store(PROMPT)
    context = engine.request(PROMPT)
    short = key_of(PROMPT, 3, 256)[16:]
    context.set_offload_key_position(short, 256)
    assert engine.tier.lookup(short, context) is LookupResult.MISS
    assert engine.tier.counters.weak_hashes == 1 and "SHA-256" in caplog.text


@pytest.mark.parametrize(
    "settings", [{"budget": 1}, {"lookup_wait_s": 0}, {"load_threads": 0}, {"locality": "NEAR"}, {}]
)
def test_wrong_settings_are_refused(vllm, settings):
    with pytest.raises(ConfigError):
        Engine(vllm, settings)


# --- the store fails -------------------------------------------------------------------------------------------------


def test_a_flipped_bit_leaves_the_key_out_and_is_asked_for_no_more(start, tmp_path):
    engine = start()
    engine.store(PROMPT)
    assert flip_blocks(tmp_path / "data", 512) == 1
    context = engine.request(PROMPT)
    assert engine.num_hit(PROMPT, context) == 1024
    _, result = engine.restore(PROMPT, 1024, context)
    good = {(split_key(key)[1], context.get_offload_key_position(key)) for key in result.successful_keys}
    assert not result.success and good == {(3, 256)}
    assert engine.ask(context, key_of(PROMPT, 3, 512)) is LookupResult.MISS
    assert engine.num_hit(PROMPT) == 256
    assert engine.tier.get_stats().counters["antefix_vllm_lost_rows"] == len(engine.rows_of(PROMPT, ends=[1024])) - 1


def test_what_was_damaged_is_stored_again(start, tmp_path):
    engine = start()
    engine.store(PROMPT)
    flip_blocks(tmp_path / "data", 512)
    engine.restore(PROMPT, 1024)
    engine.store(PROMPT)
    assert engine.num_hit(PROMPT) == 1024 and engine.restore(PROMPT, 1024)[1].success


def test_what_was_evicted_between_lookup_and_load_is_left_out(start):
    engine = start()
    engine.store(PROMPT)
    context = engine.request(PROMPT)
    assert engine.num_hit(PROMPT, context) == 1024
    store, names = engine.tier._store._store, [engine.tier.rows._kv.hash_of(key_of(PROMPT, 3, 768)[:-4])]
    store.evict([(1, names[0])], owner=engine.tier._store.keyring.owner("default"))
    _, result = engine.restore(PROMPT, 1024, context)
    assert not result.success and {split_key(key)[1] for key in result.successful_keys} == {3}
    assert len(result.successful_keys) == 2


def test_a_dead_store_is_a_miss_and_costs_no_exception(start, monkeypatch):
    engine = start()
    engine.store(PROMPT)
    context = engine.request(PROMPT)
    assert engine.num_hit(PROMPT, context) == 1024

    def dead(*args, **kwargs):
        raise Unavailable("dead")

    for name in ("lookup", "get_blocks", "get", "put"):
        monkeypatch.setattr(type(engine.tier._store._store), name, dead)
    assert engine.num_hit(FORK) == 0
    _, result = engine.restore(PROMPT, 1024, context)
    assert not result.success and not result.successful_keys
    assert not any(each.success for each in engine.store(list(range(9000, 9600))))


def test_lookups_wait_for_nothing_and_give_up_in_time(start, monkeypatch):
    engine = start(lookup_wait_s=60)
    engine.store(PROMPT)
    may_go = threading.Event()
    find = engine.tier._lookups._find
    monkeypatch.setattr(engine.tier._lookups, "_find", lambda *args: may_go.wait(120) and find(*args))
    context, key = engine.request(PROMPT), key_of(PROMPT, 3, 256)
    assert engine.tier.lookup(key, context) is LookupResult.RETRY
    engine.tier.on_schedule_end(None)
    assert engine.tier.lookup(key, context) is LookupResult.RETRY
    now_s = time.monotonic()
    monkeypatch.setattr("antefix_engines.vllm.lookups.time", SimpleNamespace(monotonic=lambda: now_s + 61))
    assert engine.tier.lookup(key, context) is LookupResult.MISS
    assert engine.tier.counters.late_lookups == 1
    may_go.set()
    # Later answers are for other requests.
    assert engine.num_hit(PROMPT) == 1024


def test_a_store_that_is_too_slow_drops_jobs_at_once(start, monkeypatch):
    engine = start(queue_bytes=10 * 94208)
    may_go = threading.Event()
    put = engine.tier.rows.put
    monkeypatch.setattr(engine.tier.rows, "put", lambda *args: may_go.wait(120) and put(*args))
    context, rows = engine.request(PROMPT), engine.rows_of(PROMPT, ends=[1024])
    first = engine.submit_store(context, PROMPT, rows[:8])
    dropped = engine.submit_store(context, PROMPT, rows[8:])
    assert not engine.result(dropped).success
    may_go.set()
    engine.tier.drain_jobs()
    assert engine.result(first).success
    assert engine.tier.counters.dropped_rows == len(rows) - 8


def test_an_error_of_ours_ends_neither_lookups_nor_jobs(start, monkeypatch, caplog):
    engine = start()
    engine.store(PROMPT)
    find = engine.tier._lookups._find
    monkeypatch.setattr(engine.tier._lookups, "_find", lambda *args: 1 / 0)
    assert engine.num_hit(PROMPT) == 0
    monkeypatch.setattr(engine.tier._lookups, "_find", find)
    monkeypatch.setattr(engine.tier.rows, "get", lambda *args: 1 / 0)
    assert not engine.restore(PROMPT, 1024)[1].success
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.slow
def test_a_full_store_keeps_what_fits_and_gives_right_bytes(start, tmp_path):
    engine = start(budget_bytes="16M")
    for first in range(0, 80_000, 2000):
        engine.store(list(range(first, first + 600)))
    hits = [engine.num_hit(list(range(first, first + 600))) for first in range(0, 80_000, 2000)]
    assert 0 in hits and 512 in hits
    engine.close()
    shutil.rmtree(tmp_path / "data")


@pytest.mark.parametrize("layout", ["V4", "plain"])
@pytest.mark.parametrize("closes", [True, False])
def test_shutdown_lets_go_of_vllms_memory_and_raises_nothing(start, monkeypatch, layout, closes):
    engine = start() if layout == "V4" else start(plain_config(), windows={0: 0})
    tokens, end = (PROMPT, 1024) if layout == "V4" else (list(range(100)), 96)
    engine.store(tokens)
    assert engine.restore(tokens, end)[1].success
    own = engine.tier._store._store
    if not closes:
        monkeypatch.setattr(type(own), "close", lambda self: 1 / 0)
    # This raises BufferError if our code still holds a part of the memory.
    engine.manager.shutdown()
    monkeypatch.undo()
    own.close()


# --- ranks -----------------------------------------------------------------------------------------------------------


def test_what_all_ranks_have_is_stored_once(start):
    engine = start(config_of(tp_size=4, world_size=4))
    assert sum(result.transfer_bytes for result in engine.store(PROMPT)) == 4 * 92816 + 4 * 414720
    rows, result = engine.restore(PROMPT, 1024)
    width = TINY_V4_ROW
    assert result.success and all(
        np.array_equal(row[:width], row[rank * width : (rank + 1) * width])
        for row in rows.values()
        for rank in range(4)
    )


def test_ranks_that_differ_are_not_stored(start):
    engine = start(config_of(tp_size=2, world_size=2))
    engine.store(PROMPT, ranks="differ")
    assert engine.num_hit(PROMPT) == 0 and engine.tier.counters.unequal_ranks > 0


def test_one_cell_for_all_ranks_is_what_one_rank_has(start):
    engine = start(config_of(tp_size=2, world_size=2, replicated_layout=True))
    engine.store(PROMPT)
    assert engine.num_hit(PROMPT) == 1024


@pytest.mark.parametrize(("is_one_whole", "num_records"), [(False, 8), (True, 4)])
def test_groups_that_are_cut_over_ranks_have_a_rank_in_their_names(start, is_one_whole, num_records):
    config = plain_config(tp_size=2, world_size=2, is_parallelism_agnostic=is_one_whole)
    engine = start(config, windows={0: 0})
    tokens = list(range(70))
    engine.store(tokens, ranks="differ")
    assert engine.tier._store.counters.stored_records == num_records
    rows, result = engine.restore(tokens, 64)
    assert result.success
    for row, data in rows.items():
        for rank in range(2):
            theirs = vllm_stand_in.row_bytes(tokens, *row, 5000, rank)
            assert np.array_equal(data[rank * 5000 : (rank + 1) * 5000], theirs)


# --- layouts that are not V4 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "bfloat16"},
        {"kv_cache_layout": "LBHNC"},
        {"blocks_per_chunk": 2},
        {"row_bytes": TINY_V4_ROW + 576},
        {"pp_size": 2},
        {"dcp_size": 2},
        {"groups": TINY_V4[:3] + TINY_V4[4:]},
        {"groups": (*TINY_V4, Group(id=6, num_tokens=64, layers=("model.mtp.attn.cache",)))},
        {"groups": (*TINY_V4[:3], Group(id=3, num_tokens=64, layers=TINY_V4[3].layers), *TINY_V4[4:])},
    ],
    ids=str,
)
def test_a_cache_that_is_not_v4_to_the_byte_is_not_taken_apart(change):
    change = dict(change)
    groups = change.pop("groups", TINY_V4)
    config = config_of(groups, **change)
    spec = vllm_stand_in.TieringOffloadingSpec(config)
    assert V4Pages.of(Shape.of(spec, spec.kv_bytes_per_chunk), compact=True) is None


def test_windows_of_other_lengths_are_not_v4():
    groups = tuple(
        Group(id=group.id, num_tokens=group.num_tokens, layers=group.layers, num_window_rows=length)
        for group, length in zip(TINY_V4, (2, 2, 2, 0, 2, 16), strict=True)
    )
    spec = vllm_stand_in.TieringOffloadingSpec(config_of(groups, tells_windows=True))
    assert V4Pages.of(Shape.of(spec, spec.kv_bytes_per_chunk), compact=True) is not None
    longer = (Group(id=0, num_tokens=64, layers=groups[0].layers, num_window_rows=3), *groups[1:])
    spec = vllm_stand_in.TieringOffloadingSpec(config_of(longer, tells_windows=True))
    assert V4Pages.of(Shape.of(spec, spec.kv_bytes_per_chunk), compact=True) is None


def test_a_plain_model_is_stored_row_by_row(start, tmp_path):
    engine = start(plain_config(), windows={0: 0})
    tokens = list(range(100))
    engine.store(tokens)
    assert engine.num_hit(tokens) == 96 and engine.num_hit([*tokens[:50], 7000]) == 48
    rows, result = engine.restore(tokens, 96)
    assert result.success
    assert all(np.array_equal(data[:5000], written(engine, tokens, row)) for row, data in rows.items())
    flip_blocks(tmp_path / "data", 48)
    context = engine.request(tokens)
    assert engine.num_hit(tokens, context) == 96
    _, result = engine.restore(tokens, 96, context)
    assert not result.success and len(result.successful_keys) == 5
    assert engine.num_hit(tokens) == 32


@pytest.mark.parametrize("tells_windows", [False, True], ids=["0.32", "0.33"])
def test_a_model_with_sliding_windows_hits_where_its_window_is(start, tells_windows):
    config = config_of(HYBRID, row_bytes=4096, dtype="bfloat16", kv_cache_layout="LBHNC", tells_windows=tells_windows)
    engine = start(config, windows={0: 4, 1: 0})
    tokens = list(range(200))
    engine.store(tokens, ends=[96, 192])
    assert engine.num_hit(tokens) == 192 and engine.num_hit([*tokens[:120], 7000, 7001]) == 96
    rows, result = engine.restore(tokens, 192)
    assert result.success
    assert all(np.array_equal(data, written(engine, tokens, row)) for row, data in rows.items())


def test_a_row_without_the_row_before_it_begins_a_chain(start):
    """vLLM has the prompt's beginning in its own cache, but the store never got it."""
    engine = start(plain_config(), windows={0: 0})
    tokens = list(range(100))
    context, rows = engine.request(tokens), engine.rows_of(tokens)
    engine.submit_store(context, tokens, rows[3:])
    engine.tier.drain_jobs()
    other = engine.request(tokens)
    assert engine.ask(other, key_of(tokens, 0, 64)) is LookupResult.HIT


def test_what_is_called_v4_and_what_not(start):
    engine = start()
    assert engine.tier.rows._kv.fingerprint.family is Family.V4
    engine.close()
    engine = start(plain_config(), windows={0: 0})
    assert engine.tier.rows._groups[0][0].fingerprint.family is Family.OPAQUE


# --- what vLLM is told -----------------------------------------------------------------------------------------------


def test_events_tell_what_was_stored_and_what_is_lost(start, tmp_path):
    engine = start(config_of(events=True), enable_kv_events=True)
    engine.store(PROMPT, ends=[1024])
    told = list(engine.tier.take_events())
    assert {event.removed for event in told} == {False} and told[0].medium.value == "STORAGE"
    keys = {key for event in told for key in event.keys}
    assert keys == {key_of(PROMPT, *row) for row in engine.rows_of(PROMPT, ends=[1024])}
    flip_blocks(tmp_path / "data", 1024)
    engine.restore(PROMPT, 1024)
    lost = [event for event in engine.tier.take_events() if event.removed]
    assert key_of(PROMPT, 3, 1024) in lost[0].keys and not list(engine.tier.take_events())


def test_no_events_unless_both_ask_for_them(start):
    engine = start(config_of(events=False), enable_kv_events=True)
    engine.store(PROMPT)
    assert not list(engine.tier.take_events())


def test_statistics_are_what_happened_since_the_last_call(start):
    engine = start()
    engine.store(PROMPT)
    told = engine.tier.get_stats().counters
    assert told == {"antefix_vllm_stored_blocks": 4, "antefix_vllm_stored_windows": 4}
    assert engine.tier.get_stats() is None
    engine.restore(PROMPT, 1024)
    assert engine.tier.get_stats().counters == {"antefix_vllm_restored_blocks": 4, "antefix_vllm_restored_windows": 1}
    defined = type(engine.tier).build_metric_definitions({})
    assert set(told) <= set(defined) and all(each.documentation for each in defined.values())


def test_locality_follows_the_store(start):
    assert start().tier.locality.value == "LOCAL"
