"""Small random models that vLLM can run on any machine, and vLLM's arguments to run them with the tier."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

VOCAB_SIZE: Final = 1024

# Shapes that vLLM's V4 kernels accept, in five layers: two of windows, two of CSA, one of HCA.
_V4: Final = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "num_hidden_layers": 5,
    "compress_ratios": [0, 0, 4, 128, 4],
    "num_hash_layers": 2,
    "hidden_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 128,
    "o_lora_rank": 128,
    "o_groups": 2,
    "sliding_window": 128,
    "index_n_heads": 8,
    "index_head_dim": 128,
    "index_topk": 512,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "moe_intermediate_size": 64,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 6,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "swiglu_limit": 10.0,
    "hidden_act": "silu",
    "num_nextn_predict_layers": 0,
    "rope_theta": 10000.0,
    "compress_rope_theta": 160000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "beta_fast": 32,
        "beta_slow": 1,
        "original_max_position_embeddings": 65536,
    },
}
_LLAMA: Final = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 3,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
}
_DEEPSEEK_V2: Final = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "num_hidden_layers": 2,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "first_k_dense_replace": 2,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
}
_GEMMA3: Final = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
    "sliding_window": 64,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "query_pre_attn_scalar": 64,
    "hidden_activation": "gelu_pytorch_tanh",
    "rope_theta": 10000.0,
    "rope_local_base_freq": 10000.0,
}
COMMON: Final = {
    "vocab_size": VOCAB_SIZE,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "torch_dtype": "bfloat16",
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "max_position_embeddings": 65536,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckModel:
    """config: of a random model.  llm: arguments that vLLM needs for it in addition to `llm_arguments`.

    hit_tokens: hits are multiples of this.  faults: faults to plant; each must change an answer.  tries_ends: also try
    a prompt that ends at the end of a block.  hits_are_cold: vLLM's own hits equal its cold runs.
    """

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    llm: dict[str, Any] = field(default_factory=dict)
    hit_tokens: int
    faults: tuple[str, ...]
    tries_ends: bool = False
    hits_are_cold: bool = True


V4: Final = CheckModel(
    name="V4",
    config=_V4,
    llm={"block_size": 256, "kv_cache_dtype": "fp8", "prefix_cache_retention_interval": 256},
    hit_tokens=256,
    faults=("window", "csa_state", "csa_main", "hca_main"),
    tries_ends=True,
)
PLAIN: Final = CheckModel(
    name="plain attention", config=_LLAMA, llm={"block_size": 32}, hit_tokens=32, faults=("group-0",)
)
MLA: Final = CheckModel(
    name="MLA",
    config=_DEEPSEEK_V2,
    llm={"block_size": 32},
    hit_tokens=32,
    faults=("group-0",),
    # The kernel that reads cached latents is not the one for latents that were just computed.
    hits_are_cold=False,
)
HYBRID: Final = CheckModel(
    name="sliding windows",
    config=_GEMMA3,
    llm={"block_size": 32, "prefix_cache_retention_interval": 256},
    hit_tokens=32,
    faults=("group-0", "group-1"),
)


def write_model(model: CheckModel, directory: Path) -> Path:
    """A folder that vLLM takes with `load_format="dummy"`: a config and no weights."""
    path = directory / model.name.replace(" ", "-")
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(COMMON | model.config))
    return path


def llm_arguments(
    model: CheckModel, path: Path, tiers: list[dict[str, Any]], *, spec: str = "AntefixSpec", host_bytes: int = 64 << 20
) -> dict[str, Any]:
    """Arguments of `vllm.LLM`. Prompts run in chunks of 512 tokens, so that cold and restored runs are alike."""
    extra: dict[str, Any] = {"spec_name": spec, "cpu_bytes_to_use": host_bytes, "secondary_tiers": tiers}
    if spec == "AntefixSpec":
        extra["spec_module_path"] = "antefix_engines.vllm.spec"
    return {
        "model": str(path),
        "skip_tokenizer_init": True,
        "load_format": "dummy" if model.config else "auto",
        "dtype": "bfloat16",
        "max_model_len": 2048,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 512,
        "enforce_eager": True,
        "enable_prefix_caching": True,
        "disable_hybrid_kv_cache_manager": False,
        "disable_log_stats": False,
        "seed": 0,
        "kv_transfer_config": {
            "kv_connector": "OffloadingConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": extra,
        },
    } | model.llm


def antefix_tier(directory: Path, **more: Any) -> dict[str, Any]:
    """The tier's entry in vLLM's configuration."""
    return {
        "type": "AntefixTier",
        "module_path": "antefix_engines.vllm.tier",
        "directory": str(directory),
        "budget_bytes": "2G",
        "lookup_wait_s": 60.0,
    } | more
