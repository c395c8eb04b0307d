"""Records have the released kernels' rounding. Each code is compared with a search over all codes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from antefix.layout import BlockLayout, KVFormat, KVGeometry, LayerKind, PartKind, entry_record, key_record
from antefix.model.finite import FP8_SCALE_MAX
from antefix.model.quant import (
    decode,
    hadamard,
    pack_entries,
    pack_keys,
    round_entries,
    round_queries,
    unpack,
    unpack_entries,
    unpack_keys,
)


def layout(head_dim: int = 512, rope_dim: int = 64, indexer_dim: int = 128) -> BlockLayout:
    geometry = KVGeometry(
        layers=(LayerKind.CSA,),
        head_dim=head_dim,
        rope_dim=rope_dim,
        indexer_dim=indexer_dim,
        csa_ratio=4,
        hca_ratio=128,
        window=128,
    )
    return BlockLayout(geometry=geometry, kv_format=KVFormat.FP8)


def e4m3_value(code: int) -> float:
    """The value of an FP8 E4M3FN code by definition: bias 7, no infinities, 0x7F and 0xFF are NaN."""
    sign, exponent, mantissa = (-1.0 if code & 0x80 else 1.0), (code >> 3) & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def e2m1_value(code: int) -> float:
    """The value of an FP4 E2M1 code by definition: bias 1, no infinities, no NaN."""
    sign, exponent, mantissa = (-1.0 if code & 8 else 1.0), (code >> 1) & 3, code & 1
    return sign * (mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1))


E4M3 = [e4m3_value(code) for code in range(128)]
E2M1 = [e2m1_value(code) for code in range(8)]


def nearest_code(value: float, table: list[float], sign_bit: int) -> int:
    """The code of the nearest magnitude, or the even code of two equally near ones. Zeros keep their sign."""
    magnitude = abs(value)
    finite = [code for code, entry in enumerate(table) if not math.isnan(entry)]
    code = min(finite, key=lambda c: (abs(table[c] - magnitude), c & 1))
    return code | (sign_bit if math.copysign(1.0, value) < 0 else 0)


def scale_exponent(group: np.ndarray, floor: float, largest_code: float) -> int:
    """e of the scale 2^e = 2^ceil(log2(amax / largest code)). The quotient is in float32, as in the kernels."""
    amax = max(np.abs(group).max(), np.float32(floor))
    fraction, exponent = math.frexp(float(np.float32(amax) * np.float32(1 / largest_code)))
    return exponent - 1 if fraction == 0.5 else exponent


def entry_by_search(x: np.ndarray, plan: BlockLayout) -> bytes:
    geometry = plan.geometry
    codes, scales = bytearray(), bytearray()
    for start in range(0, geometry.nope_dim, 64):
        group = x[start : min(start + 64, geometry.nope_dim)]
        exponent = scale_exponent(group, 1e-4, 448.0)
        scaled = [float(v) / 2.0**exponent for v in group]
        codes += bytes(nearest_code(max(-448.0, min(448.0, v)), E4M3, 0x80) for v in scaled)
        scales.append(exponent + 127)
    rope = bytearray()
    for value in x[geometry.nope_dim :]:
        bits = int(np.float32(value).view(np.uint32))
        rope += int((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to_bytes(2, "little")
    record = entry_record(geometry, KVFormat.FP8)
    return bytes(codes + rope + scales).ljust(record.nbytes, b"\0")


def hadamard_by_definition(x: np.ndarray) -> np.ndarray:
    """Entry (i, j) of Sylvester's matrix is -1 to the power of the number of bits that i and j share."""
    dim = len(x)
    signs = np.array([[(-1.0) ** (i & j).bit_count() for j in range(dim)] for i in range(dim)])
    return signs @ x.astype(np.float64) / math.sqrt(dim)


def key_by_search(rotated: np.ndarray) -> bytes:
    codes: list[int] = []
    scales = bytearray()
    for start in range(0, len(rotated), 32):
        group = rotated[start : start + 32]
        exponent = scale_exponent(group, 6 * 2.0**-126, 6.0)
        codes += [nearest_code(max(-6.0, min(6.0, float(v) / 2.0**exponent)), E2M1, 8) for v in group]
        scales.append(exponent + 127)
    return bytes(low | high << 4 for low, high in zip(codes[::2], codes[1::2], strict=True)) + bytes(scales)


def nasty_rows(width: int, num: int, seed: int) -> np.ndarray:
    """Rows over many magnitudes, with exact halfway points, zeros of both signs and values at the codes' limits."""
    rng = np.random.default_rng(seed)
    rows = (rng.standard_normal((num, width)) * 10.0 ** rng.uniform(-6, 4, (num, 1))).astype(np.float32)
    halves = rng.integers(-16, 17, (num, width)) * np.float32(0.25)
    rows = np.where(rng.random((num, width)) < 0.2, halves, rows).astype(np.float32)
    rows[0] = 0.0
    rows[1, ::2] = -0.0
    rows[2, :8] = [448.0, -448.0, 447.0, 464.0, 3.5, -5.0, 1e-9, -1e-9]
    rows[3, 0] = np.nextafter(np.float32(448.0), np.float32(500.0))
    return rows


@pytest.mark.parametrize(("head_dim", "rope_dim"), [(512, 64), (96, 24), (80, 16), (32, 8), (16, 16)])
def test_entries_are_the_nearest_codes(head_dim: int, rope_dim: int) -> None:
    plan = layout(head_dim, rope_dim)
    rows = nasty_rows(head_dim, 24, head_dim)
    packed = pack_entries(torch.from_numpy(rows), plan)
    for row, record in zip(rows, packed.numpy(), strict=True):
        assert record.tobytes() == entry_by_search(row, plan)


@pytest.mark.parametrize("dim", [128, 64, 32, 16])
def test_keys_are_the_nearest_codes_of_the_rotated_values(dim: int) -> None:
    plan = layout(indexer_dim=dim)
    rows = nasty_rows(dim, 24, dim)
    rotated = hadamard(torch.from_numpy(rows)).numpy()
    for row, turned in zip(rows, rotated, strict=True):
        assert_allclose(turned, hadamard_by_definition(row), rtol=1e-5, atol=1e-5 * np.abs(row).max())
    packed = pack_keys(torch.from_numpy(rows), plan)
    for turned, record in zip(rotated, packed.numpy(), strict=True):
        assert record.tobytes() == key_by_search(turned)
    assert packed.shape[-1] == key_record(plan.geometry, KVFormat.FP8).nbytes


def test_every_code_of_both_formats_unpacks_to_its_value() -> None:
    plan = layout(64 + 2, 2, 32)
    finite = [code for code in range(256) if not math.isnan(e4m3_value(code))]
    for scale in (1, 105, 127, 140, 239):
        for start in range(0, len(finite), 64):
            codes = (finite[start : start + 64] + [0] * 64)[:64]
            record = torch.tensor([*codes, 0, 0, 0, 0, scale, 0, 0, 0], dtype=torch.uint8)
            want = [e4m3_value(code) * 2.0 ** (scale - 127) for code in codes]
            assert unpack_entries(record, plan).tolist()[:64] == want
        key = torch.tensor([low | low << 4 for low in range(16)] + [scale], dtype=torch.uint8)
        want = [e2m1_value(code) * 2.0 ** (scale - 127) for code in range(16) for _ in range(2)]
        assert unpack_keys(key, plan).tolist() == want


def test_checked_records_are_decoded_to_the_bits_of_unpack() -> None:
    """Every code with every scale that a checked record may have."""
    plan = layout(254 + 2, 2, 32)
    codes = torch.tensor([code for code in range(256) if not math.isnan(e4m3_value(code))], dtype=torch.uint8)
    scales = torch.arange(FP8_SCALE_MAX + 1, dtype=torch.uint8)[:, None]
    rope = torch.tensor([0x80, 0xC1, 0x01, 0x00], dtype=torch.uint8)
    entries = torch.cat((codes.expand(len(scales), -1), rope.expand(len(scales), -1), scales.expand(-1, 4)), dim=1)
    pairs = torch.arange(256, dtype=torch.uint8).view(16, 16)
    keys = torch.cat((pairs.repeat(len(scales), 1), scales.repeat_interleave(16, dim=0)), dim=1)
    for kind, records in ((PartKind.CSA_MAIN, entries), (PartKind.INDEXER_KEYS, keys)):
        want = unpack(kind, records, plan)
        found = decode(kind, records, plan, out=torch.full_like(want, torch.nan))
        assert torch.equal(found.view(torch.int32), want.view(torch.int32))


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32 - 1))
def test_rounded_values_are_fixed_points(seed: int) -> None:
    plan = layout(96, 24, 64)
    x = torch.from_numpy(nasty_rows(96, 8, seed))
    once = round_entries(x, plan)
    assert torch.equal(round_entries(once, plan), once)
    # Packing what was unpacked settles after one step: a group's scale halves where its largest value rounded to
    # half the range. From then on bytes are fixed points too, which is why window states give stable bytes.
    settled = pack_entries(once, plan)
    assert torch.equal(pack_entries(unpack_entries(settled, plan), plan), settled)


def test_a_record_packs_to_itself_unless_its_largest_value_fell_to_half_the_range() -> None:
    plan = layout(66, 2)
    x = torch.zeros(2, 66)
    x[0, 0], x[1, 0] = 300.0, 225.0
    packed = pack_entries(x, plan)
    again = pack_entries(unpack_entries(packed, plan), plan)
    assert torch.equal(again[0], packed[0])
    assert not torch.equal(again[1], packed[1])
    assert torch.equal(unpack_entries(again, plan), unpack_entries(packed, plan))


def test_the_rotation_keeps_inner_products() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 50, 128, generator=generator)
    torch.testing.assert_close((hadamard(a) * hadamard(b)).sum(-1), (a * b).sum(-1), rtol=1e-4, atol=1e-4)


def test_queries_are_rounded_like_keys() -> None:
    plan = layout(indexer_dim=64)
    q = torch.from_numpy(nasty_rows(64, 12, 5))
    assert torch.equal(round_queries(q, plan), unpack_keys(pack_keys(q, plan), plan))


@pytest.mark.parametrize("kv_format", [KVFormat.FLOAT32, KVFormat.FLOAT64])
def test_float_formats_store_plain_floats(kv_format: KVFormat) -> None:
    plan = BlockLayout(geometry=layout().geometry, kv_format=kv_format)
    dtype = torch.float64 if kv_format is KVFormat.FLOAT64 else torch.float32
    x = torch.randn(3, 5, 512, dtype=dtype)
    packed = pack_entries(x, plan)
    assert packed.numpy().tobytes() == x.numpy().tobytes()
    assert torch.equal(unpack_entries(packed, plan), x)
    keys = torch.randn(7, 128, dtype=dtype)
    assert torch.equal(unpack_keys(pack_keys(keys, plan), plan), keys)
    assert round_queries(keys, plan) is keys
