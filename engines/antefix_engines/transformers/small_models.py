"""Tiny models with random weights, one for each way in which transformers keeps KV. Used by checks only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
import transformers

# Small enough to compute in milliseconds; the dimensions differ, so that mixing two of them up is noticed.
_DENSE: Final = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 4096,
}
# Random weights of the usual size are so small that a tiny model's logits hardly depend on its KV.
_SPREAD: Final = 0.2
BLOCK_SIZE: Final = 32


def _llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=3, **_DENSE))


def _qwen3() -> Any:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(num_hidden_layers=3, **_DENSE))


def _mistral() -> Any:
    """All layers have a window, of more than two blocks."""
    config = transformers.MistralConfig(num_hidden_layers=3, sliding_window=70, **_DENSE)
    return transformers.MistralForCausalLM(config)


def _gemma3() -> Any:
    """Five layers with a window of less than a block, then one without."""
    config = transformers.Gemma3TextConfig(num_hidden_layers=6, sliding_window=20, **_DENSE)
    return transformers.Gemma3ForCausalLM(config)


def _deepseek_v3() -> Any:
    """MLA: latents and RoPE keys of different widths."""
    config = transformers.DeepseekV3Config(
        **{name: _DENSE[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")},
        num_hidden_layers=2,
        num_key_value_heads=4,
        moe_intermediate_size=32,
        kv_lora_rank=32,
        q_lora_rank=32,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
    )
    return transformers.DeepseekV3ForCausalLM(config)


def _deepseek_v4() -> Any:
    """Window, CSA and HCA layers; a block holds two HCA entries."""
    config = transformers.DeepseekV4Config(
        vocab_size=320,
        hidden_size=64,
        num_hidden_layers=4,
        head_dim=32,
        num_attention_heads=2,
        q_lora_rank=32,
        o_groups=1,
        o_lora_rank=32,
        moe_intermediate_size=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        num_hash_layers=0,
        index_n_heads=2,
        index_head_dim=16,
        index_topk=8,
        sliding_window=20,
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 16},
        layer_types=[
            "sliding_attention",
            "compressed_sparse_attention",
            "heavily_compressed_attention",
            "compressed_sparse_attention",
        ],
    )
    return transformers.DeepseekV4ForCausalLM(config)


SMALL: Final[dict[str, Callable[[], Any]]] = {
    "llama": _llama,
    "qwen3": _qwen3,
    "mistral": _mistral,
    "gemma3": _gemma3,
    "deepseek_v3": _deepseek_v3,
    "deepseek_v4": _deepseek_v4,
}


def write_v4(directory: Path, *, num_experts: int = 8, seed: int = 0) -> Path:
    """A V4 checkpoint of five layers with random weights, in the shapes that vLLM's kernels take (with 256 experts)."""
    w, c, h = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
    config = transformers.DeepseekV4Config(
        vocab_size=1024,
        hidden_size=256,
        num_hidden_layers=5,
        layer_types=[w, w, c, h, c],
        compress_rates={c: 4, h: 128},
        num_attention_heads=8,
        head_dim=512,
        partial_rotary_factor=0.125,
        q_lora_rank=128,
        o_lora_rank=128,
        o_groups=2,
        sliding_window=128,
        index_n_heads=8,
        index_head_dim=128,
        index_topk=512,
        moe_intermediate_size=64,
        n_routed_experts=num_experts,
        num_experts_per_tok=6,
        num_hash_layers=2,
        max_position_embeddings=65536,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = transformers.DeepseekV4ForCausalLM(config)
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(std=weight.shape[-1] ** -0.5)
            elif "norm" not in name:
                weight.normal_(std=0.1)
        for name, table in model.named_buffers():
            if name.endswith("tid2eid"):
                picked = torch.rand(len(table), num_experts).argsort(-1)[:, : table.shape[1]]
                table.copy_(picked)
        model.save_pretrained(str(directory))
    return directory


def small_model(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """One of SMALL. The random generator of the process keeps its state."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = SMALL[name]()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=_SPREAD)
    return model.to(dtype).eval()
