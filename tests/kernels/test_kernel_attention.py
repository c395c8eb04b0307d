"""Attention kernels against the float64 oracle: selected and all entries, windows that wrap, splits, odd sizes."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from antefix_kernels import (
    decode_attention as attention,
)
from antefix_kernels import (
    operands,
)
from antefix_kernels import (
    prefill_attention as prefill,
)
from antefix_kernels import (
    torch_reference as reference,
)
from antefix_kernels.number_formats import EntryFormat


class Case:
    """A random layer: a pool with poisoned gaps, tables into it, a window ring, queries, and the decoded values."""

    def __init__(self, draw, *, sequences, queries, heads, dims, blocks, entries, ring):
        self.device, self.sequences, self.queries = draw.device, sequences, queries
        head_dim, self.rope_dim = dims
        self.fmt = EntryFormat(head_dim=head_dim, rope_dim=self.rope_dim)
        total = sequences * queries

        def rand(*shape):
            return torch.randn(*shape, generator=draw, device=draw.device)

        def randint(low, high, *shape):
            return torch.randint(low, high, shape, generator=draw, device=draw.device).int()

        num_blocks = sequences * blocks + 2
        self.pool = self._records(rand(num_blocks, entries, head_dim))
        self.ring = self._records(rand(sequences, ring, head_dim))
        tables = torch.randperm(num_blocks, generator=draw, device=draw.device)[: sequences * blocks]
        self.table = tables.int().view(sequences, blocks)
        self.entries = entries
        self.q = rand(total, heads, head_dim + 16).half()[..., 8 : 8 + head_dim]
        angle = rand(total, self.rope_dim // 2)
        self.heads = operands.Heads(sinks=rand(heads), scale=head_dim**-0.5, cos=angle.cos(), sin=angle.sin())
        self.window = operands.Window(
            records=self.ring, firsts=randint(0, ring, total), counts=randint(0, ring + 1, total)
        )
        self.lens = randint(0, blocks * entries + 1, total)
        self.lens[0], self.window.counts[0] = 0, 0  # a query that sees nothing but its sink
        self.out = torch.full((total, heads, head_dim + 8), float("nan"), dtype=torch.bfloat16, device=draw.device)

    def _records(self, x: torch.Tensor) -> torch.Tensor:
        x = x * torch.tensor([0.1, 1.0, 8.0], device=x.device).repeat(x.shape[-1])[: x.shape[-1]]
        rows = torch.full((x.shape[0], x.shape[1] * self.fmt.nbytes + 40), 0xFF, dtype=torch.uint8, device=x.device)
        records = rows[:, 24 : 24 + x.shape[1] * self.fmt.nbytes].unflatten(1, (x.shape[1], self.fmt.nbytes))
        return records.copy_(reference.pack_entries(x.double(), self.rope_dim))

    def values(self, records: torch.Tensor) -> torch.Tensor:
        return reference.read_entries(records, self.fmt.head_dim, self.rope_dim)

    def want(self, picked: torch.Tensor) -> torch.Tensor:
        """The oracle's output over the window and the entries `picked` [T, N] bool of each query's sequence."""
        sequence = torch.arange(self.q.shape[0], device=self.device) // self.queries
        compressed = self.values(self.pool[self.table.long()].flatten(1, 2))[sequence]
        window = self.values(self.ring)[sequence]
        size = self.ring.shape[1]
        age = (torch.arange(size, device=self.device) - self.window.firsts.unsqueeze(1)) % size
        mask = torch.cat([picked, age < self.window.counts.unsqueeze(1)], 1)
        h = self.heads
        kv = torch.cat([compressed, window], 1)
        return reference.attention(self.q.double(), kv, mask, h.sinks, h.cos, h.sin, h.scale)

    def error(self, want: torch.Tensor) -> float:
        got = self.out[..., : self.fmt.head_dim]
        assert torch.isnan(self.out[..., self.fmt.head_dim :]).all(), "bytes beyond the output were written"
        return float((got.double() - want).norm() / want.norm())


SHAPES = {
    "v4": {"heads": 64, "dims": (512, 64), "blocks": 3, "entries": 32, "ring": 128},
    "odd": {"heads": 5, "dims": (112, 16), "blocks": 5, "entries": 7, "ring": 19},
    "small": {"heads": 33, "dims": (32, 8), "blocks": 9, "entries": 8, "ring": 16},
}
# Outputs are BF16. The bound is two half units in BF16's last place.
TOLERANCE = 5e-3


@pytest.mark.slow
@pytest.mark.parametrize("splits", [1, 3, None])
@pytest.mark.parametrize("shape", list(SHAPES))
def test_sparse_attention_equals_the_oracle(shape, splits, device, draw):
    case = Case(draw, sequences=2, queries=2, **SHAPES[shape])
    size = case.table.shape[1] * case.entries
    k = size // 2 + 1
    order = torch.rand(4, size, generator=draw, device=device).argsort(1)[:, :k]
    picked = case.lens.clamp(max=k)
    kept = torch.arange(k, device=device) < picked.unsqueeze(1)
    sequence = torch.arange(4, device=device).unsqueeze(1) // 2
    slots = case.table[sequence, order // case.entries] * case.entries + order % case.entries
    slots = torch.where(kept, slots, -1).int()
    seen = torch.zeros(4, size, dtype=torch.bool, device=device).scatter(1, order, kept)
    out = case.out[..., : case.fmt.head_dim]
    attention.sparse_attention(case.q, case.pool, slots, picked, case.window, case.heads, out, splits=splits)
    assert case.error(case.want(seen)) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("shape", list(SHAPES))
def test_hca_attention_equals_the_oracle(shape, splits, device, draw):
    case = Case(draw, sequences=3, queries=1, **SHAPES[shape])
    size = case.table.shape[1] * case.entries
    case.lens[1] = size
    out = case.out[..., : case.fmt.head_dim]
    attention.hca_attention(case.q, case.pool, case.table, case.lens, size, case.window, case.heads, out, splits=splits)
    picked = torch.arange(size, device=device) < case.lens.unsqueeze(1)
    assert case.error(case.want(picked)) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("selected", [False, True])
@pytest.mark.parametrize("shape", list(SHAPES))
def test_prefill_attention_equals_the_oracle(shape, selected, device, draw):
    case = Case(draw, sequences=1, queries=3, **SHAPES[shape])
    size = case.table.shape[1] * case.entries
    values = prefill.decode_sequences(case.pool, case.table, size, case.ring, case.rope_dim, case.fmt.head_dim)
    out = case.out[..., : case.fmt.head_dim]
    if selected:
        k = size // 2 + 1
        order = torch.rand(3, size, generator=draw, device=device).argsort(1)[:, :k]
        lens = case.lens.clamp(max=k)
        kept = torch.arange(k, device=device) < lens.unsqueeze(1)
        seen = torch.zeros(3, size, dtype=torch.bool, device=device).scatter(1, order, kept)
        indices = torch.where(kept, order, -1).int()
        prefill.prefill_attention(case.q, values, indices, lens, case.window, case.heads, out)
    else:
        seen = torch.arange(size, device=device) < case.lens.unsqueeze(1)
        prefill.prefill_attention(case.q, values, None, case.lens, case.window, case.heads, out)
    assert case.error(case.want(seen)) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("splits", [1, 2])
def test_float32_outputs_are_not_rounded(splits, device, draw):
    case = Case(draw, sequences=3, queries=1, **SHAPES["small"])
    case.out = case.out.float()
    out = case.out[..., : case.fmt.head_dim]
    attention.hca_attention(case.q, case.pool, case.table, case.lens, 72, case.window, case.heads, out, splits=splits)
    # The remaining error comes from probabilities in FP16.
    assert case.error(case.want(torch.arange(72, device=device) < case.lens.unsqueeze(1))) < 1e-3


def test_window_attention_alone(device, draw):
    case = Case(draw, sequences=1, queries=3, **SHAPES["odd"])
    none, zero = torch.empty(3, 0, dtype=torch.int32, device=device), torch.zeros(3, dtype=torch.int32, device=device)
    out = case.out[..., : case.fmt.head_dim]
    attention.sparse_attention(case.q, case.pool, none, zero, case.window, case.heads, out)
    size = case.table.shape[1] * case.entries
    assert case.error(case.want(torch.zeros(3, size, dtype=torch.bool, device=device))) < TOLERANCE


def test_a_query_that_sees_nothing_gives_zero(device, draw):
    case = Case(draw, sequences=2, queries=1, **SHAPES["small"])
    out = case.out[..., : case.fmt.head_dim]
    attention.hca_attention(case.q, case.pool, case.table, case.lens, 72, case.window, case.heads, out, splits=2)
    assert (out[0] == 0).all()


def test_wrong_operands_are_refused(device, draw):
    case = Case(draw, sequences=2, queries=1, **SHAPES["small"])
    slots = torch.zeros(2, 4, dtype=torch.int32, device=device)
    out = case.out[..., :32]
    picked = torch.full((2,), 4, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="float16"):
        attention.sparse_attention(case.q.float(), case.pool, slots, picked, case.window, case.heads, out)
    with pytest.raises(ValueError, match="int32"):
        attention.sparse_attention(case.q, case.pool, slots.long(), picked, case.window, case.heads, out)
    with pytest.raises(ValueError, match="exceeds"):
        attention.hca_attention(case.q, case.pool, case.table, case.lens, 73, case.window, case.heads, out)
    with pytest.raises(ValueError, match="records must be"):
        attention.sparse_attention(case.q, case.pool[..., :-1], slots, picked, case.window, case.heads, out)


@pytest.mark.slow
def test_named_splits_give_a_query_the_same_bits_in_any_batch_and_with_any_table(device, draw):
    case = Case(draw, sequences=3, queries=1, heads=40, dims=(512, 64), blocks=33, entries=32, ring=128)
    size = case.table.shape[1] * case.entries
    case.lens[1], case.lens[2] = size, 530
    out = case.out[..., :512]
    attention.hca_attention(case.q, case.pool, case.table, case.lens, size, case.window, case.heads, out, splits=4)
    assert case.error(case.want(torch.arange(size, device=device) < case.lens.unsqueeze(1))) < TOLERANCE
    w, h = case.window, case.heads
    alone = torch.full_like(out[2:], float("nan"))
    attention.hca_attention(
        case.q[2:],
        case.pool,
        case.table[2:, :17],
        case.lens[2:],
        17 * 32,
        operands.Window(records=w.records[2:], firsts=w.firsts[2:], counts=w.counts[2:]),
        operands.Heads(sinks=h.sinks, scale=h.scale, cos=h.cos[2:], sin=h.sin[2:]),
        alone,
        splits=4,
    )
    assert torch.equal(alone, out[2:])


def test_heads_beyond_a_program_are_attended_to_as_well(device, draw):
    case = Case(draw, sequences=1, queries=2, heads=72, dims=(512, 64), blocks=2, entries=32, ring=128)
    out = case.out[..., :512]
    attention.hca_attention(case.q, case.pool, case.table, case.lens, 64, case.window, case.heads, out, splits=1)
    assert case.error(case.want(torch.arange(64, device=device) < case.lens.unsqueeze(1))) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32])
def test_long_lists_of_picked_entries_take_many_tiles(kind, device, draw):
    case = Case(draw, sequences=2, queries=1, heads=64, dims=(512, 64), blocks=40, entries=32, ring=128)
    case.out = case.out.to(kind)
    size = case.table.shape[1] * case.entries
    k = size - 7
    order = torch.rand(2, size, generator=draw, device=device).argsort(1)[:, :k]
    picked = torch.tensor([k, 641], dtype=torch.int32, device=device)
    kept = torch.arange(k, device=device) < picked.unsqueeze(1)
    slots = case.table[torch.arange(2, device=device).unsqueeze(1), order // 32] * 32 + order % 32
    slots = torch.where(kept, slots, -1).int()
    seen = torch.zeros(2, size, dtype=torch.bool, device=device).scatter(1, order, kept)
    out = case.out[..., :512]
    attention.sparse_attention(case.q, case.pool, slots, picked, case.window, case.heads, out, splits=1)
    assert case.error(case.want(seen)) < (TOLERANCE if kind is torch.bfloat16 else 1e-3)


@pytest.mark.parametrize("splits", [2, 5, 9])
def test_more_parts_than_are_merged_at_once_or_fewer(splits, device, draw):
    case = Case(draw, sequences=2, queries=1, **SHAPES["odd"])
    size = case.table.shape[1] * case.entries
    out = case.out[..., : case.fmt.head_dim]
    attention.hca_attention(case.q, case.pool, case.table, case.lens, size, case.window, case.heads, out, splits=splits)
    assert case.error(case.want(torch.arange(size, device=device) < case.lens.unsqueeze(1))) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("selected", [False, True])
def test_a_query_has_the_same_bits_in_a_chunk_and_in_its_parts(selected, device, draw):
    # On a card a chunk has more pairs of a query and 64 heads than programs run at once.
    queries, heads = (150, 72) if device.type == "cuda" else (5, 33)
    case = Case(draw, sequences=1, queries=queries, heads=heads, dims=(512, 64), blocks=7, entries=32, ring=160)
    size = case.table.shape[1] * case.entries
    case.lens[2] = size
    values = prefill.decode_sequences(case.pool, case.table, size, case.ring, 64, 512)
    # Entries in order: picked or not, they are the same list.
    indices = torch.arange(size, dtype=torch.int32, device=device).repeat(queries, 1) if selected else None
    w, h = case.window, case.heads
    out = case.out[..., :512]
    prefill.prefill_attention(case.q, values, indices, case.lens, w, h, out)
    assert case.error(case.want(torch.arange(size, device=device) < case.lens.unsqueeze(1))) < TOLERANCE
    assert (out[0] == 0).all()
    for part in (slice(0, 1), slice(1, 3), slice(3, queries)):
        alone = torch.full_like(out[part], float("nan"))
        prefill.prefill_attention(
            case.q[part],
            values,
            None,
            case.lens[part],
            operands.Window(records=w.records, firsts=w.firsts[part], counts=w.counts[part]),
            operands.Heads(sinks=h.sinks, scale=h.scale, cos=h.cos[part], sin=h.sin[part]),
            alone,
        )
        assert torch.equal(alone, out[part])
