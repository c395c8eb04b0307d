"""Index scores against the float64 oracle, and top-k exactly, ties and clusters included."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from antefix_kernels import index_scores as indexer
from antefix_kernels import topk
from antefix_kernels import torch_reference as reference
from antefix_kernels.number_formats import KeyFormat


def make_keys(sequences, blocks, entries, dim, device, draw):
    """A pool of random keys, block tables into it (no block twice), and the keys of each sequence in order."""
    nbytes = KeyFormat(dim=dim).nbytes
    num_blocks = sequences * blocks + 3
    size = num_blocks * entries
    values = torch.randn(size, dim, generator=draw, device=device)
    values *= torch.exp2(
        torch.randint(-8, 9, (size, dim // min(32, dim)), generator=draw, device=device)
    ).repeat_interleave(min(32, dim), 1)
    rows = torch.full((num_blocks, entries * nbytes + 48), 0xFF, dtype=torch.uint8, device=device)
    pool = rows[:, 16 : 16 + entries * nbytes].unflatten(1, (entries, nbytes))
    pool.copy_(reference.pack_keys(values).view(num_blocks, entries, nbytes))
    table = (
        torch.randperm(num_blocks, generator=draw, device=device)[: sequences * blocks].int().view(sequences, blocks)
    )
    keys = reference.read_keys(pool[table.long()].flatten(1, 2), dim)
    return pool, table, keys


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sequences", "queries", "heads", "dim", "blocks", "entries", "group", "tile"),
    [
        (3, 1, 64, 128, 5, 32, 8, None),
        (3, 1, 64, 128, 9, 32, 2, None),
        (2, 1, 33, 128, 4, 64, 16, None),
        (2, 1, 5, 32, 3, 7, 8, (64, 1, 4, 1)),
        (1, 11, 4, 16, 6, 8, 8, (64, 2, 4, 1)),
        (2, 9, 8, 128, 3, 32, 4, (64, 4, 4, 1)),
        (1, 5, 64, 128, 9, 32, 16, None),
        (1, 70, 4, 32, 3, 32, 8, None),
    ],
)
def test_scores_equal_the_oracle_on_visible_entries(
    sequences, queries, heads, dim, blocks, entries, group, tile, device, draw
):
    pool, table, keys = make_keys(sequences, blocks, entries, dim, device, draw)
    total = sequences * queries
    q = torch.randn(total, heads, dim, generator=draw, device=device).bfloat16()
    q *= torch.exp2(torch.randint(-3, 4, (total, heads, 1), generator=draw, device=device))
    weights = torch.randn(total, heads + 1, generator=draw, device=device)[:, 1:]
    size = blocks * entries
    lens = torch.randint(0, size + 1, (sequences, queries), generator=draw, device=device).sort(1).values.int()
    lens[-1, -1] = size
    query = indexer.prepare_queries(q, weights, 0.25)
    scored = indexer.index_scores(query, pool, table, lens.flatten(), size, group=group, tile=tile)
    for s in range(sequences):
        rows = slice(s * queries, (s + 1) * queries)
        rounded = reference.prepare_queries(q[rows].float()).double()
        want = reference.index_scores(rounded, weights[rows].double() * 0.25, keys[s])
        for row, length in enumerate(lens[s].tolist()):
            got = scored.scores[s * queries + row, :length].double()
            # The error is compared with the sum of magnitudes. Weights of both signs cancel, but their rounding errors
            # do not.
            scale = reference.index_scores(rounded, weights[rows].double().abs() * 0.25, keys[s])[row, :length].norm()
            assert float((got - want[row, :length]).norm()) <= 1e-6 * float(scale)
            tops = torch.nn.functional.pad(got, (0, -length % group), value=float("-inf")).view(-1, group).amax(1)
            assert torch.equal(scored.maxima[s * queries + row, : len(tops)].double(), tops)


def scored_from(scores: torch.Tensor, group: int, lens: torch.Tensor) -> indexer.IndexScores:
    """The result that index_scores would give: maxima over visible scores, and poison after them."""
    seen = torch.arange(scores.shape[1], device=scores.device) < lens.unsqueeze(1)
    maxima = scores.masked_fill(~seen, float("-inf")).unflatten(1, (-1, group)).amax(2)
    groups_seen = torch.arange(maxima.shape[1], device=scores.device) * group < lens.unsqueeze(1)
    return indexer.IndexScores(
        scores=scores.masked_fill(~seen, float("nan")),
        maxima=maxima.masked_fill(~groups_seen, float("nan")),
        group=group,
    )


def kinds_of_scores(rows: int, size: int, draw: torch.Generator) -> dict[str, torch.Tensor]:
    smooth = torch.randn(rows, size, generator=draw, device=draw.device)
    few = torch.randint(-2, 3, (rows, size), generator=draw, device=draw.device).float()
    zeros = torch.where(smooth > 1.5, smooth, 0.0) * torch.where(few > 0, 1.0, -1.0)  # zeros of both signs are equal
    cluster = torch.sort(smooth, dim=1, descending=True).values
    wide = smooth * torch.exp2(few * 60)
    # One outlier far above numbers that differ only in their last bits, which halving the range of values cannot
    # separate.
    close = 1 + torch.randint(0, 99, (rows, size), generator=draw, device=draw.device) * 2.0**-23
    close[:, size // 3] = 1e30
    equal = torch.ones_like(smooth) * -3
    kinds = {"smooth": smooth, "few": few, "zeros": zeros, "cluster": cluster, "equal": equal, "wide": wide}
    return kinds | {"close": close, "infinite": torch.where(few == 2, float("inf"), torch.where(few < 0, -wide, wide))}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "group", "k", "kind"),
    [
        pytest.param(*shape, kind, marks=[pytest.mark.long] * (shape[0] >= 512 and kind not in ("smooth", "few")))
        for shape in ((512, 4, 16), (1024, 8, 37), (256, 16, 100), (128, 2, 1))
        for kind in ("smooth", "few", "zeros", "cluster", "equal", "wide", "close", "infinite")
    ],
)
def test_topk_is_exact_and_ties_go_to_the_lowest_index(kind, size, group, k, device, draw):
    rows, entries = 6, 8
    scores = kinds_of_scores(rows, size, draw)[kind]
    lens = torch.randint(0, size + 1, (rows,), generator=draw, device=device).int()
    lens[:3] = torch.tensor([size, k, k + 1])
    table = torch.randperm(2 * size, generator=draw, device=device)[: 2 * size // entries].int().view(2, -1)
    picks = topk.topk_entries(scored_from(scores, group, lens), lens, table, entries, k)
    want = reference.topk_lowest(scores, lens, k)
    assert torch.equal(picks.indices, want)
    assert torch.equal(picks.counts, lens.clamp(max=k))
    sequence = torch.arange(rows, device=device).unsqueeze(1) // 3
    at = want.clamp_min(0).long()
    assert torch.equal(picks.slots, torch.where(want < 0, -1, table[sequence, at // entries] * entries + at % entries))


def test_the_same_scores_give_the_same_picks_at_any_length_of_padding(device, draw):
    scores = torch.randint(0, 4, (1, 256), generator=draw, device=device).float()
    lens = torch.tensor([100], dtype=torch.int32, device=device)
    table = torch.arange(64, dtype=torch.int32, device=device).view(1, 64)
    wide = torch.cat([scores, scores], 1)
    a = topk.topk_entries(scored_from(scores, 4, lens), lens, table, 8, 20)
    b = topk.topk_entries(scored_from(wide, 16, lens), lens, table, 8, 20)
    assert torch.equal(a.indices, b.indices)


def test_wrong_operands_are_refused(device, draw):
    pool, table, _ = make_keys(1, 2, 8, 32, device, draw)
    query = indexer.prepare_queries(torch.zeros(2, 4, 32, device=device), torch.zeros(2, 4, device=device), 1.0)
    lens = torch.zeros(2, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="lens"):
        indexer.index_scores(query, pool, table, lens.long(), 16)
    with pytest.raises(ValueError, match="exceeds the block tables"):
        indexer.index_scores(query, pool, table, lens, 17)
    with pytest.raises(ValueError, match="power of two"):
        indexer.prepare_queries(torch.zeros(2, 4, 24, device=device), torch.zeros(2, 4, device=device), 1.0)
