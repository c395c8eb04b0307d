"""A model's config.json, checked and frozen. This module knows numbers and names, never tensors or weight files.

Reads what transformers' DeepseekV4Config writes, and the field names of released checkpoints (`compress_ratios`,
`num_hash_layers`, `qk_rope_head_dim`, `rope_scaling`). A config is computed as both references compute it, or refused
with the field's name, or loaded with a note. docs/MODEL_CONFIGS.md says which case applies where, and why.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from antefix.checked_files import read_json
from antefix.checked_table import finite, shown
from antefix.errors import InvalidRequest, ModelError
from antefix.layout import KVGeometry, other_model_type, per_layer
from antefix.rope import COUNT_MAX, NUMBER_MAX, RopeConfig, YarnScaling, read_ropes

__all__ = ["SCORING_FUNCTIONS", "ModelConfig", "Quantization", "RopeConfig", "YarnScaling", "read_config"]

# Not softmax: transformers cannot run it with V4, so there is nothing to compare our results with. (DeepSeek's own code
# normalises the experts' weights for the other functions, but not for softmax.)
SCORING_FUNCTIONS = ("sqrtsoftplus", "sigmoid")
# One head gives zero for half of the entries (ReLU). So with n heads about one score in 2^n is zero.
_FEW_HEADS = 8
# The released model runs 20 iterations. A limit, because each one is computed for every token.
_ITERATIONS_MAX = 1000
# Alternative names of two fields; transformers reads them too.
_ALIASES = {"moe_intermediate_size": "intermediate_size", "n_routed_experts": "num_local_experts"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """How the config says that weights are packed. Which tensors are packed is decided by the files, not by the config.

    block: rows and addends that share one FP8 scale.  expert_dtype: "fp4", "fp8", or empty if the config has none.
    """

    block: tuple[int, int] = (128, 128)
    expert_dtype: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Everything that the architecture needs. The kinds of layers and the sizes of KV are in `geometry`.

    hash_routed[l]: whether layer l's experts come from a token-id table instead of a learned top-k.
    eos_token_ids: any of them ends an answer.
    quantization: None: no weight may be packed.
    draft: "mtp" for the layer that predicts one token further ahead, "dspark" for later releases' modules, "" for none.
        num_draft_layers: how many draft layers there are.
    notes: fields that are ignored or computed differently from transformers; logged once when a model loads.
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
    quantization: Quantization | None = None
    draft: str = ""
    num_draft_layers: int = 0
    notes: tuple[str, ...] = ()

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
    # transformers writes "no limit" as Infinity. Each number is checked where it is read.
    config = read_json(file, "model config", error=ModelError, infinity=True)
    if not isinstance(config, dict):
        raise ModelError(f"{file} must hold one JSON object")
    return config


def _parse(config: Mapping[str, Any]) -> ModelConfig:
    if config.get("model_type") != "deepseek_v4":
        raise ModelError(other_model_type(config.get("model_type")))
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ModelError(f"config field hidden_act must be 'silu', is {config['hidden_act']!r}")
    _require(config, "num_key_value_heads", 1, 1)
    _require(config, "n_shared_experts", 1, 1)
    _require(config, "mlp_bias", False, False)
    _require(config, "is_causal", True, True)
    if config.get("per_layer_config"):
        raise ModelError(
            "config field per_layer_config cannot be honoured: here, all layers of one kind have the same shape"
        )
    geometry = KVGeometry.from_config(config)
    ropes = read_ropes(config, geometry.head_dim)
    quantization, quantization_notes = _quantization(config)
    draft, num_draft_layers = _draft(config)
    notes = ropes.notes + quantization_notes
    if _flag(config, "attention_bias"):
        notes += ("attention_bias is ignored, as transformers ignores it: V4's attention has no biases",)
    index_num_heads = _count(config, "index_n_heads", 64)
    if index_num_heads < _FEW_HEADS:
        notes += (
            f"index_n_heads is {index_num_heads}: with so few heads many index scores are exactly zero. Of entries"
            " with equal scores Antefix keeps the oldest; transformers keeps those that torch.topk returns",
        )
    parsed = ModelConfig(
        geometry=geometry,
        vocab_size=_count(config, "vocab_size", 129280),
        hidden_size=_count(config, "hidden_size", 4096),
        num_heads=_count(config, "num_attention_heads", 64),
        q_lora_rank=_count(config, "q_lora_rank", 1024),
        o_groups=_count(config, "o_groups", 8),
        o_lora_rank=_count(config, "o_lora_rank", 1024),
        index_num_heads=index_num_heads,
        index_topk=_count(config, "index_topk", 512),
        moe_intermediate_size=_count(config, "moe_intermediate_size", 2048),
        num_experts=_count(config, "n_routed_experts", 256),
        num_experts_per_token=_count(config, "num_experts_per_tok", 6),
        scoring_func=str(config.get("scoring_func", "sqrtsoftplus")),
        routed_scaling_factor=_number(config, "routed_scaling_factor", 1.5, zero=True),
        # Infinity: gates are not clamped.
        swiglu_limit=math.inf if config.get("swiglu_limit") == math.inf else _number(config, "swiglu_limit", 10.0),
        hash_routed=_hash_routed(config, geometry.num_layers),
        hc_mult=_count(config, "hc_mult", 4),
        # The first iteration always runs, in the references too, so 0 means 1.
        hc_sinkhorn_iters=max(_count(config, "hc_sinkhorn_iters", 20, least=0), 1),
        hc_eps=_number(config, "hc_eps", 1e-6, zero=True),
        rms_norm_eps=_number(config, "rms_norm_eps", 1e-6, zero=True),
        rope_main=ropes.main,
        rope_compress=ropes.compress,
        max_position_embeddings=_count(config, "max_position_embeddings", 1048576),
        bos_token_id=_bos(config.get("bos_token_id", 0)),
        eos_token_ids=_eos(config.get("eos_token_id", 1)),
        tie_word_embeddings=_flag(config, "tie_word_embeddings"),
        initializer_range=_number(config, "initializer_range", 0.02, zero=True),
        quantization=quantization,
        draft=draft,
        num_draft_layers=num_draft_layers,
        notes=notes,
    )
    _check(parsed)
    return parsed


def _check(config: ModelConfig) -> None:
    if config.hc_sinkhorn_iters > _ITERATIONS_MAX:
        raise ModelError(f"hc_sinkhorn_iters must be at most {_ITERATIONS_MAX}, is {config.hc_sinkhorn_iters}")
    if config.scoring_func not in SCORING_FUNCTIONS:
        raise ModelError(f"scoring_func must be one of {SCORING_FUNCTIONS}, is {config.scoring_func!r}")
    if config.num_experts_per_token > config.num_experts:
        raise ModelError(
            f"num_experts_per_tok {config.num_experts_per_token} exceeds n_routed_experts {config.num_experts}"
        )
    if config.num_heads * config.geometry.head_dim % config.o_groups:
        raise ModelError(f"o_groups {config.o_groups} must divide num_attention_heads times head_dim")
    if config.geometry.rope_dim > config.geometry.indexer_dim:
        raise ModelError(
            f"index_head_dim must be at least the {config.geometry.rope_dim} RoPE dims that partial_rotary_factor or"
            f" qk_rope_head_dim gives, is {config.geometry.indexer_dim}"
        )


def _require(config: Mapping[str, Any], name: str, default: object, wanted: object) -> None:
    if config.get(name, default) != wanted:
        raise ModelError(f"config field {name} must be {wanted!r}, is {config[name]!r}")


def _flag(config: Mapping[str, Any], name: str) -> bool:
    value = config.get(name, False)
    if not isinstance(value, bool):
        raise ModelError(f"config field {name} must be true or false, is {value!r}")
    return value


def _count(config: Mapping[str, Any], name: str, default: int, *, least: int = 1) -> int:
    value = config.get(name, default)
    alias = _ALIASES.get(name, "")
    if alias in config:
        if name in config and config[alias] != value:
            raise ModelError(
                f"config fields {name} ({value!r}) and {alias} ({config[alias]!r}) mean the same and must agree"
            )
        name, value = alias, config[alias]
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= COUNT_MAX:
        kind = "a positive" if least else "a non-negative"
        raise ModelError(f"config field {name} must be {kind} integer up to {COUNT_MAX}, is {shown(value)}")
    return value


def _number(config: Mapping[str, Any], name: str, default: float, *, zero: bool = False) -> float:
    value = config.get(name, default)
    if not finite(value) or not (0 < value <= NUMBER_MAX or (zero and value == 0)):
        kind = "zero or a positive" if zero else "a positive"
        raise ModelError(f"config field {name} must be {kind} number up to {NUMBER_MAX:g}, is {shown(value)}")
    return float(value)


def _quantization(config: Mapping[str, Any]) -> tuple[Quantization | None, tuple[str, ...]]:
    """`quantization_config` and `expert_dtype`, and a note if the config does not say how activations are rounded."""
    given = config.get("quantization_config")
    if not given:
        return None, ()
    if not isinstance(given, Mapping):
        raise ModelError(f"config field quantization_config must be an object, is {given!r:.100}")
    # The first value in each tuple is what a missing field means.
    for field, known in {"quant_method": ("fp8",), "fmt": ("e4m3",), "activation_scheme": ("dynamic",)}.items():
        if given.get(field, known[0]) not in known:
            raise ModelError(f"quantization_config.{field} must be {known[0]!r}, is {given[field]!r}")
    block = given.get("weight_block_size") or [128, 128]
    if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
        raise ModelError(f"quantization_config.weight_block_size must be two positive integers, is {block!r:.100}")
    expert_dtype = config.get("expert_dtype") or ""
    if expert_dtype not in ("", "fp4", "fp8"):
        raise ModelError(f"config field expert_dtype must be 'fp4' or 'fp8', is {expert_dtype!r}")
    notes: tuple[str, ...] = ()
    if given.get("scale_fmt") != "ue8m0":
        notes = (
            f"quantization_config.scale_fmt {given.get('scale_fmt')!r} is ignored: activations are rounded with"
            " power-of-two scales, as DeepSeek-V4's own code does by default",
        )
    return Quantization(block=(block[0], block[1]), expert_dtype=expert_dtype), notes


def _draft(config: Mapping[str, Any]) -> tuple[str, int]:
    number = config.get("num_nextn_predict_layers") or 0
    if type(number) is not int or number < 0:
        raise ModelError(f"config field num_nextn_predict_layers must be a non-negative integer, is {number!r}")
    if any(field.startswith("dspark_") for field in config):
        return "dspark", number
    return ("mtp", number) if number else ("", 0)


def _hash_routed(config: Mapping[str, Any], num_layers: int) -> tuple[bool, ...]:
    if (names := config.get("mlp_layer_types")) is not None:
        return tuple(
            name == "hash_moe" for name in per_layer("mlp_layer_types", names, num_layers, ("hash_moe", "moe"))
        )
    # transformers' default for configs of released checkpoints, which have a number instead of a list.
    num_hash = config.get("num_hash_layers")
    if num_hash is None:
        num_hash = 3
    if not isinstance(num_hash, int):
        raise ModelError(f"config field num_hash_layers must be an integer, is {num_hash!r}")
    return tuple(layer < num_hash for layer in range(num_layers))


def _bos(value: object) -> int | None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise ModelError(f"config field bos_token_id must be a token id, is {value!r}")
    return value


def _eos(value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    ids = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise ModelError(f"eos_token_id must be token ids, is {value!r}")
    return tuple(ids)
