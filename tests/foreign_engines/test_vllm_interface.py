"""The tier and the stand-in agree with the interfaces of two vLLM wheels, which `record_vllm_interface.py` recorded."""

import dataclasses
import inspect
import json
from pathlib import Path

import pytest

from antefix_engines.vllm.aligned import POSITIONS
from tests.foreign_engines import vllm_stand_in

RECORD = json.loads(Path(__file__).with_name("vllm_interface.json").read_text())
# The fields of vLLM's configuration that the tier reads, by class.
READ = {
    "OffloadingConfig": ("groups", "worker_kv_bytes_per_block", "model", "cache", "parallel", "kv_cache_layout"),
    "OffloadingGroupConfig": ("group_id", "tokens_per_block", "layer_names"),
    "OffloadingModelConfig": ("name", "dtype"),
    "OffloadingCacheConfig": ("tokens_per_hash", "blocks_per_chunk"),
    "OffloadingParallelConfig": (
        *("world_size", "tp_size", "pp_size", "pcp_size", "dcp_size"),
        "is_parallelism_agnostic",
    ),
    "OffloadingKVEventsConfig": ("enable_kv_cache_events",),
    "TransferJob": ("job_id", "keys", "chunk_ids", "req_context"),
    "ReqContext": ("req_id", POSITIONS),
}


@pytest.fixture(scope="module", params=sorted(RECORD))
def interface(request):
    return RECORD[request.param]


@pytest.fixture(scope="module")
def vllm():
    with vllm_stand_in.stand_in() as modules:
        yield modules


def test_both_versions_are_there():
    assert sorted(RECORD) == ["0.32", "0.33"]


def test_every_method_that_vllm_asks_for_is_there_and_takes_what_it_passes(vllm, interface):
    base, tier = interface["SecondaryTierManager"], vllm.tier.AntefixTier
    for name in base["abstract"]:
        assert name in vars(tier), name
    for name, parameters in base["methods"].items():
        if name in vars(tier) and name != "__init__":
            # vLLM passes these arguments by position.
            mine = list(inspect.signature(getattr(tier, name)).parameters)
            assert len(mine) == len(parameters) or mine == parameters[1:], name


def test_the_constructor_takes_what_the_factory_passes(vllm, interface):
    passed = interface["SecondaryTierManager"]["methods"]["__init__"][1:]
    assert set(passed) <= set(inspect.signature(vllm.tier.AntefixTier.__init__).parameters)


@pytest.mark.parametrize("name", READ)
def test_vllm_has_what_the_tier_reads(interface, name):
    assert set(READ[name]) <= set(interface[name]["fields"])


def test_the_spec_has_what_ours_overrides_and_reads(interface):
    spec = interface["TieringOffloadingSpec"]
    assert "get_manager" in spec["methods"] and "_manager" in spec["attributes"]
    assert {"config", "kv_events_config", "replicated_layout"} <= set(interface["OffloadingSpec"]["attributes"])
    assert interface["TieringOffloadingManager"]["methods"]["lookup"][:3] == ["self", "key", "req_context"]


def test_the_stand_in_has_nothing_that_vllm_lacks(interface):
    for stand_in in (
        vllm_stand_in.ReqContext,
        vllm_stand_in.OffloadingEvent,
        vllm_stand_in.JobResult,
        vllm_stand_in.TransferJob,
    ):
        recorded = interface[stand_in.__name__]
        assert {each.name for each in dataclasses.fields(stand_in)} <= set(recorded["fields"]), stand_in
        own = {name: member for name, member in vars(stand_in).items() if inspect.isfunction(member) and name[0] != "_"}
        for name, member in own.items():
            assert list(inspect.signature(member).parameters) == recorded["methods"][name], name
    for stand_in in (vllm_stand_in.LookupResult, vllm_stand_in.Medium, vllm_stand_in.Locality):
        assert set(stand_in.__members__) <= set(interface[stand_in.__name__]["members"])
    counters = interface["OffloadingConnectorStats"]["methods"]
    mine = inspect.signature(vllm_stand_in.OffloadingConnectorStats.increase_counter).parameters
    assert list(mine) == counters["increase_counter"] and "is_empty" in counters
