"""Small random V4 checkpoints, written by transformers, and transformers itself as the oracle."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
W, C, H = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1}
# 16 indexer heads, because with few heads ReLU gives many scores of exactly zero, and transformers breaks such ties by
# length.
SMALL: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "moe_intermediate_size": 24, "num_attention_heads": 4, "head_dim": 32,
    "q_lora_rank": 24, "num_experts_per_tok": 2, "n_routed_experts": 4, "sliding_window": 8, "o_groups": 2,
    "o_lora_rank": 8, "index_n_heads": 16, "index_head_dim": 16, "index_topk": 5, "partial_rotary_factor": 0.25,
    "num_hash_layers": 1, "max_position_embeddings": 4096, "hc_sinkhorn_iters": 6,
}  # fmt: skip
PLANS: dict[str, dict[str, Any]] = {
    # V4-Flash's order of layers and its ratios; YaRN stretches from 64 positions.
    "flash": {"layer_types": [W, W, C, H, C, H], "rates": (4, 128), "sliding_window": 16, "rope_parameters": YARN},
    # V4-Pro's order: HCA first. Window and block differ, keys span one FP4 group and a half.
    "pro": {"layer_types": [H, H, C, H, C], "rates": (4, 16), "sliding_window": 12, "index_head_dim": 64},
    # Tiny groups, two FP8 groups an entry, three of four experts, no hash layer.
    "small_ratios": {
        "layer_types": [W, C, H, C], "rates": (2, 8), "head_dim": 96, "index_head_dim": 32, "num_hash_layers": 0,
        "num_experts_per_tok": 3,
    },
    # Ratios that are not powers of two; a window smaller than a block; entries of one FP8 group.
    "odd_ratios": {
        "layer_types": [C, H, W], "rates": (3, 6), "sliding_window": 5, "head_dim": 80, "partial_rotary_factor": 0.2,
        "rope_parameters": YARN, "hc_mult": 2, "num_attention_heads": 2,
    },
    # No window-only layer, HCA groups that are no multiple of CSA's, sigmoid scores.
    "coprime_ratios": {"layer_types": [C, H], "rates": (4, 6), "scoring_func": "sigmoid", "num_hash_layers": 2},
    # CSA's groups are longer than the window, so the overlap determines how far back a replay must start.
    "wide_overlap": {"layer_types": [H, C, C, W], "rates": (12, 6), "sliding_window": 3},
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Run with one thread. Tests that vary the number of threads set it, and this fixture restores it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build_oracle(plan: str, seed: int = 1) -> Any:
    """transformers' model of a plan in float32. Every weight, bias, sink and table is random and affects the result."""
    return copy.deepcopy(_oracle(plan, seed))


@functools.cache
def _oracle(plan: str, seed: int) -> Any:
    transformers = pytest.importorskip("transformers")
    fields = {**SMALL, **PLANS[plan]}
    csa, hca = fields.pop("rates")
    fields |= {"compress_rates": {C: csa, H: hca}, "num_hidden_layers": len(fields["layer_types"])}
    config = transformers.DeepseekV4Config(**fields)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = transformers.DeepseekV4ForCausalLM(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: torch.Size) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    for name, weight in model.named_parameters():
        if "norm" in name or name.endswith("scale"):
            weight.copy_(1 + 0.2 * normal(weight.shape))
        elif name.endswith(("base", "sinks", "position_bias")):
            weight.copy_(0.5 * normal(weight.shape))
        else:
            weight.copy_(normal(weight.shape) * 1.2 / weight.shape[-1] ** 0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.3 * normal(buffer.shape))
        elif name.endswith("tid2eid"):
            ranks = torch.rand(len(buffer), config.n_routed_experts, generator=generator).argsort(-1)
            buffer.copy_(ranks[:, : buffer.shape[1]])
    return model


class _Float64Torch:
    """A torch module in which float32 is float64."""

    float32 = float = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextlib.contextmanager
def lifted() -> Iterator[None]:
    """Within this context transformers computes norms, RoPE and softmaxes in float64, not in float32 as usual."""
    modeling = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    plain_float = torch.Tensor.float
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling, "torch", _Float64Torch())
        patch.setattr(torch.Tensor, "float", lambda tensor: tensor.to(torch.float64))
        yield
    assert torch.Tensor.float is plain_float


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a plan's checkpoint, which save_pretrained writes once."""
    made: dict[str, Path] = {}

    def make(plan: str) -> Path:
        if plan not in made:
            made[plan] = tmp_path_factory.mktemp(plan)
            build_oracle(plan).save_pretrained(made[plan])
        return made[plan]

    return make


@pytest.fixture(scope="session")
def oracle_logits() -> Callable[[str, np.ndarray, torch.dtype], torch.Tensor]:
    """transformers' logits [T, V] of a whole prompt. In float64 no part is computed in float32."""

    def run(plan: str, tokens: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        model = build_oracle(plan).to(dtype)
        ids = torch.from_numpy(tokens.astype("i8"))[None]
        with torch.no_grad(), lifted() if dtype is torch.float64 else contextlib.nullcontext():
            return model(input_ids=ids).logits[0]

    return run


@pytest.fixture
def prompt() -> Callable[[int], np.ndarray]:
    """Random tokens, the same for the same length and salt."""

    def make(length: int, salt: int = 0) -> np.ndarray:
        return np.random.default_rng([length, salt]).integers(0, SMALL["vocab_size"], length).astype("<u4")

    return make
