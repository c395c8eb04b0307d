"""The model's forward pass with the kernels agrees with the same pass in torch, in the interpreter and on a card."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from antefix.errors import ConfigError, InternalError
from antefix.layout import BlockLayout, KVFormat, PartKind
from antefix.model import (
    BlockPool,
    Model,
    ModelConfig,
    Sequence,
    WindowState,
    forward,
    init_weights,
    mhc,
    moe,
    norms_rope,
    numerics,
    triton_ops,
)
from antefix.model.backend import make_backend, uses_triton
from antefix.model.card_pool import CardPool
from antefix.model.ops import Entries, Ops, TorchOps
from antefix.model.quant import unpack
from antefix.model.triton_ops import TritonOps

CONFIG = {
    "model_type": "deepseek_v4",
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
    "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
    "sliding_window": 4,
    "num_attention_heads": 2,
    "head_dim": 80,
    "partial_rotary_factor": 0.2,
    "q_lora_rank": 16,
    "o_groups": 1,
    "o_lora_rank": 16,
    "index_n_heads": 16,
    "index_head_dim": 32,
    "index_topk": 4,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "num_hash_layers": 1,
}
TOKENS = np.random.default_rng(0).integers(0, 64, 14).astype("<u4")
# Chunks on both sides of the limit between decode and prefill kernels, and single tokens.
CUTS = [10, 12, 13]


@pytest.fixture(autouse=True)
def short_chunks_take_the_prefill_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_ops, "PREFILL_QUERIES_MIN", 6)


def build(device: torch.device) -> Model:
    model = init_weights(Model(ModelConfig.from_dict(CONFIG), kv_format=KVFormat.FP8), seed=3)
    for name, weight in model.named_parameters():
        if "norm" not in name:
            weight.data.mul_(8)
    return model.to(device).requires_grad_(False)


def run(
    model: Model, pool: BlockPool, ops: Ops, tokens: np.ndarray = TOKENS, cuts: list[int] = CUTS
) -> tuple[torch.Tensor, torch.Tensor, bytes]:
    table = [5, 1, 2, 7, 0, 3]
    pool.allocate(pool.num_blocks)
    sequence = Sequence(table, WindowState.zeros(model.layout, 0, model.device))
    pieces = [forward(model, pool, [(sequence, piece)], logits="all", ops=ops) for piece in np.split(tokens, cuts)]
    return torch.cat(pieces).cpu(), pool.rows[table].cpu(), sequence.window.to_bytes()


class Compared:
    """Runs every step in torch and with the kernels on the same inputs, checks them, continues with torch's result."""

    steps_together = False
    step_runner = None

    def __init__(self, pool: BlockPool, reproducible: bool = False) -> None:
        self.plain, self.kernels = TorchOps(), TritonOps(pool.layout, reproducible=reproducible)
        self.card = CardPool(pool.layout, pool.num_blocks, pool.rows.device)
        self.card.rows = pool.rows  # this pool's host rows belong to another pool, and it is never restored into
        self.checked: dict[str, int] = {}

    def on_card(self, entries: Entries | None) -> Entries | None:
        return entries and Entries(pool=self.card, part=entries.part, block_ids=entries.block_ids)

    def close(self, name: str, got: torch.Tensor, want: torch.Tensor, bound: float) -> torch.Tensor:
        self.checked[name] = self.checked.get(name, 0) + 1
        assert float((got.double() - want.double()).norm()) <= bound * float(want.double().norm()), name
        return want

    def window_pack(self, entries, layout):
        want = self.plain.window_pack(entries, layout)
        return self.close("window_pack", self.kernels.window_pack(entries, layout), want, 0.0)

    def compress_and_pack(self, compressor, rows, overlap, cos, sin, to, first):
        self.kernels.compress_and_pack(compressor, rows, overlap, cos, sin, self.on_card(to), first)
        got = self.card.records(to.part).clone()
        self.plain.compress_and_pack(compressor, rows, overlap, cos, sin, to, first)
        got, want = (unpack(to.part.kind, r, to.pool.layout) for r in (got, to.pool.records(to.part)))
        # FP4's steps are up to a third of a value, FP8's a sixteenth. Few values cross a rounding border.
        self.close(to.part.kind, got, want, 5e-2 if to.part.kind is PartKind.INDEXER_KEYS else 1e-2)

    def indexer_topk(self, q, weights, keys, visible, k):
        want = self.plain.indexer_topk(q, weights, keys, visible, k)
        got = self.kernels.indexer_topk(q, weights, self.on_card(keys), visible, k)
        assert got.dtype == want.dtype
        assert ((got >= 0) == (want >= 0)).all()
        # Scores whose sums differ in the last bits may change their order.
        assert (got == want).float().mean() > 0.95
        self.checked["indexer_topk"] = self.checked.get("indexer_topk", 0) + 1
        return want

    def sparse_attention(self, q, window, sinks, entries, picked):
        want = self.plain.sparse_attention(q, window, sinks, entries, picked)
        got = self.kernels.sparse_attention(q, window, sinks, self.on_card(entries), picked)
        return self.close("sparse_attention", got, want, 1e-3)

    def full_attention(self, q, window, sinks, entries, visible):
        want = self.plain.full_attention(q, window, sinks, entries, visible)
        got = self.kernels.full_attention(q, window, sinks, self.on_card(entries), visible)
        return self.close("window" if entries is None else "full_attention", got, want, 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("reproducible", [False, True])
def test_every_step_agrees_with_torch(device, monkeypatch, reproducible):
    # In the interpreter 256 queries would take too long.
    monkeypatch.setattr(triton_ops, "REPRODUCIBLE_QUERIES_MIN", 16)
    model = build(device)
    pool = BlockPool(model.layout, 8, device)
    ops = Compared(pool, reproducible)
    run(model, pool, ops)
    assert set(ops.checked) == {
        "window_pack",
        "indexer_topk",
        "sparse_attention",
        "full_attention",
        "window",
        *PartKind,
    }


@pytest.mark.long
def test_forward_with_the_kernels_agrees_with_torch(device):
    model = build(device)
    want, rows, state = run(model, BlockPool(model.layout, 8, device), TorchOps())
    got, packed, packed_state = run(model, CardPool(model.layout, 8, device), TritonOps(model.layout))
    # A value that crosses a rounding border may change the indexer's picks or a token's experts, and then that token's
    # logits. Most tokens hardly change.
    assert float(((got - want).norm(dim=1) / want.norm(dim=1)).median()) < 5e-2
    assert (rows == packed).float().mean() > 0.95
    same = np.frombuffer(state, np.uint8) == np.frombuffer(packed_state, np.uint8)
    # On a card, 0.947 was measured.
    assert same[: model.layout.window_bytes].mean() > 0.9


@pytest.mark.slow
def test_per_token_kernels_give_the_models_logits(device, monkeypatch):
    model = build(device).to(torch.float32)
    # These kernels take each token alone, so a short prompt and one more token show them.
    given = {"tokens": TOKENS[:7], "cuts": [6]}
    want, rows, _ = run(model, BlockPool(model.layout, 8, device), TorchOps(), **given)
    asked = []

    def always(x):
        asked.append(x.dtype)
        return True

    for module in (numerics, norms_rope, mhc, moe):
        monkeypatch.setattr(module, "has_kernels", always)
    got, rows_by_kernels, _ = run(model, BlockPool(model.layout, 8, device), TorchOps(), **given)
    assert asked
    # Sums have another order, so a value that crosses a rounding border may change a token's logits.
    assert float(((got - want).norm(dim=1) / want.norm(dim=1)).median()) < 2e-2
    written = (rows != 0) | (rows_by_kernels != 0)
    assert (rows == rows_by_kernels)[written].float().mean() > 0.95


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_card_bits_do_not_depend_on_cuts_or_on_the_batch(dtype):
    model = build(torch.device("cuda")).to(dtype)
    model.rope_main, model.rope_compress = model.rope_main.float(), model.rope_compress.float()
    ops = TritonOps(model.layout, reproducible=True)
    tokens = np.random.default_rng(1).integers(0, 64, 600).astype("<u4")

    def outcome(cuts, others):
        pool = CardPool(model.layout, 512)
        sequences = [
            Sequence(pool.allocate(150), WindowState.zeros(model.layout, 0, "cuda")) for _ in range(1 + others)
        ]
        pieces = []
        for piece in np.split(tokens, cuts):
            batch = [(sequence, piece) for sequence in sequences]
            pieces.append(forward(model, pool, batch, logits="all", ops=ops)[: len(piece)])
        first = sequences[0]
        return torch.cat(pieces), pool.rows[first.block_table], first.window.to_bytes()

    logits, rows, state = outcome([], 0)
    for cuts, others in (([300], 0), ([1, 2, 3, 40, 300, 301], 0), ([17, 256, 599], 2)):
        other_logits, other_rows, other_state = outcome(cuts, others)
        assert torch.equal(logits, other_logits)
        assert torch.equal(rows, other_rows)
        assert state == other_state


@pytest.mark.slow
def test_a_cut_window_is_not_attended_to(device):
    """A bounded replay starts at a block boundary, and the tokens before it are not visible."""
    model = build(device)
    pool = BlockPool(model.layout, 8, device)
    run(model, pool, TorchOps())
    sequence = Sequence([5, 1, 2, 7, 0, 3], WindowState.cut_at(model.layout, 8, device))
    ops = Compared(pool)
    forward(model, pool, [(sequence, TOKENS[8:11])], write_global_kv=False, ops=ops)
    assert ops.checked, "steps were run both ways"


def test_payloads_travel_through_a_card_pool_unchanged(device):
    layout = BlockLayout(geometry=ModelConfig.from_dict(CONFIG).geometry, kv_format=KVFormat.FP8)
    source, target = CardPool(layout, 6, device), CardPool(layout, 6, device)
    source.rows.random_(256)
    for into, payload in zip(target.landing([3, 4, 0]), source.payloads([0, 1, 4]), strict=True):
        into[:] = payload
    target.note_filled([3, 4, 0])
    assert torch.equal(target.rows[[3, 4, 0]], source.rows[[0, 1, 4]])
    assert not target.rows[[1, 2, 5]].any()


def test_choosing_kernels():
    geometry = ModelConfig.from_dict(CONFIG).geometry
    fp8, floats = (BlockLayout(geometry=geometry, kv_format=f) for f in (KVFormat.FP8, KVFormat.FLOAT32))
    assert uses_triton("auto", fp8, "cuda")
    assert not uses_triton("auto", fp8, "cpu")
    assert not uses_triton("auto", floats, "cuda")
    assert not uses_triton("torch", fp8, "cuda")
    # With three keys of 17 bytes, the next layer's entries begin at an odd address.
    odd = {**CONFIG, "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 6}}
    odd_layout = BlockLayout(geometry=ModelConfig.from_dict(odd).geometry, kv_format=KVFormat.FP8)
    assert not uses_triton("auto", odd_layout, "cuda")
    with pytest.raises(ConfigError, match="CUDA device"):
        uses_triton("triton", fp8, "cpu")
    with pytest.raises(ConfigError, match="one of"):
        uses_triton("cuda", fp8, "cpu")
    with pytest.raises(InternalError, match="fp8"):
        TritonOps(floats)
    pool, ops = make_backend("auto", fp8, 2, "cpu")
    assert type(pool) is BlockPool
    assert isinstance(ops, TorchOps)
