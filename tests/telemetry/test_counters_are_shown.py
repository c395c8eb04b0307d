"""Every field of every class that counts, and every number in the statistics' messages, has a metric."""

import ast
import dataclasses
import functools
import re
from pathlib import Path

import pytest

from antefix.clients import AnswerCounters
from antefix.events.follower import FollowCounters
from antefix.events.kv_publisher import KvPublisherCounters
from antefix.events.kv_subscriber import KvFollowCounters
from antefix.model.step_counters import StepCounters
from antefix.objects import object_metrics
from antefix.objects.janitor import JanitorCounters
from antefix.objects.object_reads import ObjectReadCounters
from antefix.objects.object_writer import ObjectWriteCounters
from antefix.store.local_copies import CopyCounters
from antefix.telemetry.shown import families
from antefix.v1 import decode_pb2, kvstore_pb2, prefill_pb2, router_pb2, window_pb2
from antefix.window.planner import KindRecord
from antefix_billing.push.pusher import PushCounters
from antefix_billing.usage_commit import CommitCounters
from antefix_console.commands import usage_push
from antefix_decode import metrics as decode
from antefix_engines import metrics as engines
from antefix_engines.engine_store import EngineCounters
from antefix_engines.vllm.row_store import TierCounters
from antefix_kvstore import engine_stats, scrubber, space, storage_engine, upload_metrics
from antefix_kvstore import metrics as kvstore
from antefix_kvstore.object_upload import UploadCounters
from antefix_prefill import metrics as prefill
from antefix_prefill.prefetch import PrefetchCounters
from antefix_prefill.worker import metrics as worker
from antefix_prefill.worker.store_counters import StoreCounters
from antefix_router import metrics as router
from antefix_router import prefill_calls
from antefix_router.fleet import fleet_metrics
from antefix_router.fleet.engines import HitCounters
from antefix_router.fleet.fleet_placing import PassingCounters
from antefix_router.shared_bill.shared_bill import SharedCounters

REPO = Path(__file__).parents[2]
ROOMS = ("antefix", "billing", "decode", "engines", "kvstore", "prefill", "router")
# By class: the tables that show its fields, and the fields that have another name there or are not numbers.
SHOWN = {
    FollowCounters: ([router.FOLLOW], {}),
    KindRecord: ([worker.PLANS], {}),
    KvPublisherCounters: ([worker.KV_EVENTS], {}),
    KvFollowCounters: ([fleet_metrics.EVENTS], {}),
    HitCounters: ([fleet_metrics.HITS], {}),
    PassingCounters: ([fleet_metrics.PASSING], {}),
    CommitCounters: ([router.COMMITS], {}),
    SharedCounters: ([router.SHARED], {}),
    PushCounters: ([usage_push.PUSH], {}),
    TierCounters: ([engines.VLLM_TIER], {"_lock": "text"}),
    EngineCounters: ([engines.ENGINE], {"errors": "by_kind", "last_error": "text"}),
    AnswerCounters: ([router.ANSWERS], {}),
    prefill_calls.PrefillingCounters: ([router.PREFILLING], {}),
    CopyCounters: ([worker.COPIES], {}),
    ObjectReadCounters: ([object_metrics.READS], {}),
    ObjectWriteCounters: ([upload_metrics.WRITES], {}),
    UploadCounters: ([upload_metrics.UPLOADS], {}),
    JanitorCounters: ([upload_metrics.JANITOR], {}),
    StepCounters: ([decode.STEPS], {}),
    PrefetchCounters: ([prefill.PREFETCH], {}),
    StoreCounters: ([worker.STORE], {"last_error": "text", "last_refusal": "text"}),
    storage_engine.StorageCounters: (
        [kvstore.ENGINE, kvstore.STATS],
        {"impossible": "impossible_writes", "last_impossible": "text"},
    ),
    space.SpaceCounters: ([kvstore.SPACE, kvstore.STATS], {}),
    scrubber.ScrubCounters: ([kvstore.SCRUBBER], {}),
}
# Classes with similar names that hold copies of the above, or do not count events.
COPIES = {"StoreStats", "StoreTotals", "KindTotals", "RouterCounters", "_Counts", "Totals"}
# By message: each field's metric. Texts, names and cursors are not numbers.
MESSAGES = {
    kvstore_pb2.StatsResponse: {
        **{field: shown.name for field, shown in kvstore.STATS.items()},
        "kinds": "antefix_store_records",
        "handoff_bytes_max": "antefix_store_memory_limit_bytes",
        "scrubbed_bytes": "antefix_store_scrubbed_bytes",
    },
    kvstore_pb2.KindStats: {
        "records": "antefix_store_records",
        "stored_bytes": "antefix_store_stored_bytes",
        "payload_bytes": "antefix_store_payload_bytes",
    },
    router_pb2.RouterCounters: {
        **{field.removeprefix("num_"): shown.name for field, shown in router.PREFILLING.items()},
        **{f"memory_{field.removeprefix('num_')}": shown.name for field, shown in router.FOLLOW.items()},
        "unstored": "antefix_unstored_requests",
    },
    router_pb2.AnswerCounters: {field: shown.name for field, shown in router.ANSWERS.items()},
    router_pb2.WorkerStatus: {
        "serving": "antefix_worker_serving",
        "draining": "antefix_worker_serving",
        "num_requests": "antefix_worker_placed_requests",
        "num_tokens_queued": "antefix_worker_placed_tokens",
        "memory_known": "antefix_worker_memory_known",
    },
    prefill_pb2.PrefillStatusResponse: {
        "num_running": "antefix_prefill_running_prompts",
        "num_waiting": "antefix_prefill_waiting_prompts",
        "num_blocks": "antefix_pool_blocks",
        "num_resident_blocks": "antefix_pool_resident_blocks",
        "prefill_tokens_per_s": "antefix_prefill_speed",
    },
    decode_pb2.DecodeStatusResponse: {
        "num_running": "antefix_decode_running_sequences",
        "num_waiting": "antefix_decode_waiting_requests",
        "num_blocks": "antefix_pool_blocks",
        "num_resident_blocks": "antefix_pool_resident_blocks",
        "decode_tokens_per_s": "antefix_decode_speed",
    },
    window_pb2.PlanKindStatus: {field: shown.name for field, shown in worker.PLANS.items()},
}
# Attributes outside of dataclasses that a service counts up: the metric of each, or why it has none.
COUNTED = {
    "num_broken": "antefix_worker_broken_seals",
    "num_corrupt": "antefix_window_pool_corrupt_records",
    "num_failed": "antefix_security_failed_reloads",
    "num_lost": "antefix_store_log_lost_lines",
    "num_cached": "antefix_store_page_cache_samples",
    "num_sampled": "antefix_store_page_cache_samples",
    "num_unnamed": "antefix_fleet_unnamed_blocks",
    "num_evicted": "antefix_pool_evicted_blocks",
    "num_too_large": "antefix_worker_too_large_requests",
    "num_unstored": "antefix_unstored_requests",
    "num_joined": "antefix_compute_joined_chunks",
    "num_changes": "antefix_bill_reloads",
    "num_alone": "antefix_shared_bill_alone_reservations",
    "num_requests": "antefix_worker_placed_requests",
    "num_tokens": "antefix_worker_placed_tokens",
    "num_placed": "antefix_placements",
    "num_ended": "antefix_worker_calls",
    "num_dropped": "antefix_answers_dropped",
    "num_running": "antefix_http_running_requests",
    "num_waiting": "antefix_prefill_waiting_prompts",
    "busy_s": "antefix_decode_busy_seconds",
    "num_drafted": "antefix_decode_drafted_tokens",
    "num_drafts_kept": "antefix_decode_drafts_kept",
    "num_held_back": "antefix_decode_held_back_sequences",
    "_num_streams": "antefix_store_streams",
    "_num_joined": "antefix_router_retries",
    "_num_given": "antefix_router_retries",
    "num_forged": "antefix_window_pool_forged_records",
    "num_errors": "antefix_api_keys_errors",
    "num_malformed": "antefix_http_malformed_requests",
    "num_calls": "antefix_worker_rank_calls",
    "num_displaced": "antefix_http_closed_connections",
    "num_silent": "antefix_http_closed_connections",
    "num_silences": "antefix_store_client_silences",
    "num_slow": "antefix_store_client_slow_calls",
    "num_spared": "antefix_store_client_spared_calls",
    "num_hedges": "antefix_router_hedges",
    "num_denied": "antefix_router_denied_hedges",
    "num_copied": "antefix_worker_local_copies",
    "num_prefetched": "antefix_prefill_prefetched_prompts",
    "num_blocks_prefetched": "antefix_prefill_prefetched_blocks",
    "num_skipped": "antefix_prefill_unprefetched_prompts",
    "num_checkpoints_prefetched": "antefix_prefill_prefetched_checkpoints",
    "num_blocks_wanted": "antefix_prefill_waited_blocks",
    "num_blocks_found": "antefix_prefill_waited_blocks_found",
    "num_over_budget": "antefix_worker_local_copies_over_budget",
    "num_left_out": "antefix_router_store_names",
    # Counts of the object tier.
    "num_bad": "antefix_object_bad_records",
    "num_blocks": "antefix_object_read_blocks",
    "num_drafts": "antefix_object_deleted_drafts",
    "num_expired": "antefix_object_deleted_segments",
    "num_gone": "antefix_object_gone_segments",
    "num_over_quota": "antefix_object_deleted_segments",
    "num_passes": "antefix_object_passes",
    "num_ranges": "antefix_object_ranges",
    "num_direct_ranges": "antefix_object_direct_ranges",
    "num_broken_ranges": "antefix_object_broken_ranges",
    "num_asked_again": "antefix_object_asked_again_ranges",
    "num_read_again": "antefix_object_read_again_records",
    "num_records": "antefix_object_written_records",
    "num_segments": "antefix_object_written_segments",
    "num_tiles": "antefix_object_written_tiles",
    "num_uploaded": "antefix_object_uploaded_records",
}
# State of one request, block, file or index, not counts of a service's events.
STATE = {
    *("num_users", "num_observations", "num_good", "num_active_tokens", "num_served", "num_readers", "num_output"),
    "num_expected",
    *("num_output_tokens", "num_taken", "num_blocks_written", "num_checkpoints_written", "num_plans", "num_outcomes"),
    *("num_exact_tokens", "num_failures", "num_quarantined", "num_apart", "num_missing", "num_there", "num_bytes"),
    # Counts that are shown as kinds, by their own names.
    *("num_snapshots", "num_gaps", "num_events", "num_led", "num_followed", "num_gave_up_waiting", "num_refused"),
    *("num_hedged", "num_hedges_won", "num_left", "num_compressed", "num_encrypted", "num_indexed"),
    *("num_straight", "num_batches", "num_replays", "num_unread", "num_lives", "num_forgotten", "num_answers"),
    *(
        "num_hashes",
        "num_prompts",
        "num_with_ttft",
        "num_unreported",
        "num_other_prompts",
        "num_full",
        "num_late",
        "num_pieces",
        "num_returns",
    ),
}


MAY_COUNT = re.compile(r"num_\w*(\[.*\])? \+=|^ *class \w+(Counters|Counts|Stats|Totals)\b", re.MULTILINE)


@functools.cache
def trees():
    """Syntax trees of the files that may count events, because parsing all files takes seconds."""
    paths = [path for room in ROOMS for path in sorted((REPO / room).rglob("*.py")) if "v1" not in path.parts]
    texts = ((path, path.read_text()) for path in paths)
    return [(path, ast.parse(text)) for path, text in texts if MAY_COUNT.search(text)]


def numbers_of(message):
    texts = (message.DESCRIPTOR.fields[0].TYPE_STRING, message.DESCRIPTOR.fields[0].TYPE_BYTES)
    enums = message.DESCRIPTOR.fields[0].TYPE_ENUM
    return [field.name for field in message.DESCRIPTOR.fields if field.type not in (*texts, enums)]


@functools.cache
def all_names():
    """Every metric that a room has a name for."""
    sources = [REPO / room for room in ROOMS]
    text = "".join(path.read_text() for source in sources for path in source.rglob("*.py"))
    return {word for word in text.replace('"', " ").split() if word.startswith("antefix_")}


def test_every_class_of_counters_is_known_here():
    found = {
        node.name
        for _, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and node.name.endswith(("Counters", "Counts", "Stats", "Totals"))
    }
    assert found - COPIES == {kind.__name__ for kind in SHOWN} - {"KindRecord"}


@pytest.mark.parametrize("kind", SHOWN, ids=lambda kind: kind.__module__ + "." + kind.__name__)
def test_every_field_of_counters_is_shown(kind):
    tables, otherwise = SHOWN[kind]
    rows = {field for table in tables for field in table}
    for field in dataclasses.fields(kind):
        name = otherwise.get(field.name, field.name)
        assert name == "text" or name in rows, f"{kind.__name__}.{field.name} is counted and not shown"


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.DESCRIPTOR.name)
def test_every_number_of_a_message_is_shown(message):
    known = all_names()
    for field in numbers_of(message):
        assert field in MESSAGES[message], f"{message.DESCRIPTOR.name}.{field} is told and not shown"
        name = MESSAGES[message][field]
        assert name is None or name in known


def test_every_attribute_that_is_counted_up_is_shown_or_is_state():
    known, found = all_names(), set()
    for path, tree in trees():
        for node in ast.walk(tree):
            if not isinstance(node, ast.AugAssign) or not isinstance(node.op, ast.Add):
                continue
            target = node.target.value if isinstance(node.target, ast.Subscript) else node.target
            public = isinstance(target, ast.Attribute) and target.attr.startswith(("num_", "_num_streams"))
            if public and path.parts[-2] not in ("model", "chat"):
                found.add(target.attr)
    missing = found - set(COUNTED) - STATE
    assert not missing, f"counted and neither shown nor known as state: {sorted(missing)}"
    assert set(COUNTED.values()) <= known


def test_a_table_shows_each_value_of_what_it_reads():
    counters = StoreCounters(errors=3, refused=5, short_reads=7, pool_refused=11)
    counters.by_kind, counters.refused_by_reason = {"Unavailable": 13}, {"full": 17}
    values = {sample.value for family in families(worker.STORE, counters) for sample in family.samples}
    assert values == {3, 5, 7, 11, 13, 17}


def test_the_engines_numbers_are_those_that_have_a_row(tmp_path):
    from antefix_kvstore.kvstore_config import KvStoreConfig

    engine = storage_engine.StorageEngine(KvStoreConfig(dir=str(tmp_path / "store"), budget_bytes=8 << 20))
    try:
        assert set(engine_stats.collect(engine).numbers) == set(kvstore.STATS)
    finally:
        engine.close()


def test_rooms_that_only_declare_are_importable():
    assert decode.scheduler_metrics and prefill.queue_metrics
