"""The shim's kernels, which run vLLM's V4 on processors for which vLLM has no kernels."""

import importlib.util
from pathlib import Path

import pytest
import torch

from antefix.layout import BlockLayout, KVFormat, KVGeometry
from antefix.model.quant import pack_entries
from antefix_engines.vllm.check_models import V4

BLOCK = 64


@pytest.fixture(scope="module")
def kernels():
    path = Path(__file__).parent / "vllm_cpu" / "plain_kernels.py"
    spec = importlib.util.spec_from_file_location("plain_kernels", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def draw():
    return torch.Generator().manual_seed(0)


def test_entries_are_those_that_antefix_packs_where_vllm_has_them(kernels, draw):
    own = BlockLayout(geometry=KVGeometry.from_config(V4.config), kv_format=KVFormat.FP8)
    numbers = torch.randn(5, 512, generator=draw).to(torch.bfloat16).float()
    slots = torch.tensor([70, 3, -1, 191, 64])
    cache = torch.full((3, 40_000), 0xEE, dtype=torch.uint8)
    kernels._write_entries(cache, slots, BLOCK, numbers, numbers)
    records = pack_entries(numbers, own).view(5, 584)
    for slot, record in zip(slots.tolist(), records, strict=True):
        if slot < 0:
            continue
        line, place = cache[slot // BLOCK], slot % BLOCK
        assert torch.equal(line[place * 576 : (place + 1) * 576], record[:576])
        scales = BLOCK * 576 + place * 8
        assert torch.equal(line[scales : scales + 8], record[576:])
    assert (cache == 0xEE).sum() >= cache.numel() - 4 * 584
    back = kernels._read_entries(cache, slots, BLOCK)
    assert (back[slots >= 0] - numbers[slots >= 0]).abs().max() < 0.2


def test_rotation_turns_back(kernels, draw):
    x = torch.randn(4, 3, 512, generator=draw)
    angles = torch.rand(100, 32, generator=draw)
    table, at = torch.cat((angles.cos(), angles.sin()), -1), torch.tensor([0, 7, 99, 50])
    turned = kernels._rotated(x, at, table)
    assert torch.equal(turned[..., :448], x[..., :448]) and not torch.allclose(turned, x)
    assert torch.allclose(kernels._rotated(turned, at, table, back=True), x, atol=1e-5)


def test_attention_sees_its_slots_alone_and_the_sink(kernels, draw):
    window, compressed = torch.zeros(2, 40_000, dtype=torch.uint8), torch.zeros(2, 40_000, dtype=torch.uint8)
    entries = torch.randn(6, 512, generator=draw).to(torch.bfloat16).float()
    kernels._write_entries(window, torch.arange(4), BLOCK, entries[:4], entries[:4])
    kernels._write_entries(compressed, torch.tensor([64, 65]), BLOCK, entries[4:], entries[4:])
    seen = torch.cat(
        (
            kernels._read_entries(window, torch.tensor([1, 2]), BLOCK),
            kernels._read_entries(compressed, torch.tensor([65]), BLOCK),
        )
    )
    q, sink, out = torch.randn(1, 2, 512, generator=draw), torch.tensor([0.5, -1.0]), torch.empty(1, 2, 512)
    kernels.flash_mla_with_kvcache(
        out, q, window, torch.tensor([[1, -1, 2]]), BLOCK, compressed, torch.tensor([[65, -1]]), BLOCK, sink, 0.04
    )
    weights = (q[0] @ seen.T * 0.04).exp()
    expected = (weights / (weights.sum(-1, keepdim=True) + sink.exp().unsqueeze(-1))) @ seen
    assert torch.allclose(out[0], expected, atol=1e-4)


def test_groups_are_weighted_sums_of_their_tokens_and_of_the_group_before(kernels, draw):
    """In CSA an entry uses a group of 4 tokens in its second series, and the group before it in its first."""
    cache = torch.zeros(4, 4, 2 * 256)
    kv, score = torch.randn(8, 256, generator=draw), torch.randn(8, 256, generator=draw)
    ape = torch.randn(4, 256, generator=draw)
    kernels.save_partial_states(kv, score, ape, torch.arange(8), cache, torch.arange(4, 12))
    weight = torch.ones(128)
    made = kernels._compressed(cache, torch.arange(4, 12).unsqueeze(0), weight, 0.0, 4)[0]
    scores = score + ape.repeat(2, 1)
    values = torch.cat((kv[:4, :128], kv[4:, 128:]))
    shares = torch.cat((scores[:4, :128], scores[4:, 128:])).softmax(0)
    summed = (values * shares).sum(0)
    assert torch.allclose(made, summed * summed.square().mean().rsqrt(), atol=1e-5)
    first = kernels._compressed(cache, torch.tensor([[-1] * 4 + [4, 5, 6, 7]]), weight, 0.0, 4)[0]
    alone = (kv[:4, 128:] * scores[:4, 128:].softmax(0)).sum(0)
    assert torch.allclose(first, alone * alone.square().mean().rsqrt(), atol=1e-5)
