"""transformers looks for a package called `kernels`. Our folder of that name on the path must not confuse it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tests.on_demand import transformers

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_transformers_works_with_our_folder_of_kernels_on_the_path():
    assert ROOT in [Path(entry).resolve() for entry in sys.path]
    assert (ROOT / "kernels").is_dir()
    config = transformers.DeepseekV4Config(
        vocab_size=8, hidden_size=16, num_hidden_layers=1, head_dim=16, num_attention_heads=2, q_lora_rank=8,
        o_groups=1, o_lora_rank=8, moe_intermediate_size=8, n_routed_experts=2, num_experts_per_tok=1,
        num_hash_layers=0, index_n_heads=2, index_head_dim=16, layer_types=["sliding_attention"],
    )  # fmt: skip
    model = transformers.DeepseekV4ForCausalLM(config)
    assert model(torch.zeros(1, 3, dtype=torch.long)).logits.shape == (1, 3, 8)
