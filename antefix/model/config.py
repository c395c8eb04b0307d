"""A model's config.json, checked and frozen. Knows numbers and names, never tensors or files of weights.

Reads what transformers' DeepseekV4Config writes and the spellings of released checkpoints (`compress_ratios`,
`num_hash_layers`, `qk_rope_head_dim`, `rope_scaling`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from antefix.errors import InvalidRequest, ModelError
from antefix.layout import KVGeometry

SCORING_FUNCTIONS = ("sqrtsoftplus", "softmax", "sigmoid")


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnScaling:
    """YaRN's stretch of the compressed branches' RoPE (arXiv 2309.00071); no attention factor in V4."""

    factor: float
    original_max_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """One RoPE: its base and, where contexts are stretched, how. `attention_factor` scales cos and sin."""

    theta: float
    yarn: YarnScaling | None = None
    attention_factor: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Everything the architecture needs. Layer kinds and KV sizes live in `geometry`.

    hash_routed[l]: layer l's experts come from a token-id table instead of a learned top-k.
    eos_token_ids: any of them ends an answer.
    """

    geometry: KVGeometry
    vocab_size: int
    hidden_size: int
    num_heads: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    index_num_heads: int
    index_topk: int
    moe_intermediate_size: int
    num_experts: int
    num_experts_per_token: int
    scoring_func: str
    routed_scaling_factor: float
    swiglu_limit: float
    hash_routed: tuple[bool, ...]
    hc_mult: int
    hc_sinkhorn_iters: int
    hc_eps: float
    rms_norm_eps: float
    rope_main: RopeConfig
    rope_compress: RopeConfig
    max_position_embeddings: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    @property
    def num_layers(self) -> int:
        return self.geometry.num_layers

    @classmethod
    def from_dir(cls, path: str | Path) -> ModelConfig:
        """Read `path`/config.json.

        Raises:  ModelError: missing, not JSON, another model type, or a field that makes no sense.
        """
        return cls.from_dict(read_config(path))

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Raises:  ModelError: another model type, or a field that is missing or makes no sense."""
        try:
            return _parse(config)
        except ModelError:
            raise
        except (InvalidRequest, KeyError, TypeError, ValueError) as err:
            raise ModelError(f"config.json: {err}") from err


def read_config(path: str | Path) -> dict[str, Any]:
    """The parsed config.json of a model directory. Raises ModelError."""
    file = Path(path) / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as err:
        raise ModelError(f"cannot read {file}: {err}") from err
    if not isinstance(config, dict):
        raise ModelError(f"{file} must hold one JSON object")
    return config


def _parse(config: Mapping[str, Any]) -> ModelConfig:
    if config.get("model_type") != "deepseek_v4":
        raise ModelError(f"model_type must be deepseek_v4, is {config.get('model_type')!r}")
    if config.get("quantization_config"):
        raise ModelError("quantised checkpoints cannot be loaded; convert the weights to bfloat16 or float32 first")
    _require(config, "hidden_act", "silu", "silu")
    _require(config, "num_key_value_heads", 1, 1)
    _require(config, "n_shared_experts", 1, 1)
    for name in ("attention_bias", "mlp_bias"):
        _require(config, name, False, False)
    geometry = KVGeometry.from_config(config)
    parsed = ModelConfig(
        geometry=geometry,
        vocab_size=_count(config, "vocab_size", 129280),
        hidden_size=_count(config, "hidden_size", 4096),
        num_heads=_count(config, "num_attention_heads", 64),
        q_lora_rank=_count(config, "q_lora_rank", 1024),
        o_groups=_count(config, "o_groups", 8),
        o_lora_rank=_count(config, "o_lora_rank", 1024),
        index_num_heads=_count(config, "index_n_heads", 64),
        index_topk=_count(config, "index_topk", 512),
        moe_intermediate_size=_count(config, "moe_intermediate_size", 2048),
        num_experts=_count(config, "n_routed_experts", 256),
        num_experts_per_token=_count(config, "num_experts_per_tok", 6),
        scoring_func=str(config.get("scoring_func", "sqrtsoftplus")),
        routed_scaling_factor=_number(config, "routed_scaling_factor", 1.5),
        swiglu_limit=_number(config, "swiglu_limit", 10.0),
        hash_routed=_hash_routed(config, geometry.num_layers),
        hc_mult=_count(config, "hc_mult", 4),
        hc_sinkhorn_iters=_count(config, "hc_sinkhorn_iters", 20),
        hc_eps=_number(config, "hc_eps", 1e-6),
        rms_norm_eps=_number(config, "rms_norm_eps", 1e-6),
        rope_main=_rope(config, "main", _number(config, "rope_theta", 10000.0)),
        rope_compress=_rope(config, "compress", _number(config, "compress_rope_theta", 160000.0)),
        max_position_embeddings=_count(config, "max_position_embeddings", 1048576),
        bos_token_id=config.get("bos_token_id", 0),
        eos_token_ids=_eos(config.get("eos_token_id", 1)),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        initializer_range=_number(config, "initializer_range", 0.02),
    )
    _check(parsed)
    return parsed


def _check(config: ModelConfig) -> None:
    if config.scoring_func not in SCORING_FUNCTIONS:
        raise ModelError(f"scoring_func must be one of {SCORING_FUNCTIONS}, is {config.scoring_func!r}")
    if config.num_experts_per_token > config.num_experts:
        raise ModelError(f"num_experts_per_tok {config.num_experts_per_token} exceeds {config.num_experts} experts")
    if config.num_heads * config.geometry.head_dim % config.o_groups:
        raise ModelError(f"o_groups {config.o_groups} must divide heads times head_dim")
    if config.geometry.rope_dim > config.geometry.indexer_dim:
        raise ModelError(f"index_head_dim must be at least the RoPE dim {config.geometry.rope_dim}")


def _require(config: Mapping[str, Any], name: str, default: object, wanted: object) -> None:
    if config.get(name, default) != wanted:
        raise ModelError(f"config field {name} must be {wanted!r}, is {config[name]!r}")


def _count(config: Mapping[str, Any], name: str, default: int) -> int:
    value = config.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"config field {name} must be a positive integer, is {value!r}")
    return value


def _number(config: Mapping[str, Any], name: str, default: float) -> float:
    value = config.get(name, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise ModelError(f"config field {name} must be a positive number, is {value!r}")
    return float(value)


def _hash_routed(config: Mapping[str, Any], num_layers: int) -> tuple[bool, ...]:
    if names := config.get("mlp_layer_types"):
        unknown = sorted(set(names) - {"hash_moe", "moe"})
        if unknown or len(names) < num_layers:
            raise ModelError(f"mlp_layer_types must name {num_layers} of hash_moe, moe; unknown: {unknown}")
        return tuple(name == "hash_moe" for name in names[:num_layers])
    # transformers' default for configs of released checkpoints, which give a number instead.
    num_hash = int(config.get("num_hash_layers", 3))
    return tuple(layer < num_hash for layer in range(num_layers))


def _rope(config: Mapping[str, Any], label: str, theta: float) -> RopeConfig:
    """`label` is main (window-only layers: never scaled) or compress (CSA, HCA and indexer)."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    nested = given.get(label)
    params: Mapping[str, Any] = nested if isinstance(nested, Mapping) else given
    if nested is None and label == "main":
        return RopeConfig(theta=theta)
    kind = params.get("rope_type", params.get("type", "default"))
    theta = float(params.get("rope_theta", theta)) if nested is not None else theta
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind != "yarn":
        raise ModelError(f"rope type of {label} must be default or yarn, is {kind!r}")
    yarn = YarnScaling(
        factor=_number(params, "factor", 1.0),
        original_max_positions=_count(params, "original_max_position_embeddings", 65536),
        beta_fast=_number(params, "beta_fast", 32.0),
        beta_slow=_number(params, "beta_slow", 1.0),
    )
    return RopeConfig(theta=theta, yarn=yarn, attention_factor=float(params.get("attention_factor", 1.0)))


def _eos(value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    ids = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise ModelError(f"eos_token_id must be token ids, is {value!r}")
    return tuple(ids)
