"""The FP8 format end to end: transformers, told to round where the released code rounds, gives the same logits.

The oracle shares no code with Antefix: it has transformers' layers and caches, and a rounding in numpy in this file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from antefix.layout import KVFormat
from antefix.model import BlockPool, Sequence, WindowState, forward, load_model

Checkpoint = Callable[[str], Path]
Prompt = Callable[[int], np.ndarray]

E4M3 = np.array(
    [m / 8 * 2.0**-6 for m in range(8)] + [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)]
)
E4M3 = E4M3[:-1]  # the last code would be NaN
E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def round_groups(x: np.ndarray, size: int, codes: np.ndarray, floor: float) -> np.ndarray:
    """Round every group of `size` to its nearest codes, with the smallest power-of-two scale that fits the group."""
    out = np.empty_like(x)
    for start in range(0, x.shape[-1], size):
        group = x[..., start : start + size].astype(np.float64)
        amax = np.maximum(np.abs(group).max(-1, keepdims=True), floor)
        scale = 2.0 ** np.ceil(np.log2(amax / codes[-1]))
        scaled = np.clip(np.abs(group) / scale, 0, codes[-1])
        above = np.clip(np.searchsorted(codes, scaled), 1, len(codes) - 1)
        low, high = codes[above - 1], codes[above]
        up = (scaled - low > high - scaled) | ((scaled - low == high - scaled) & (above % 2 == 0))
        out[..., start : start + size] = np.copysign(np.where(up, high, low) * scale, group)
    return out


def round_entry(x: torch.Tensor, rope_dim: int) -> torch.Tensor:
    plain = round_groups(x[..., :-rope_dim].numpy(), 64, E4M3, 1e-4)
    return torch.cat((torch.from_numpy(plain), x[..., -rope_dim:].to(torch.bfloat16).float()), dim=-1)


def round_index(x: torch.Tensor) -> torch.Tensor:
    dim = x.shape[-1]
    matrix = np.array([[1.0]])
    while len(matrix) < dim:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    rotated = (x.numpy().astype(np.float64) @ matrix / np.sqrt(dim)).astype(np.float32)
    return torch.from_numpy(round_groups(rotated, 32, E2M1, 6 * 2.0**-126))


@pytest.fixture
def rounding_transformers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Patches transformers' cache and scorer to round window KV, entries, indexer keys and indexer queries."""
    modeling = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    cache_utils = pytest.importorskip("transformers.cache_utils")
    rope_dim = {"value": 0}
    rounded: dict[str, int] = {"window": 0, "compressor": 0, "indexer": 0, "queries": 0}

    def rounding_update(original: Callable[..., Any]) -> Callable[..., Any]:
        def update(self: Any, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            rounded["window"] += 1
            kv = round_entry(key_states, rope_dim["value"])
            return original(self, kv, kv, *args, **kwargs)

        return update

    for owner in (modeling.DeepseekV4HCACache, cache_utils.DynamicSlidingWindowLayer):
        monkeypatch.setattr(owner, "update", rounding_update(owner.update))
    append = modeling.DeepseekV4HCACache.update_compressor_states

    def update_states(self: Any, name: str, compressed: torch.Tensor) -> torch.Tensor:
        rounded[name] += 1
        values = round_index(compressed) if name == "indexer" else round_entry(compressed, rope_dim["value"])
        return append(self, name, values)

    monkeypatch.setattr(modeling.DeepseekV4HCACache, "update_compressor_states", update_states)
    score = modeling.DeepseekV4IndexerScorer.forward

    def scorer(self: Any, q: torch.Tensor, keys: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        rounded["queries"] += 1
        return score(self, round_index(q), keys, hidden)

    monkeypatch.setattr(modeling.DeepseekV4IndexerScorer, "forward", scorer)

    def run(path: Path, tokens: np.ndarray) -> torch.Tensor:
        transformers = pytest.importorskip("transformers")
        model = transformers.DeepseekV4ForCausalLM.from_pretrained(path, attn_implementation="eager")
        rope_dim["value"] = model.config.qk_rope_head_dim
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(tokens.astype("i8"))[None], use_cache=True).logits[0]
        assert all(rounded.values()), f"a rounding never ran: {rounded}"
        return logits

    return run


@pytest.mark.parametrize(("plan", "length"), [("flash", 200), ("pro", 120), ("small_ratios", 60), ("odd_ratios", 50)])
def test_the_fp8_format_equals_transformers_with_released_rounding(
    checkpoint: Checkpoint, prompt: Prompt, rounding_transformers: Any, plan: str, length: int
) -> None:
    tokens = prompt(length)
    want = rounding_transformers(checkpoint(plan), tokens)
    rounded, plain = (run(checkpoint(plan), tokens, kv_format) for kv_format in (KVFormat.FP8, KVFormat.FLOAT32))
    error = (rounded - want).abs().amax(-1) / want.abs().max()
    # A float32 difference of 1e-7 may move a value across a rounding border, and a changed indexer key may pick another
    # entry. From such a token on logits differ visibly. Before that token they agree to float32's precision.
    assert error[: length // 3].max() < 1e-5
    assert (error < 1e-5).float().mean() > 0.6
    # Without rounding no logits would agree.
    assert ((plain - want).abs().amax(-1) / want.abs().max() > 1e-4).float().mean() > 0.9


def run(path: Path, tokens: np.ndarray, kv_format: KVFormat) -> torch.Tensor:
    model = load_model(path, kv_format=kv_format)
    pool = BlockPool(model.layout, -(-len(tokens) // model.config.geometry.block_size))
    sequence = Sequence(pool.allocate(pool.num_blocks), WindowState.zeros(model.layout, 0))
    return forward(model, pool, [(sequence, tokens)], logits="all")
