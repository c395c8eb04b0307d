"""Models that workers in tests serve: random, with every kind of layer, at a quarter of the shipped model's cost.

Blocks, window and tokenizer are the shipped model's, so tests count the same tokens.

    small_worker_model    any tokens, so its text may not be what the tokens were
    small_text_model      printable ASCII: a client that resends its text resends its tokens. It never ends, so an
                          answer has the same length on any processor
"""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
import weakref
from collections.abc import Callable
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
# Greater than the other tokens' logit of 0, so that these are never drawn at a temperature of 1.
TEXT_SCALE = 8.0


@functools.cache
def small_worker_model() -> Path:
    """The model's directory, which is written once per process."""
    return _written(small_worker_model, "antefix-small", _random_parameters)


@functools.cache
def small_text_model() -> Path:
    """The model's directory, which has the shipped model's name, so that clients ask for it by that name."""

    def parameters(config: dict[str, Any]) -> dict[str, Any]:
        made = _random_parameters(config)
        head = made["lm_head.weight"]
        text = slice(ord(" "), ord("~") + 1)
        scaled = head[text] * TEXT_SCALE
        head.zero_()
        head[text] = scaled
        return made

    return _written(small_text_model, SHIPPED.name, parameters)


def _random_parameters(config: dict[str, Any]) -> dict[str, Any]:
    from models.training.parameters import initial_parameters

    return initial_parameters(config, seed=1, noise=0.3)


def _written(owner: Any, name: str, parameters: Callable[[dict[str, Any]], dict[str, Any]]) -> Path:
    """owner: the files are deleted with it, at the end of the process."""
    from models.training.parameters import save_parameters

    shipped = json.loads((SHIPPED / "config.json").read_text())
    kinds = {key: [shipped[key][layer] for layer in LAYERS] for key in ("layer_types", "mlp_layer_types")}
    config = shipped | SIZES | kinds | {"num_hidden_layers": len(LAYERS)}
    parent = Path(tempfile.mkdtemp(prefix="antefix-model-"))
    weakref.finalize(owner, shutil.rmtree, parent, ignore_errors=True)
    directory = parent / name
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    shutil.copy(SHIPPED / "antefix_tokenizer.json", directory)
    save_parameters(parameters(config), directory / "model.safetensors")
    return directory
