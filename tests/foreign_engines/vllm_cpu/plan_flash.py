"""Prints vLLM's own plan of V4-Flash's KV cache as JSON. vLLM's planner makes it without weights or a card.

Layers and their specs are those of Flash's config (43 layers, ratios 0, 0, then 4 and 128 in turn), as vLLM's V4 model
makes them (vllm/models/deepseek_v4/attention.py, compressor.py).
"""

import json
from types import SimpleNamespace

import torch
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_interface import MLAAttentionSpec, SlidingWindowMLASpec

try:
    from vllm.v1.core import kv_cache_planning as planning
except ImportError:
    planning = kv_cache_utils

V4 = {"alignment": 576, "model_version": "deepseek_v4"}
ENTRIES = {
    "num_kv_heads": 1,
    "head_size": 512,
    "dtype": torch.uint8,
    "cache_dtype_str": "fp8_ds_mla",
    "state_content_bytes": 584,
} | V4


def state(tokens, width, window):
    return SlidingWindowMLASpec(
        block_size=tokens, num_kv_heads=1, head_size=width, dtype=torch.float32, sliding_window=window, alignment=576
    )


def specs():
    found = {}
    for layer in range(43):
        ratio = 0 if layer < 2 else 4 if layer % 2 == 0 else 128
        prefix = f"model.layers.{layer}.attn"
        found[f"{prefix}.swa_cache"] = SlidingWindowMLASpec(block_size=64, sliding_window=128, **ENTRIES)
        if ratio:
            found[prefix] = MLAAttentionSpec(block_size=256, tokens_per_state=ratio, **ENTRIES)
            width, tokens, window = (2048, 4, 8) if ratio == 4 else (1024, 8, 128)
            found[f"{prefix}.compressor.state_cache"] = state(tokens, width, window)
        if ratio == 4:
            found[f"{prefix}.indexer.k_cache"] = MLAAttentionSpec(
                block_size=256, num_kv_heads=1, head_size=132, dtype=torch.uint8, tokens_per_state=4, alignment=576
            )
            found[f"{prefix}.indexer.compressor.state_cache"] = state(4, 512, 8)
    return found


def main():
    layout = SimpleNamespace(is_block_outermost=True)
    config = SimpleNamespace(
        speculative_config=None, cache_config=SimpleNamespace(get_resolved_kv_cache_layout=lambda: layout)
    )
    groups = planning._get_packed_kv_cache_groups(config, specs())
    rows = []
    for number, group in enumerate(groups):
        by_layer = group.kv_cache_spec.kv_cache_specs
        first = next(iter(by_layer.values()))
        window = getattr(first, "sliding_window", None)
        rows.append(
            {
                "id": number,
                "num_tokens": first.block_size,
                "layers": list(by_layer),
                "page_bytes": sum(spec.page_size_bytes for spec in by_layer.values()),
                "used_bytes": sum(spec.unpadded_page_size_bytes for spec in by_layer.values()),
                "num_window_rows": -(-window // first.block_size) if window else 0,
            }
        )
    print(json.dumps({"row_bytes": max(row["page_bytes"] for row in rows), "groups": rows}, indent=1))


if __name__ == "__main__":
    main()
