"""A model of a few thousand parameters with every kind of layer, and a small text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from models.training.corpus import Tokens
from models.training.parameters import Parameters, initial_parameters, save_parameters
from models.training.tasks import encode

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def config() -> dict[str, Any]:
    """A smaller version of antefix-tiny's config. It keeps many index heads, so that no scores are equal."""
    config: dict[str, Any] = json.loads((ROOT / "models/antefix-tiny/config.json").read_text())
    sizes = {"hidden_size": 32, "q_lora_rank": 16, "o_lora_rank": 8, "moe_intermediate_size": 16, "index_topk": 6}
    return (
        config
        | sizes
        | {"sliding_window": 16, "head_dim": 32, "num_attention_heads": 2, "index_head_dim": 32}
        | {
            "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 16},
            "partial_rotary_factor": 0.5,
            "index_n_heads": 32,
            "num_hidden_layers": 4,
            "layer_types": config["layer_types"][:4],
            "mlp_layer_types": config["mlp_layer_types"][:4],
            "rope_parameters": {
                label: parameters | {"partial_rotary_factor": 0.5}
                for label, parameters in config["rope_parameters"].items()
            },
        }
    )


@pytest.fixture(scope="session")
def parameters(config: dict[str, Any]) -> Parameters:
    return initial_parameters(config, seed=1, noise=0.3)


@pytest.fixture(scope="session")
def model_dir(config: dict[str, Any], parameters: Parameters, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model as a directory."""
    directory = tmp_path_factory.mktemp("small")
    (directory / "config.json").write_text(json.dumps(config))
    save_parameters(parameters, directory / "model.safetensors", dtype=torch.float32)
    return directory


@pytest.fixture(scope="session")
def text() -> Tokens:
    return encode("".join(f"line {i}: the quick brown fox jumps over {i * i} lazy dogs\n" for i in range(400)))
