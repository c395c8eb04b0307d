"""Replays of random models of many shapes: hits equal cold runs to the bit, and so do all later results."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from antefix.layout import KVFormat
from antefix.model import Model, ModelConfig, init_weights
from antefix.record import RecordKind
from antefix_prefill.run_prompt import run_prompt
from tests.engines import MemoryStore, build, prompt_of

NAMES = {
    "W": "sliding_attention",
    "C": "compressed_sparse_attention",
    "H": "heavily_compressed_attention",
}
# All sizes are multiples of 16, so that on no CPU a bit depends on a row's place.
SMALL: dict[str, Any] = {
    "model_type": "deepseek_v4", "vocab_size": 64, "hidden_size": 32, "moe_intermediate_size": 16,
    "num_attention_heads": 4, "head_dim": 32, "q_lora_rank": 16, "num_experts_per_tok": 2, "n_routed_experts": 4,
    "o_groups": 2, "o_lora_rank": 16, "index_n_heads": 16, "index_head_dim": 16, "index_topk": 3,
    "partial_rotary_factor": 0.25, "num_hash_layers": 1, "hc_mult": 2, "hc_sinkhorn_iters": 3, "initializer_range": 0.3,
}  # fmt: skip
# Layers, m, m', n_win. The first ones are the smallest shapes whose overlap reaches further back than their windows.
NAMED = [("C", 4, 4, 1), ("C", 4, 16, 1), ("CCC", 4, 4, 2), ("CCCCC", 16, 16, 4), ("CHW", 8, 8, 2), ("WHC", 8, 8, 2)]
# Models without global KV, in which only windows matter.
WINDOW_ONLY = [("W", 4, 4, 1), ("WWW", 4, 8, 5)]


def drawn(count: int) -> list[tuple[str, int, int, int]]:
    rng = np.random.default_rng(14)
    shapes = []
    for _ in range(count):
        layers = "".join(rng.choice(list("CHW"), rng.integers(1, 6)))
        shapes.append((layers, int(rng.integers(1, 13)), int(rng.choice([1, 2, 4, 6, 12])), int(rng.integers(1, 7))))
    return shapes


def model_of(layers: str, m: int, m_hca: int, n_win: int, kv_format: KVFormat) -> Model:
    fields = SMALL | {
        "num_hidden_layers": len(layers),
        "layer_types": [NAMES[kind] for kind in layers],
        "compress_rates": {NAMES["C"]: m, NAMES["H"]: m_hca},
        "sliding_window": n_win,
    }
    model = Model(ModelConfig.from_dict(fields), kv_format=kv_format).requires_grad_(False).eval()
    return init_weights(model, seed=3)


DRAWN = drawn(16)
SHAPES = [*NAMED, *WINDOW_ONLY, *DRAWN[:4], *(pytest.param(*shape, marks=pytest.mark.long) for shape in DRAWN[4:])]


async def run(model: Model, store: MemoryStore, tokens: np.ndarray) -> tuple[Any, ...]:
    engine = build(model, store, strategy="zero", num_blocks=len(tokens) // model.layout.geometry.block_size + 2,
                   prefill_chunk=64)  # fmt: skip
    computed = await run_prompt(engine, prompt_of(engine, tokens))
    rows = [bytes(engine.pool.payloads([block])[0]) for block in computed.sequence.block_table]
    return computed.report, computed.logits, rows, computed.sequence.window.to_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("kv_format", [KVFormat.FP8, KVFormat.FLOAT32])
@pytest.mark.parametrize(("layers", "m", "m_hca", "n_win"), SHAPES)
async def test_a_replay_and_all_that_is_written_after_it_equal_a_cold_run(
    layers: str, m: int, m_hca: int, n_win: int, kv_format: KVFormat
) -> None:
    model = model_of(layers, m, m_hca, n_win, kv_format)
    geometry, size = model.layout.geometry, math.lcm(m, m_hca)
    # A replay that starts inside the document, then a turn of some blocks, then another turn.
    num_first = geometry.replay_tokens + size + 3
    lengths = (num_first, num_first + 3 * size + 1, num_first + 5 * size + 2)
    tokens = np.random.default_rng([m, m_hca, n_win]).integers(0, 64, lengths[-1])
    store = MemoryStore()
    await run(model, store, tokens[: lengths[0]])
    for length in lengths[1:]:
        hit = await run(model, store, tokens[:length])
        cold = await run(model, MemoryStore(), tokens[:length])
        assert (hit[0].plan, cold[0].plan) == ("replay", "cold")
        assert 0 < hit[0].replayed_tokens < hit[0].hit_tokens
        assert np.array_equal(hit[1], cold[1])
        assert hit[2:] == cold[2:]


async def test_a_replay_that_is_a_block_too_short_writes_wrong_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail, as it did when the bound ignored the overlap."""
    monkeypatch.setattr("antefix.window.sizes.Sizes.replay_tokens", property(lambda sizes: 0))
    model = model_of("C", 4, 4, 1, KVFormat.FP8)
    tokens = np.random.default_rng(0).integers(0, 64, 40)
    store, cold = MemoryStore(), MemoryStore()
    await run(model, store, tokens[:18])
    await run(model, store, tokens)
    await run(model, cold, tokens)
    assert store.records.keys() == cold.records.keys()
    wrong = [name for name in store.records if store.records[name] != cold.records[name]]
    assert {kind for kind, _ in wrong} == {RecordKind.BLOCK}
