"""A model of window-only layers: only a prefix's last windows matter, and hits still equal cold runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from antefix.layout import KVFormat
from antefix.model import Model, ModelConfig, init_weights, save_model
from antefix.window_pool import DISK
from antefix_console.bare_model import Reference
from antefix_console.deployment import Deployment

SOURCE = Path(__file__).parents[2] / "models" / "antefix-tiny"
QUESTION = np.frombuffer(b"And then?", np.uint8).astype(np.uint32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("window-only")
    shutil.copy(SOURCE / "antefix_tokenizer.json", path)
    config = json.loads((SOURCE / "config.json").read_text()) | {
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention"] * 3,
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "hidden_size": 64,
        "sliding_window": 40,
        "initializer_range": 0.2,
    }
    fresh = Model(ModelConfig.from_dict(config)).requires_grad_(False)
    save_model(init_weights(fresh, seed=1), path, config=config)
    return path


async def test_hits_from_memory_and_disk_equal_cold_runs(make_config, ask, document, model):
    reference = Reference(model, KVFormat.FP8)
    config = make_config(strategy="boundary", window_pool=DISK, model=model)
    fork, longer = np.concatenate((document[:1500], QUESTION)), np.concatenate((document, QUESTION))
    async with Deployment(config) as deployment:
        await ask(deployment, document, max_tokens=2)
        output, last = await ask(deployment, fork)
        assert output == reference.generate(fork, 24)
        assert (last.usage.cache_hit_tokens, last.restore.plan) == (1472, "replay")
        assert last.restore.replayed_tokens == 128  # 3 * 39 + 1, in blocks of 64
    async with Deployment(config) as deployment:
        output, last = await ask(deployment, longer)
        assert output == reference.generate(longer, 24)
        assert (last.usage.cache_hit_tokens, last.restore.plan) == (2496, "checkpoint")
        assert last.restore.hit_store_tokens == 2496
