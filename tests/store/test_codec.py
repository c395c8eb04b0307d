"""Compression is lossless, is kept only if it saves bytes, and checks all input when it decodes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from antefix.errors import BlockCorrupt
from antefix.layout import BlockLayout, KVFormat, KVGeometry, LayerKind
from antefix.store_files import codec

GEOMETRY = KVGeometry(
    layers=(LayerKind.WINDOW, LayerKind.CSA, LayerKind.HCA, LayerKind.CSA),
    head_dim=96,
    rope_dim=32,
    indexer_dim=32,
    csa_ratio=4,
    hca_ratio=64,
    window=16,
)

parts = st.builds(
    codec.PlanePart,
    num_rows=st.integers(1, 9),
    fields=st.lists(
        st.tuples(st.integers(1, 6), st.sampled_from([1, 2, 4, 8])).map(lambda f: (f[0] * f[1], f[1])),
        min_size=1,
        max_size=3,
    ).map(tuple),
)
plans = st.builds(codec.PlanePlan, parts=st.lists(parts, min_size=1, max_size=6).map(tuple))


@settings(max_examples=100, deadline=None)
@given(plan=plans, seed=st.integers(0, 99))
def test_any_plan_is_undone_exactly(plan: codec.PlanePlan, seed: int) -> None:
    # Few different symbols, so that coding saves bytes.
    payload = (
        np.random.default_rng(seed).choice([0, 0, 0, 0, 0, 0, 0, 3], plan.payload_bytes).astype(np.uint8).tobytes()
    )
    coded = codec.encode(payload, plan)
    if coded is not None:
        out = bytearray(len(payload))
        codec.decode(coded, memoryview(out))
        assert out == payload


@pytest.mark.parametrize("kv_format", list(KVFormat))
def test_a_block_of_every_format_comes_back(kv_format: KVFormat) -> None:
    layout = BlockLayout(geometry=GEOMETRY, kv_format=kv_format)
    plan = codec.plan_of_block(layout)
    assert plan.payload_bytes == layout.block_bytes
    # Bytes with a narrow bell-shaped distribution, because zstd learns little from such a small block.
    rng = np.random.default_rng(7)
    payload = np.clip(rng.normal(128, 2, layout.block_bytes), 0, 255).astype(np.uint8).tobytes()
    coded = codec.encode(payload, plan)
    assert coded is not None
    assert len(coded) < 0.95 * len(payload)
    out = bytearray(len(payload))
    codec.decode(coded, memoryview(out))
    assert out == payload


@pytest.mark.parametrize("kv_format", list(KVFormat))
def test_the_checkpoint_plan_covers_a_checkpoint(kv_format: KVFormat) -> None:
    layout = BlockLayout(geometry=GEOMETRY, kv_format=kv_format)
    assert codec.plan_of_checkpoint(layout).payload_bytes == layout.checkpoint_bytes


def test_noise_is_stored_raw() -> None:
    plan = codec.PlanePlan(parts=(codec.PlanePart(num_rows=64, fields=((64, 2),)),))
    assert codec.encode(np.random.default_rng(0).bytes(4096), plan) is None


def test_a_payload_of_another_size_is_stored_raw() -> None:
    plan = codec.PlanePlan(parts=(codec.PlanePart(num_rows=64, fields=((64, 2),)),))
    assert codec.encode(bytes(4095), plan) is None


def test_damaged_codes_are_errors_not_crashes() -> None:
    plan = codec.PlanePlan(parts=(codec.PlanePart(num_rows=64, fields=((64, 2), (16, 1))),))
    coded = codec.encode(bytes(plan.payload_bytes), plan)
    assert coded is not None
    for offset in range(len(coded)):
        damaged = bytearray(coded)
        damaged[offset] ^= 0xFF
        try:
            codec.decode(bytes(damaged), memoryview(bytearray(plan.payload_bytes)))
        except BlockCorrupt:
            continue
    for length in range(len(coded)):
        with pytest.raises(BlockCorrupt):
            codec.decode(coded[:length], memoryview(bytearray(plan.payload_bytes)))
