"""Geometry and sizes in bytes: the published sizes, and configs in every spelling."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from antefix.errors import InvalidRequest
from antefix.layout import BlockLayout, KVFormat, KVGeometry, LayerKind, entry_record, key_record

CSA, HCA, WINDOW = LayerKind.CSA, LayerKind.HCA, LayerKind.WINDOW
V4 = {"head_dim": 512, "rope_dim": 64, "indexer_dim": 128, "csa_ratio": 4, "hca_ratio": 128, "window": 128}
FLASH = KVGeometry(layers=(WINDOW, WINDOW, *(CSA if i % 2 == 0 else HCA for i in range(41))), **V4)
PRO = KVGeometry(layers=(HCA, HCA, *(CSA if i % 2 == 0 else HCA for i in range(59))), **V4)


@pytest.mark.parametrize(
    ("geometry", "block_bytes", "window_megabytes", "replay_tokens"),
    [(FLASH, 449_824, 3.21, 5_504), (PRO, 644_024, 4.56, 7_808)],
)
def test_v4_has_the_published_sizes(geometry, block_bytes, window_megabytes, replay_tokens):
    layout = BlockLayout(geometry=geometry, kv_format=KVFormat.FP8)
    assert layout.block_bytes == block_bytes
    assert round(layout.window_bytes / 1e6, 2) == window_megabytes
    assert geometry.replay_tokens == replay_tokens
    assert geometry.block_size == 128


def test_v4_records_are_584_and_68_bytes():
    assert entry_record(FLASH, KVFormat.FP8).nbytes == 584
    assert key_record(FLASH, KVFormat.FP8).nbytes == 68


geometries = st.builds(
    KVGeometry,
    layers=st.lists(st.sampled_from(list(LayerKind)), min_size=1, max_size=6).map(tuple),
    head_dim=st.sampled_from([16, 64, 96, 512]),
    rope_dim=st.sampled_from([2, 8, 16]),
    indexer_dim=st.sampled_from([16, 32, 128]),
    csa_ratio=st.integers(1, 8),
    hca_ratio=st.integers(1, 32),
    window=st.integers(1, 200),
)


@given(geometry=geometries, kv_format=st.sampled_from(list(KVFormat)))
def test_parts_fill_the_block_without_gap_or_overlap(geometry, kv_format):
    layout = BlockLayout(geometry=geometry, kv_format=kv_format)
    offset = 0
    for part in layout.parts:
        assert part.offset == offset
        assert sum(field.nbytes for field in part.record.fields) == part.record.nbytes
        offset += part.nbytes
    # Stores accept no empty payload, so a block without global KV has one byte.
    assert max(offset, 1) == layout.block_bytes
    assert geometry.block_size == math.lcm(geometry.csa_ratio, geometry.hca_ratio)


def test_released_config_spellings_mean_the_same():
    modern = {
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128},
    }
    legacy = {"num_hidden_layers": 3, "compress_ratios": [0, 4, 128, 0], "qk_rope_head_dim": 64}
    assert KVGeometry.from_config(modern) == KVGeometry.from_config(legacy)


def test_a_config_without_a_plan_gets_the_default_one():
    assert KVGeometry.from_config({"num_hidden_layers": 5}).layers == (HCA, HCA, HCA, CSA, HCA)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama"},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": 2, "layer_types": ["sliding_attention"]},
        {"num_hidden_layers": 1, "layer_types": ["full_attention"]},
        {"num_hidden_layers": 1, "compress_ratios": [7]},
        {"head_dim": "wide"},
        {"sliding_window": -1},
        {"head_dim": 64, "qk_rope_head_dim": 3},
    ],
)
def test_a_config_that_makes_no_sense_is_refused(config):
    with pytest.raises(InvalidRequest):
        KVGeometry.from_config(config)


def test_digest_separates_geometries():
    digests = {KVGeometry.from_config({"num_hidden_layers": n}).digest() for n in range(1, 9)}
    assert len(digests) == 8
