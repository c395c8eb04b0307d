"""Small models drawn from a seed: random layer plans, ratios, windows, widths, streams, heads and experts.

The fixed plans cover difficulties that we know; drawn models are for those that nobody has thought of. One number
stands for one model, so a failed case is repeated with the seed that was printed.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from antefix.layout import KVFormat
from antefix_console.verify.models import Subject, make_subject
from antefix_prefill.worker.rank_processes import RankProcesses

_KINDS = ("sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention")
# Largest block in tokens, so that a prompt of several blocks is still short.
_BLOCK_TOKENS_MAX = 48
# Head dims, and the share of each that RoPE rotates: an even number of dims each time.
_HEADS = ((16, 0.25), (24, 0.25), (32, 0.5), (40, 0.2), (80, 0.2))


def drawn_subject(
    seed: int, number: int, *, device: str = "cpu", fp8_only: bool = False, ranks: RankProcesses | None = None
) -> Subject:
    """Model `number` of a seed, equal on every machine. fp8_only: use only the format that the GPU kernels support."""
    random = np.random.default_rng((seed, number))
    fields = drawn_config(random)
    kv_format = KVFormat.FP8 if fp8_only or random.random() < 0.5 else KVFormat.FLOAT32
    weights = int(random.integers(1 << 31))
    return make_subject(f"drawn-{seed}-{number}", fields, kv_format, seed=weights, device=device, ranks=ranks)


def drawn_config(random: np.random.Generator) -> dict[str, Any]:
    """A config.json of random shape. Every config that is drawn can be loaded and served."""

    def between(low: int, high: int) -> int:
        return int(random.integers(low, high + 1))

    layers = [_KINDS[kind] for kind in random.integers(0, 3, between(1, 5))]
    csa, hca = _ratios(random)
    # Half of the windows are about as long as CSA's groups or shorter; there either can set the length of a replay.
    window = between(1, csa + 2) if random.random() < 0.5 else between(1, 24)
    head_dim, rotated = _HEADS[between(0, len(_HEADS) - 1)]
    num_heads = between(1, 5)
    num_experts = between(2, 11)
    return {
        "model_type": "deepseek_v4",
        "layer_types": layers,
        "num_hidden_layers": len(layers),
        "compress_rates": {_KINDS[1]: csa, _KINDS[2]: hca},
        "sliding_window": window,
        "vocab_size": between(61, 120),
        "hidden_size": between(16, 110),
        "moe_intermediate_size": between(5, 40),
        "num_attention_heads": num_heads,
        "head_dim": head_dim,
        "partial_rotary_factor": rotated,
        "q_lora_rank": between(5, 40),
        "o_groups": int(random.choice([n for n in range(1, num_heads + 1) if num_heads % n == 0])),
        "o_lora_rank": between(3, 20),
        "n_routed_experts": num_experts,
        "num_experts_per_tok": between(1, min(num_experts, 4)),
        "num_hash_layers": between(0, min(2, len(layers))),
        "scoring_func": str(random.choice(["sqrtsoftplus", "sigmoid"])),
        "index_n_heads": between(2, 20),
        "index_head_dim": int(random.choice([16, 32, 64])),
        "index_topk": between(1, 9),
        "hc_mult": between(1, 6),
        "hc_sinkhorn_iters": between(1, 6),
        "max_position_embeddings": 1 << 20,
    }


def _ratios(random: np.random.Generator) -> tuple[int, int]:
    """The compression ratios m and m', in any order and with any common divisor."""
    while True:
        csa, hca = (int(n) for n in random.integers(1, 17, 2))
        if 2 <= math.lcm(csa, hca) <= _BLOCK_TOKENS_MAX:
            return csa, hca
