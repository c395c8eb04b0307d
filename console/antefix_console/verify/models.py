"""The models to verify: a model directory, and small random models with other layer plans and ratios.

In the random models every weight, bias, sink and routing table affects the result, so that anything that a restore
forgets is noticed. With the small weights that training starts from, logits would hardly depend on window state.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from antefix.layout import KVFormat
from antefix.model import Model, ModelConfig, check_device, load_model
from antefix.model.compiled.check import enable
from antefix.model.ranks import Ranks, take_share
from antefix.model_dir import ModelIdentity, identify
from antefix_prefill.worker.rank_processes import RankProcesses

_W, _C, _H = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
_YARN: Final = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
_SMALL: Final[dict[str, Any]] = {
    "model_type": "deepseek_v4",
    "vocab_size": 61,
    "hidden_size": 32,
    "moe_intermediate_size": 24,
    "num_attention_heads": 4,
    "head_dim": 32,
    "q_lora_rank": 24,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "o_groups": 2,
    "o_lora_rank": 8,
    # With few indexer heads, ReLU makes many scores exactly zero, so that they tie; with 16 heads ties are rare, and a
    # tie goes to the lowest index.
    "index_n_heads": 16,
    "index_head_dim": 16,
    "index_topk": 5,
    "partial_rotary_factor": 0.25,
    "num_hash_layers": 1,
    "max_position_embeddings": 1 << 20,
    "hc_sinkhorn_iters": 6,
}
# Layers, (m, m'), n_win, and other fields that differ.
PLANS: Final[dict[str, dict[str, Any]]] = {
    # V4-Flash: two window-only layers, then CSA and HCA layers in turn, with Flash's own ratios.
    "flash": {"layers": [_W, _W, _C, _H, _C, _H], "ratios": (4, 128), "sliding_window": 32, "rope_parameters": _YARN},
    # V4-Pro: HCA layers first; the window is longer than a block.
    "pro": {"layers": [_H, _H, _C, _H, _C], "ratios": (4, 16), "sliding_window": 24, "index_head_dim": 64},
    # Small groups, entries of two FP8 groups, no hash layer.
    "small-ratios": {
        "layers": [_W, _C, _H, _C],
        "ratios": (2, 8),
        "sliding_window": 8,
        "head_dim": 96,
        "index_head_dim": 32,
        "num_hash_layers": 0,
    },
    # Ratios that are not powers of two, HCA groups that are not a multiple of CSA's, a window of five.
    "odd-ratios": {"layers": [_C, _H, _W], "ratios": (4, 6), "sliding_window": 5, "hc_mult": 2},
    # CSA's overlap reaches further back than the windows, so a replay must be longer than the windows need.
    "short-window": {"layers": [_C, _C, _C], "ratios": (4, 4), "sliding_window": 2},
    "long-overlap": {"layers": [_C] * 5, "ratios": (16, 16), "sliding_window": 4},
    # A query sees only itself, so a replay is needed for the overlap only.
    "window-of-one": {"layers": [_C, _H, _C], "ratios": (4, 4), "sliding_window": 1},
    # Widths and numbers of streams that fill no tile of any matrix library.
    "odd-sizes": {
        "layers": [_W, _C, _H],
        "ratios": (4, 16),
        "sliding_window": 8,
        "hidden_size": 100,
        "n_routed_experts": 6,
        "o_lora_rank": 9,
        "hc_mult": 3,
    },
    # No global KV at all: blocks only name tokens, and all restored state is window state.
    "window-only": {"layers": [_W, _W, _W], "ratios": (4, 16), "sliding_window": 8},
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Subject:
    """A loaded model with its names.  alone: for a model over several ranks, makes the same model on one rank."""

    name: str
    identity: ModelIdentity
    model: Model
    alone: Callable[[], Subject] | None = None

    @property
    def kv_format(self) -> KVFormat:
        return self.model.layout.kv_format

    @property
    def block_size(self) -> int:
        return self.model.layout.geometry.block_size


def load_subject(
    path: Path, kv_format: KVFormat, *, device: str = "cpu", ranks: RankProcesses | None = None
) -> Subject:
    """Load a model directory.  Raises:  ModelError: it is not usable."""
    if ranks is None:
        model = load_model(path, device=device, kv_format=kv_format)
        enable(model)
        return Subject(name=path.name, identity=identify(path), model=model)
    return Subject(
        name=path.name,
        identity=identify(path),
        model=ranks.load(load_model, path=path, kv_format=kv_format),
        alone=lambda: load_subject(path, kv_format, device=device),
    )


def random_subject(
    plan: str, kv_format: KVFormat, *, seed: int = 1, device: str = "cpu", ranks: RankProcesses | None = None
) -> Subject:
    """A small random model of one of PLANS, with equal weights on every device and over any number of ranks.

    Raises:  ConfigError: the device cannot be used here.
    """
    return make_subject(plan, config_of(plan), kv_format, seed=seed, device=device, ranks=ranks)


def config_of(plan: str) -> dict[str, Any]:
    """The config.json of one of PLANS."""
    fields = dict(PLANS[plan])
    layers, (csa, hca) = fields.pop("layers"), fields.pop("ratios")
    ratios = {_C: csa, _H: hca}
    return _SMALL | fields | {"layer_types": layers, "num_hidden_layers": len(layers), "compress_rates": ratios}


def make_subject(
    name: str,
    fields: dict[str, Any],
    kv_format: KVFormat,
    *,
    seed: int,
    device: str = "cpu",
    ranks: RankProcesses | None = None,
) -> Subject:
    """A random model of a config.

    Raises:  ConfigError: the device cannot be used here.  InvalidRequest: the config is not that of a model.
    """
    check_device(device)
    config = ModelConfig.from_dict(fields)
    settings: dict[str, Any] = {"fields": fields, "kv_format": kv_format, "seed": seed}
    model = make_share(None, device, **settings) if ranks is None else ranks.load(make_share, **settings)
    identity = ModelIdentity(
        path=Path(name),
        geometry=config.geometry,
        weights_revision=f"random-{name}-{seed}",
        tokenizer_revision="",
        vocab_size=config.vocab_size,
        max_tokens=config.max_position_embeddings,
    )
    alone = None
    if ranks is not None:
        alone = functools.partial(make_subject, name, fields, kv_format, seed=seed, device=device)
    return Subject(name=name, identity=identity, model=model, alone=alone)


def make_share(ranks: Ranks | None, device: str, *, fields: dict[str, Any], kv_format: KVFormat, seed: int) -> Model:
    """A rank's part of a random model; the whole model without ranks."""
    model = Model(ModelConfig.from_dict(fields), kv_format=kv_format).requires_grad_(False).eval()
    _randomize(model, seed)
    if ranks is not None:
        take_share(model, ranks)
    return model.to(device)


def _randomize(model: Model, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator)

    for name, weight in model.named_parameters():
        if "norm" in name or name.endswith("scale"):
            weight.copy_(1 + 0.2 * normal(weight))
        elif name.endswith(("base", "sinks", "position_bias")):
            weight.copy_(0.5 * normal(weight))
        else:
            weight.copy_(1.2 / weight.shape[-1] ** 0.5 * normal(weight))
    for name, table in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            table.copy_(0.3 * normal(table))
        elif name.endswith("tid2eid"):
            ranks = torch.rand(len(table), model.config.num_experts, generator=generator).argsort(-1)
            table.copy_(ranks[:, : table.shape[1]])
