"""transformers looks for a package called `kernels`. Our folder of that name on the path must not confuse it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.waiting import AT_MOST_S

pytestmark = pytest.mark.services


def test_transformers_works_with_our_folder_of_kernels_on_the_path():
    pytest.importorskip("transformers", reason="transformers is not installed")
    program = """
import antefix_kernels, torch
assert antefix_kernels.__doc__.startswith("Triton kernels")
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM
config = DeepseekV4Config(
    vocab_size=8, hidden_size=16, num_hidden_layers=1, head_dim=16, num_attention_heads=2, q_lora_rank=8, o_groups=1,
    o_lora_rank=8, moe_intermediate_size=8, n_routed_experts=2, num_experts_per_tok=1, num_hash_layers=0,
    index_n_heads=2, index_head_dim=16, layer_types=["sliding_attention"],
)
assert DeepseekV4ForCausalLM(config)(torch.zeros(1, 3, dtype=torch.long)).logits.shape == (1, 3, 8)
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=AT_MOST_S, check=False
    )
    assert run.returncode == 0, run.stderr
