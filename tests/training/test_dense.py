"""The training forward pass agrees with the serving one, and its losses affect only the right parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from antefix.layout import BlockLayout, KVFormat, KVGeometry
from antefix.model import quant
from antefix.model.model_config import ModelConfig
from models.training import dense
from models.training.cached import CachedModel
from models.training.dense_attention import DenseOptions
from models.training.dense_rounding import round_entries, round_keys
from models.training.parameters import Parameters, trainable

NUM_TOKENS = 128


def run(
    config: dict[str, Any], parameters: Parameters, tokens: torch.Tensor, options: DenseOptions, num_rows: int = 0
) -> tuple[torch.Tensor, list[dense.DenseLayer]]:
    model_config = ModelConfig.from_dict(config)
    rope = dense.rope_tables(model_config, tokens.shape[1], tokens.device)
    rows = torch.arange(num_rows).expand(tokens.shape[0], -1) + 64
    return dense.forward(parameters, model_config, tokens, options=options, rope=rope, rows=rows)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 256, (2, NUM_TOKENS), generator=torch.Generator().manual_seed(5))


def test_dense_forward_equals_the_cached_one_in_float32(
    config: dict[str, Any], parameters: Parameters, model_dir: Path, tokens: torch.Tensor
) -> None:
    logits, _ = run(config, parameters, tokens, DenseOptions(topk=config["index_topk"], quantise=False))
    model = CachedModel(model_dir, num_tokens_max=NUM_TOKENS, kv_format=KVFormat.FLOAT32)
    cached = model.extend(model.start(), tokens[0].numpy().astype(np.uint16))
    torch.testing.assert_close(logits[0], cached, atol=2e-4, rtol=1e-4)


def test_dense_forward_rounds_as_the_cache_stores(
    config: dict[str, Any], parameters: Parameters, model_dir: Path, tokens: torch.Tensor
) -> None:
    options = DenseOptions(topk=config["index_topk"], quantise=True)
    logits, _ = run(config, parameters, tokens, options)
    plain, _ = run(config, parameters, tokens, DenseOptions(topk=config["index_topk"], quantise=False))
    model = CachedModel(model_dir, num_tokens_max=NUM_TOKENS)
    cached = model.extend(model.start(), tokens[0].numpy().astype(np.uint16))
    # Sums in another order move a few values across a rounding boundary, which is small compared with rounding itself.
    assert (logits[0] - cached).abs().mean() < 0.1 * (plain[0] - cached).abs().mean()


def test_straight_through_rounding_gives_the_served_values(config: dict[str, Any]) -> None:
    layout = BlockLayout(geometry=KVGeometry.from_config(config | {"head_dim": 128}), kv_format=KVFormat.FP8)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 128, generator=generator) * torch.logspace(-6, 3, 500)[:, None]
    x[0] = 0
    # A float cannot hold x + (rounded - x) exactly. The error of one part in 2^20 is far below FP8's step.
    torch.testing.assert_close(
        round_entries(x, layout.geometry.rope_dim, enabled=True), quant.round_entries(x, layout), rtol=1e-6, atol=1e-12
    )
    keys = x[:, : layout.geometry.indexer_dim]
    served = quant.round_queries(keys, layout)
    ours = round_keys(keys, enabled=True)
    # Training rotates by a matrix product, serving by butterflies, so a value next to a boundary may round either way.
    assert torch.isclose(ours, served, rtol=1e-5, atol=1e-12).float().mean() > 0.999


def test_rounding_passes_gradients_through() -> None:
    x = torch.randn(3, 64, requires_grad=True)
    round_entries(x, 16, enabled=True).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_index_loss_moves_nothing_but_the_indexer(
    config: dict[str, Any], parameters: Parameters, tokens: torch.Tensor
) -> None:
    copies = {name: value.clone() for name, value in parameters.items()}
    leaves = {name: value.requires_grad_() for name, value in trainable(copies).items()}
    _, layers = run(config, copies, tokens, DenseOptions(topk=0, quantise=False), num_rows=32)
    torch.stack([layer.index_loss for layer in layers]).sum().backward()
    moved = {name for name, value in leaves.items() if value.grad is not None and value.grad.abs().max() > 0}
    assert moved == {name for name in leaves if ".indexer." in name}


def test_every_parameter_has_a_gradient(config: dict[str, Any], parameters: Parameters, tokens: torch.Tensor) -> None:
    copies = {name: value.clone() for name, value in parameters.items()}
    leaves = {name: value.requires_grad_() for name, value in trainable(copies).items()}
    logits, layers = run(config, copies, tokens, DenseOptions(topk=6, quantise=True), num_rows=32)
    loss = logits.logsumexp(-1).sum() - logits.flatten(0, 1)[range(tokens.numel()), tokens.flatten()].sum()
    (loss + torch.stack([layer.index_loss for layer in layers]).sum()).backward()
    assert not [name for name, value in leaves.items() if value.grad is None or not value.grad.abs().max() > 0]


def test_dropping_compressed_entries_leaves_only_the_window(
    config: dict[str, Any], parameters: Parameters, tokens: torch.Tensor
) -> None:
    options = DenseOptions(topk=0, quantise=False, drop_compressed=True)
    other = tokens.clone()
    other[:, 0] = (other[:, 0] + 1) % 256
    reach = config["num_hidden_layers"] * (config["sliding_window"] - 1)
    before, _ = run(config, parameters, tokens, options)
    after, _ = run(config, parameters, other, options)
    assert torch.equal(before[:, reach + 1 :], after[:, reach + 1 :])
    assert not torch.equal(before[:, reach], after[:, reach])


def test_lengths_that_do_not_fit_are_refused(config: dict[str, Any], parameters: Parameters) -> None:
    with pytest.raises(ValueError, match="no multiple"):
        run(config, parameters, torch.zeros(1, 100, dtype=torch.int64), DenseOptions(topk=0, quantise=False))
