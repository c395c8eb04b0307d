"""A model that workers in tests serve: random, with every kind of layer, at a quarter of the shipped model's cost.

Blocks, window and tokenizer are the shipped model's, so tests count the same tokens.
"""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

SHIPPED = Path(__file__).parents[1] / "models" / "antefix-tiny"
SIZES: dict[str, Any] = {
    "hidden_size": 64, "q_lora_rank": 32, "o_lora_rank": 16, "moe_intermediate_size": 32, "n_routed_experts": 4,
    "head_dim": 64, "num_attention_heads": 2, "index_n_heads": 16, "index_head_dim": 32, "index_topk": 24, "hc_mult": 2,
    "hc_sinkhorn_iters": 4,
}  # fmt: skip
# One layer of each kind, the hash layer first. A prompt of 400 tokens has four times as many CSA entries as are chosen.
LAYERS = (0, 2, 3)


@functools.cache
def small_worker_model() -> Path:
    """The model's directory, which is written once per process."""
    from models.training.parameters import initial_parameters, save_parameters

    shipped = json.loads((SHIPPED / "config.json").read_text())
    kinds = {key: [shipped[key][layer] for layer in LAYERS] for key in ("layer_types", "mlp_layer_types")}
    config = shipped | SIZES | kinds | {"num_hidden_layers": len(LAYERS)}
    directory = Path(tempfile.mkdtemp(prefix="antefix-model-"))
    weakref.finalize(small_worker_model, shutil.rmtree, directory, ignore_errors=True)
    (directory / "config.json").write_text(json.dumps(config))
    shutil.copy(SHIPPED / "antefix_tokenizer.json", directory)
    save_parameters(initial_parameters(config, seed=1, noise=0.3), directory / "model.safetensors")
    return directory
