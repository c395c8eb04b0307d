"""Antefix's logits equal transformers' for whole prompts, prompts cut anywhere, and decoding token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from antefix.layout import KVFormat
from antefix.model import BlockPool, Model, WindowState, forward, load_model
from antefix.model import Sequence as ModelSequence

pytestmark = pytest.mark.slow

PLANS = ("flash", "pro", "small_ratios", "odd_ratios", "coprime_ratios")
LENGTHS = {"flash": 301, "pro": 150, "small_ratios": 90, "odd_ratios": 77, "coprime_ratios": 61}
FORMATS = {torch.float64: KVFormat.FLOAT64, torch.float32: KVFormat.FLOAT32}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}

Checkpoint = Callable[[str], Path]
Oracle = Callable[[str, np.ndarray, torch.dtype], torch.Tensor]
Prompt = Callable[[int], np.ndarray]


def run(model: Model, tokens: np.ndarray, cuts: Sequence[int]) -> torch.Tensor:
    """All logits of a prompt, computed in chunks that end at `cuts`."""
    size = model.config.geometry.block_size
    pool = BlockPool(model.layout, -(-len(tokens) // size))
    sequence = ModelSequence(pool.allocate(pool.num_blocks), WindowState.zeros(model.layout, 0))
    ends = [*cuts, len(tokens)]
    starts = [0, *cuts]
    pieces = [
        forward(model, pool, [(sequence, tokens[a:b])], logits="all")
        for a, b in zip(starts, ends, strict=True)
        if a < b
    ]
    return torch.cat(pieces)


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    error = (got - want).abs().max() / want.abs().max()
    assert error < TOLERANCE[want.dtype], f"relative error {error:.2e}"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("plan", PLANS)
def test_whole_prefill_chunks_and_decode_give_transformers_logits(
    checkpoint: Checkpoint, oracle_logits: Oracle, prompt: Prompt, plan: str, dtype: torch.dtype
) -> None:
    tokens = prompt(LENGTHS[plan])
    want = oracle_logits(plan, tokens, dtype)
    model = load_model(checkpoint(plan), dtype=dtype, kv_format=FORMATS[dtype])
    assert_close(run(model, tokens, []), want)
    # Decode after a whole prefill, and after a prefill in odd chunks.
    tail = list(range(len(tokens) - 20, len(tokens)))
    assert_close(run(model, tokens, tail), want)
    assert_close(run(model, tokens, [1, 2, 7, 31, 32, *tail]), want)


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_a_prompt_cut_at_any_one_position_gives_transformers_logits(
    checkpoint: Checkpoint, oracle_logits: Oracle, prompt: Prompt, plan: str
) -> None:
    tokens = prompt(44)
    want = oracle_logits(plan, tokens, torch.float64)
    model = load_model(checkpoint(plan), dtype=torch.float64, kv_format=KVFormat.FLOAT64)
    for cut in range(1, len(tokens)):
        assert_close(run(model, tokens, [cut]), want)


@pytest.mark.slow
def test_token_by_token_from_the_start_gives_transformers_own_decode(checkpoint: Checkpoint, prompt: Prompt) -> None:
    transformers = pytest.importorskip("transformers")
    path = checkpoint("small_ratios")
    oracle = transformers.DeepseekV4ForCausalLM.from_pretrained(path, attn_implementation="eager")
    tokens = prompt(40)
    past, want = None, []
    with torch.no_grad():
        for token in tokens:
            output = oracle(input_ids=torch.tensor([[int(token)]]), past_key_values=past, use_cache=True)
            past = output.past_key_values
            want.append(output.logits[0, -1])
    model = load_model(path, kv_format=KVFormat.FLOAT32)
    assert_close(run(model, tokens, list(range(1, len(tokens)))), torch.stack(want))


def test_transformers_own_float64_run_agrees_as_far_as_its_float32_steps_allow(
    checkpoint: Checkpoint, prompt: Prompt
) -> None:
    transformers = pytest.importorskip("transformers")
    path = checkpoint("pro")
    oracle = transformers.DeepseekV4ForCausalLM.from_pretrained(
        path, attn_implementation="eager", experts_implementation="eager"
    )
    oracle = oracle.double()
    tokens = prompt(100)
    with torch.no_grad():
        want = oracle(input_ids=torch.from_numpy(tokens.astype("i8"))[None]).logits[0]
    model = load_model(path, dtype=torch.float64, kv_format=KVFormat.FLOAT64)
    error = (run(model, tokens, []) - want).abs().max() / want.abs().max()
    assert error < 1e-5
