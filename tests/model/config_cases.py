"""A tiny base config, the judgements of transformers and Antefix on its variations, and random RoPE parameters."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from antefix.errors import ModelError
from antefix.layout import KVFormat
from antefix.model import BlockPool, Model, ModelConfig, Sequence, WindowState, forward
from tests.model.conftest import C, H, W, lifted

BASE: dict[str, Any] = {
    "model_type": "deepseek_v4", "vocab_size": 37, "hidden_size": 32, "moe_intermediate_size": 16,
    "num_attention_heads": 4, "head_dim": 32, "q_lora_rank": 16, "num_experts_per_tok": 2, "n_routed_experts": 4,
    "sliding_window": 6, "o_groups": 2, "o_lora_rank": 8, "index_n_heads": 8, "index_head_dim": 16, "index_topk": 3,
    "partial_rotary_factor": 0.25, "num_hash_layers": 1, "max_position_embeddings": 512, "hc_mult": 2,
    "hc_sinkhorn_iters": 3, "num_hidden_layers": 3, "layer_types": [W, C, H], "compress_rates": {C: 4, H: 8},
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 37, 30).astype("<u4")
_GONE = object()


@dataclass(frozen=True, slots=True)
class Outcome:
    """theirs, ours: why each refused the config, or "".  notes: our notes at load.

    error: relative, between both logits.
    """

    theirs: str
    ours: str
    notes: tuple[str, ...]
    error: float | None


def judge(config: dict[str, Any]) -> Outcome:
    """Run both on one config.json and the same float64 weights. Errors of ours other than ModelError are raised."""
    weights, want, theirs = None, None, ""
    try:
        weights, want = their_logits(config)
    # Any exception of transformers counts as its refusal.
    except Exception as err:
        theirs = f"{type(err).__name__}: {err}"
    try:
        parsed = ModelConfig.from_dict(config)
    except ModelError as err:
        return Outcome(theirs, str(err), (), None)
    if weights is None or want is None:
        return Outcome(theirs, "", parsed.notes, None)
    error = (our_logits(parsed, weights) - want).abs().max() / want.abs().max()
    return Outcome(theirs, "", parsed.notes, float(error))


def their_logits(config: dict[str, Any]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    transformers = pytest.importorskip("transformers")
    parsed = transformers.DeepseekV4Config.from_dict(copy.deepcopy(config))
    parsed._attn_implementation = parsed._experts_implementation = "eager"
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        model = transformers.DeepseekV4ForCausalLM(parsed).eval().double()
        for name, weight in model.named_parameters():
            values = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            if "norm" in name or name.endswith("scale"):
                weight.copy_(1 + 0.2 * values)
            elif name.endswith(("base", "sinks", "position_bias")):
                weight.copy_(0.5 * values)
            else:
                weight.copy_(values * 1.2 / weight.shape[-1] ** 0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("tid2eid"):
                ranks = torch.rand(len(buffer), parsed.n_routed_experts, generator=generator).argsort(-1)
                buffer.copy_(ranks[:, : buffer.shape[1]])
        with lifted():
            logits = model(input_ids=torch.from_numpy(TOKENS.astype("i8"))[None]).logits[0]
    return model.state_dict(), logits


def our_logits(config: ModelConfig, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    model = Model(config, kv_format=KVFormat.FLOAT64).double().requires_grad_(False).eval()
    model.load_state_dict(weights)
    pool = BlockPool(model.layout, -(-len(TOKENS) // config.geometry.block_size))
    sequence = Sequence(pool.allocate(pool.num_blocks), WindowState.zeros(model.layout, 0))
    return forward(model, pool, [(sequence, TOKENS)], logits="all")


def random_rope(seed: int) -> dict[str, Any]:
    """BASE with random RoPE fields of any form, most of them valid."""
    rng = random.Random(seed)
    config = {name: value for name, value in BASE.items() if name != "partial_rotary_factor"}
    _put(config, "partial_rotary_factor", _pick(rng, [0.25, 0.25, _GONE], [0.5, None, 0.1]))
    _put(config, "qk_rope_head_dim", _pick(rng, [_GONE, 8], [16, 5, None, 0]))
    _put(config, "rope_theta", _pick(rng, [_GONE, 10000.0, 500.0], [1]))
    _put(config, "compress_rope_theta", _pick(rng, [_GONE, 160000.0, 10000.0], [1]))
    _put(config, "original_max_position_embeddings", _pick(rng, [_GONE], [32]))
    name = rng.choice(["rope_parameters", "rope_scaling"])
    nested = {"main": _parameters(rng), "compress": _parameters(rng)}
    form = rng.choice(["flat", "flat", "nested", "nested", "nested", "one", "leftover", "both", "empty"])
    if form == "flat":
        config[name] = _parameters(rng)
    elif form == "one":
        config[name] = nested | {rng.choice(["main", "compress"]): None} if rng.random() < 0.3 else {
            label: nested[label] for label in [rng.choice(["main", "compress"])]
        }  # fmt: skip
    elif form == "both":
        config |= {"rope_parameters": nested, "rope_scaling": _parameters(rng)}
    else:
        config[name] = {"nested": nested, "leftover": _parameters(rng) | nested, "empty": rng.choice([None, {}])}[form]
    return config


def _parameters(rng: random.Random) -> dict[str, Any]:
    given: dict[str, Any] = {}
    kind = _pick(rng, ["default", "yarn", "yarn", _GONE], ["linear", "dynamic", "llama3", None])
    _put(given, rng.choice(["rope_type", "rope_type", "type"]), kind)
    if kind == "yarn" or rng.random() < 0.1:
        _put(given, "factor", _pick(rng, [4, 4.0, 1, 16], [None, _GONE, 0.5, "x", 0]))
        _put(given, "original_max_position_embeddings", _pick(rng, [_GONE, 16, 64], [None, 0, "x"]))
        _put(given, "beta_fast", _pick(rng, [_GONE, 32, 16.0], [None, 0, "x"]))
        _put(given, "beta_slow", _pick(rng, [_GONE, 1, 0.5], [None, 0, "x"]))
        _put(given, "attention_factor", _pick(rng, [_GONE, _GONE, 1.0, 0.7], [None, 0, "x", -1.0]))
        _put(given, "mscale", _pick(rng, [_GONE, _GONE, 0.7], [None, 0]))
        _put(given, "mscale_all_dim", _pick(rng, [_GONE, _GONE, 1.0], [None, 0]))
        _put(given, "truncate", _pick(rng, [_GONE], [False, True, None]))
    _put(given, "partial_rotary_factor", _pick(rng, [_GONE, 0.25, 0.25], [0.5, None, 1.0, 0.16, "x"]))
    _put(given, "rope_theta", _pick(rng, [500.0, 10000, _GONE], [None, 0, 1, "x"]))
    return given


def _pick(rng: random.Random, good: list[Any], odd: list[Any]) -> Any:
    return rng.choice(good if rng.random() < 0.9 else odd)


def _put(fields: dict[str, Any], name: str, value: Any) -> None:
    if value is not _GONE:
        fields[name] = value
