"""Small models with shapes that are difficult for libraries of matrix products, and runs of these models."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence as Many
from typing import Any

import numpy as np
import torch

from antefix.layout import KVFormat
from antefix.model import BlockPool, Model, ModelConfig, Sequence, WindowState, forward
from antefix.model.replay import replay

W, C, H = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
SMALL: dict[str, Any] = {
    "model_type": "deepseek_v4", "vocab_size": 61, "hidden_size": 32, "moe_intermediate_size": 24,
    "num_attention_heads": 4, "head_dim": 32, "q_lora_rank": 24, "num_experts_per_tok": 2, "n_routed_experts": 4,
    "o_groups": 2, "o_lora_rank": 8, "index_n_heads": 16, "index_head_dim": 16, "index_topk": 5,
    "partial_rotary_factor": 0.25, "num_hash_layers": 1, "max_position_embeddings": 4096, "hc_sinkhorn_iters": 3,
    "sliding_window": 8, "layer_types": [W, C, H], "num_hidden_layers": 3, "compress_rates": {C: 4, H: 16},
}  # fmt: skip
# Shapes with which bits once depended on a row's place: addends that are no multiple of 16 with 5 to 7 or 9 to 11
# columns; three streams; few heads, one head, one stream; and a vocabulary that is too wide to be padded.
AWKWARD: dict[str, dict[str, Any]] = {
    "plain": {},
    "three streams": {"hc_mult": 3},
    "hidden 100, 6 experts": {"hidden_size": 100, "n_routed_experts": 6},
    "hidden 300, rank 9": {"hidden_size": 300, "o_lora_rank": 9, "n_routed_experts": 10, "num_experts_per_tok": 3},
    "odd everywhere": {
        "hidden_size": 33, "q_lora_rank": 17, "o_lora_rank": 7, "moe_intermediate_size": 20, "hc_mult": 5,
        "vocab_size": 531, "index_n_heads": 3, "n_routed_experts": 7,
    },
    "window only": {"layer_types": [W, W, W], "hc_mult": 2},
    "one head": {"num_attention_heads": 1, "o_groups": 1, "index_topk": 33, "hc_mult": 1, "num_experts_per_tok": 1},
    "one wide stream": {"hidden_size": 300, "hc_mult": 1},
    "three heads": {"num_attention_heads": 3, "o_groups": 1, "hc_mult": 6, "scoring_func": "sigmoid"},
}  # fmt: skip


def make(name: str, *, kv_format: KVFormat = KVFormat.FP8, seed: int = 1) -> Model:
    """A model with the same random weights each time, all of which affect the result."""
    model = Model(ModelConfig.from_dict(SMALL | AWKWARD[name]), kv_format=kv_format).requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(seed)
    for label, weight in model.named_parameters():
        drawn = torch.randn(weight.shape, generator=generator)
        is_near_one = "norm" in label or label.endswith("scale")
        weight.copy_(1 + 0.2 * drawn if is_near_one else drawn * 1.2 / weight.shape[-1] ** 0.5)
    for label, table in model.named_buffers():
        if label.endswith("tid2eid"):
            ranks = torch.rand(len(table), model.config.num_experts, generator=generator).argsort(-1)
            table.copy_(ranks[:, : table.shape[1]])
        elif label.endswith("e_score_correction_bias"):
            table.zero_()
    return model


def bits(model: Model, cuts: Many[int] = (), *, num_tokens: int = 70, others: int = 0) -> str:
    """A digest of one sequence's logits and window state. Its tokens come in pieces, after `others` other sequences."""
    size = model.config.geometry.block_size
    num_blocks = -(-num_tokens // size)
    pool = BlockPool(model.layout, num_blocks * (others + 1))
    sequences = [Sequence(pool.allocate(num_blocks), WindowState.zeros(model.layout, 0)) for _ in range(others + 1)]
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (others + 1, num_tokens)).astype("<u4")
    state = hashlib.blake2b(digest_size=8)
    for start, stop in zip((0, *cuts), (*cuts, num_tokens), strict=True):
        batch = [(sequences[row], tokens[row, start:stop]) for row in reversed(range(others + 1))]
        state.update(forward(model, pool, batch, logits="all")[start - stop :].numpy().tobytes())
    for ring in sequences[0].window.window:
        state.update(ring.numpy().tobytes())
    return state.hexdigest()


def run_all(model: Model) -> None:
    """Run a prefill, chunks, decode steps in a batch, and a replay."""
    bits(model, (21, 34, 35), num_tokens=36, others=1)
    size = model.config.geometry.block_size
    pool = BlockPool(model.layout, 4)
    sequence = Sequence(pool.allocate(4), WindowState.zeros(model.layout, 0))
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, 4 * size).astype("<u4")
    forward(model, pool, [(sequence, tokens)])
    again = Sequence(sequence.block_table, WindowState.zeros(model.layout, size))
    replay(model, pool, again, tokens[size:], stop=4 * size)
