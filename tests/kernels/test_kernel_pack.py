"""Packing kernels against float64 oracles: equal bytes if only rounding matters, else a bound on the relative norm."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl

from antefix_kernels import gather, pack
from antefix_kernels import torch_reference as reference
from antefix_kernels.number_formats import EntryFormat, KeyFormat
from antefix_kernels.pack_kernels import pool_kernel
from antefix_kernels.rounding import e4m3_code

# (head_dim, rope_dim): V4's, a small one, one whose last scale group is partial, one not a power of two.
ENTRY_DIMS = [(512, 64), (32, 8), (112, 16), (96, 32)]


def make_pool(num_blocks: int, entries: int, nbytes: int, device: torch.device, gap: int = 24) -> torch.Tensor:
    """Records in blocks with other bytes between them, poisoned with 0xFF (NaN codes and scales)."""
    rows = torch.full((num_blocks, entries * nbytes + gap), 0xFF, dtype=torch.uint8, device=device)
    return rows[:, 16 : 16 + entries * nbytes].unflatten(1, (entries, nbytes))


def rel_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def shuffled_slots(count: int, pool: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    return torch.randperm(pool.shape[0] * pool.shape[1], generator=draw, device=draw.device)[:count].int()


def make_norm(rows: int, dim: int, rope_dim: int, draw: torch.Generator) -> pack.Norm:
    angle = torch.rand(rows, rope_dim // 2, generator=draw, device=draw.device) * 6.28
    weight = torch.rand(dim, generator=draw, device=draw.device) + 0.5
    return pack.Norm(weight=weight, cos=angle.cos(), sin=angle.sin(), eps=1e-6)


def finish(x: torch.Tensor, norm: pack.Norm) -> torch.Tensor:
    return reference.rope(reference.rms_norm(x, norm.weight, norm.eps), norm.cos, norm.sin)


@pytest.mark.parametrize(("head_dim", "rope_dim"), ENTRY_DIMS)
def test_rounding_equals_the_oracle_to_the_byte(head_dim, rope_dim, device, draw):
    fmt = EntryFormat(head_dim=head_dim, rope_dim=rope_dim)
    x = torch.randn(37, head_dim, generator=draw, device=device)
    x *= torch.exp2(torch.randint(-20, 12, (37, 1), generator=draw, device=device).float())
    # Values with ties, subnormal codes, the saturation point, the floor of a scale, and signed zeros.
    x[0], x[1] = 0.0, -0.0
    x[2, ::2] = 448.0
    x[3, :8] = torch.tensor([448.0, 17.0, 19.0, -17.0, 2**-9, 1.5 * 2**-9, 2.5 * 2**-9, -(2**-10)], device=device)
    pool = make_pool(5, 9, fmt.nbytes, device)
    slots = shuffled_slots(37, pool, draw)
    pack.pack_entries(x, rope_dim, pack.Target(records=pool, slots=slots))
    got = pool.reshape(-1, fmt.nbytes)[slots.long()]
    assert torch.equal(got, reference.pack_entries(x.double(), rope_dim))
    untouched = torch.ones(45, dtype=torch.bool, device=device).index_fill(0, slots.long(), False)
    assert (pool.reshape(-1, fmt.nbytes)[untouched] == 0xFF).all()


@triton.jit
def count_differences(found, start, N: tl.constexpr):
    """Add to found [2] how many float32 with bits start + 0, 1, .. are at most 448, and how many codes differ."""
    bits = start + tl.program_id(0) * N + tl.arange(0, N)
    x = bits.to(tl.float32, bitcast=True)
    is_code = tl.abs(x) <= 448.0
    differs = is_code & (x.to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.int32) != e4m3_code(x))
    tl.atomic_add(found, tl.sum(is_code.to(tl.int64), 0))
    tl.atomic_add(found + 1, tl.sum(differs.to(tl.int64), 0))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
def test_the_instruction_rounds_every_number_as_integer_arithmetic_does():
    found = torch.zeros(2, dtype=torch.int64, device="cuda")
    for start in range(-(2**31), 2**31, 2**28):
        count_differences[(2**28 // 4096,)](found, start, N=4096)
    # 448 has the bits 0x43E00000.
    assert found.tolist() == [2 * (0x43E00000 + 1), 0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_group_is_added_up_in_a_fixed_order(dtype):
    # 64 columns of 128 rows on 8 warps, as earlier versions added: entries of a pool must not depend on the version.
    kv = torch.randn(128, 512, device="cuda").to(dtype)
    zeros = torch.zeros(128, 512, device="cuda")
    ids = torch.zeros(1, dtype=torch.int32, device="cuda")
    got = torch.empty(1, 512, device="cuda")
    pool_kernel[(16,)](kv, zeros.to(dtype), zeros, ids, ids, got, 512, M=128, DIM=512, C=32, ROWS=128, num_warps=4,
                       enable_fp_fusion=False)  # fmt: skip
    threads = 16 if dtype is torch.float32 else 32
    want = torch.zeros(threads, 512, device="cuda")
    for rows in kv.float().split(threads):
        want = want + rows
    # Within a warp neighbours first, then the warps: the farther half of what is left each time.
    parts = want.view(8, threads // 8, 512)
    while parts.shape[1] > 1:
        parts = parts[:, : parts.shape[1] // 2] + parts[:, parts.shape[1] // 2 :]
    while parts.shape[0] > 1:
        parts = parts[: parts.shape[0] // 2] + parts[parts.shape[0] // 2 :]
    assert torch.equal(got[0], parts[0, 0] / 128)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("head_dim", "rope_dim"), ENTRY_DIMS)
def test_window_pack_norms_turns_and_rounds(head_dim, rope_dim, dtype, device, draw):
    fmt = EntryFormat(head_dim=head_dim, rope_dim=rope_dim)
    wide = torch.randn(19, head_dim + 8, generator=draw, device=device).to(dtype) * 3
    rows = wide[:, 8:] if dtype is torch.float32 else wide[:, :head_dim]
    norm = make_norm(19, head_dim, rope_dim, draw)
    pool = make_pool(3, 7, fmt.nbytes, device)
    slots = shuffled_slots(19, pool, draw)
    slots[4] = -1
    pack.window_pack(rows, norm, pack.Target(records=pool, slots=slots))
    kept = slots >= 0
    got = pool.reshape(-1, fmt.nbytes)[slots[kept].long()]
    want = reference.pack_entries(finish(rows.double(), norm), rope_dim)[kept]
    # The only difference: float32 sometimes rounds a value to the other side of a boundary than float64.
    assert (got != want).float().mean() < 0.01
    assert rel_error(*(reference.read_entries(r, head_dim, rope_dim) for r in (got, want))) < 5e-3


@pytest.mark.parametrize(("head_dim", "rope_dim", "m"), [(512, 64, 128), (96, 32, 7), (32, 8, 16)])
def test_hca_groups_are_pooled_over_all_their_rows(head_dim, rope_dim, m, device, draw):
    fmt = EntryFormat(head_dim=head_dim, rope_dim=rope_dim)
    kv = torch.randn(3 * m + 5, head_dim, generator=draw, device=device)
    gate = torch.randn(3 * m + 5, head_dim, generator=draw, device=device) * 3
    bias = torch.randn(m, head_dim, generator=draw, device=device)
    first = torch.tensor([5, 5 + 2 * m, m + 5], dtype=torch.int32, device=device)
    norm = make_norm(3, head_dim, rope_dim, draw)
    pool = make_pool(3, 1, fmt.nbytes, device)
    slots = shuffled_slots(3, pool, draw)
    pack.pack_hca(kv, gate, bias, first, norm, pack.Target(records=pool, slots=slots))
    pooled = reference.pool_groups(kv.double(), gate.double(), bias, first)
    want = reference.read_entries(reference.pack_entries(finish(pooled, norm), rope_dim), head_dim, rope_dim)
    got = reference.read_entries(pool.reshape(-1, fmt.nbytes)[slots.long()], head_dim, rope_dim)
    assert rel_error(got, want) < 5e-3


@pytest.mark.parametrize(
    ("keys", "dim", "rope_dim", "m"),
    [(False, 512, 64, 4), (False, 96, 32, 3), (True, 128, 64, 4), (True, 32, 8, 3)],
)
def test_csa_groups_overlap_the_group_before(keys, dim, rope_dim, m, device, draw):
    nbytes = KeyFormat(dim=dim).nbytes if keys else EntryFormat(head_dim=dim, rope_dim=rope_dim).nbytes
    groups = 6
    dtype = torch.bfloat16 if keys else torch.float32
    kv = torch.randn(groups * m, 2 * dim, generator=draw, device=device).to(dtype)
    gate = (torch.randn(groups * m, 2 * dim, generator=draw, device=device) * 2).to(dtype)
    bias = torch.randn(m, 2 * dim, generator=draw, device=device)
    first = torch.arange(groups, dtype=torch.int32, device=device) * m
    prior = first - m
    prior[0], prior[3] = -1, -2  # a sequence's first group, and a group whose predecessor is in the overlap state
    state_kv = torch.randn(2, m, dim, generator=draw, device=device)
    state_gate = torch.randn(2, m, dim, generator=draw, device=device)
    state_kv[0], state_gate[0] = float("nan"), float("-inf")
    norm = make_norm(groups, dim, rope_dim, draw)
    pool = make_pool(2, 4, nbytes, device)
    slots = shuffled_slots(groups, pool, draw)
    packer = pack.pack_keys if keys else pack.pack_csa
    packer(
        kv,
        gate,
        bias,
        first,
        pack.Overlap(prior_rows=prior, kv=state_kv, gate=state_gate),
        norm,
        pack.Target(records=pool, slots=slots),
    )
    state_kv[0] = 0.0
    pooled = reference.pool_overlapped(kv.double(), gate.double(), bias, first, prior, state_kv, state_gate)
    x = finish(pooled, norm)
    got = pool.reshape(-1, nbytes)[slots.long()]
    if keys:
        want = reference.pack_keys(reference.hadamard(x))
        values = [reference.read_keys(r, dim) for r in (got, want)]
    else:
        want = reference.pack_entries(x, rope_dim)
        values = [reference.read_entries(r, dim, rope_dim) for r in (got, want)]
    assert (got != want).float().mean() < 0.01
    # A key's value that crosses a rounding boundary moves by up to a third of itself, an entry's by a sixteenth.
    assert rel_error(*values) < (3e-2 if keys else 5e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("head_dim", "rope_dim"), ENTRY_DIMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unpacking_entries_is_exact(head_dim, rope_dim, dtype, device, draw):
    fmt = EntryFormat(head_dim=head_dim, rope_dim=rope_dim)
    pool = make_pool(4, 6, fmt.nbytes, device)
    x = torch.randn(24, head_dim, generator=draw, device=device) * 5
    pool.copy_(reference.pack_entries(x.double(), rope_dim).view(4, 6, -1))
    slots = torch.randint(24, (31,), generator=draw, device=device).int()
    out = torch.full((31, head_dim + 8), float("nan"), dtype=dtype, device=device)[:, :head_dim]
    gather.unpack_entries(pool, slots, out, rope_dim)
    want = reference.read_entries(pool.reshape(24, -1)[slots.long()], head_dim, rope_dim)
    assert torch.equal(out.double(), want)


@pytest.mark.parametrize("dim", [128, 32, 16])
def test_unpacking_keys_is_exact(dim, device, draw):
    nbytes = KeyFormat(dim=dim).nbytes
    pool = make_pool(3, 5, nbytes, device)
    x = torch.randn(15, dim, generator=draw, device=device) * torch.logspace(-3, 3, 15, device=device).unsqueeze(1)
    pool.copy_(reference.pack_keys(x.double()).view(3, 5, -1))
    slots = torch.randint(15, (23,), generator=draw, device=device).int()
    out = torch.full((23, dim), float("nan"), device=device)
    gather.unpack_keys(pool, slots, out)
    assert torch.equal(out.double(), reference.read_keys(pool.reshape(15, -1)[slots.long()], dim))


@pytest.mark.parametrize("nbytes", [584, 68, 9])
def test_copied_records_keep_every_byte_and_touch_no_other(nbytes, device, draw):
    source = make_pool(4, 8, nbytes, device, gap=32 - 8 * nbytes % 8)
    source.copy_(torch.randint(256, source.shape, generator=draw, device=device).to(torch.uint8))
    dest = make_pool(1, 40, nbytes, device, gap=40)
    taken, put = shuffled_slots(21, source, draw), shuffled_slots(21, dest, draw)
    gather.copy_records(source, taken, dest, put)
    want = torch.full_like(dest, 0xFF)
    want.view(-1, nbytes)[put.long()] = source.reshape(-1, nbytes)[taken.long()]
    assert torch.equal(dest, want)


def test_wrong_operands_are_refused(device, draw):
    pool = make_pool(2, 2, 584, device)
    slots = torch.zeros(2, dtype=torch.int32, device=device)
    x = torch.zeros(2, 512, device=device)
    with pytest.raises(ValueError, match="records must be"):
        pack.pack_entries(x, 64, pack.Target(records=pool[..., :580], slots=slots))
    with pytest.raises(ValueError, match="slots must be"):
        pack.pack_entries(x, 64, pack.Target(records=pool, slots=slots.long()))
    with pytest.raises(ValueError, match="last dim contiguous"):
        pack.pack_entries(torch.zeros(512, 2, device=device).t(), 64, pack.Target(records=pool, slots=slots))
    with pytest.raises(ValueError, match="even addresses"):
        odd = torch.zeros(2, 1169, dtype=torch.uint8, device=device)[:, 1:].unflatten(1, (2, 584))
        pack.pack_entries(x, 64, pack.Target(records=odd, slots=slots))


def test_entries_are_written_to_several_places(device, draw):
    values, nbytes = torch.randn(3, 96, generator=draw, device=device), EntryFormat(head_dim=96, rope_dim=32).nbytes
    one_by_one, together = (make_pool(1, 8, nbytes, device) for _ in range(2))
    slots = torch.tensor([[5, 0, 3], [1, 7, 2]], dtype=torch.int32, device=device)
    for part in slots:
        pack.pack_entries(values, 32, pack.Target(records=one_by_one, slots=part))
    pack.pack_entries(values, 32, pack.Target(records=together, slots=slots.flatten()))
    assert torch.equal(together, one_by_one)
    # No slot at all is refused too, and slots without values, because nothing would be written.
    for given, places in ((values, slots[0, :2]), (values, slots[0, :0]), (values[:0], slots[0])):
        with pytest.raises(ValueError, match="no multiple"):
            pack.pack_entries(given, 32, pack.Target(records=together, slots=places))
    pack.pack_entries(values[:0], 32, pack.Target(records=together, slots=slots[0, :0]))
    assert torch.equal(together, one_by_one)
