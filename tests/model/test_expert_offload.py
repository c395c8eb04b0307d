"""Experts in host memory are fetched one layer ahead: equal bits in any order of use, and more room on the card."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from antefix.errors import ConfigError
from antefix.model import BlockPool, Model, Sequence, WindowState, forward, load_model, replay
from antefix.model.expert_offload import ExpertOffload, offloaded_layers
from antefix.model.ranks import Ranks
from antefix.worker_settings import WorkerSettings
from tests.model import released_checkpoint as released

TOKENS = np.random.default_rng(3).integers(0, 64, 150).astype("<u4")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return released.write("flash", tmp_path_factory.mktemp("offload") / "model")


def per_layer(model: Model) -> int:
    experts = model.model.layers[0].mlp.experts  # type: ignore[union-attr]
    return sum(tensor.numel() * tensor.element_size() for tensor in experts.state_dict().values())  # type: ignore[operator, union-attr]


def of(model: Model) -> ExpertOffload:
    found = {id(layer.mlp.experts.offload): layer.mlp.experts.offload for layer in model.model.layers}  # type: ignore[union-attr]
    (offload,) = [each for each in found.values() if isinstance(each, ExpertOffload)]
    return offload


def results(model: Model) -> list[torch.Tensor]:
    pool = BlockPool(model.layout, 4)
    sequence = Sequence(pool.allocate(2), WindowState.zeros(model.layout, 0))
    found = [forward(model, pool, [(sequence, part)], logits="all") for part in (TOKENS[:100], TOKENS[100:128])]
    # A replay does not run the top layers' experts.
    again = Sequence(sequence.block_table, WindowState.zeros(model.layout, 0))
    replay(model, pool, again, TOKENS[:128], stop=128)
    return [*found, *(forward(model, pool, [(each, TOKENS[128:129])]) for each in (sequence, again))]


@pytest.mark.slow
@pytest.mark.parametrize("num_layers", [3, 4])
def test_offloaded_experts_compute_the_same_bits(directory: Path, num_layers: int) -> None:
    whole = load_model(directory)
    model = load_model(directory, cpu_offload_bytes=(num_layers - 1) * per_layer(whole) + 1)
    assert all(torch.equal(one, two) for one, two in zip(results(whole), results(model), strict=True))
    offload = of(model)
    assert offload.num_fetched > num_layers
    # Passes use the layers in order, so they wait only for experts that a replay left out.
    assert offload.num_waits <= 2


@pytest.mark.slow
def test_a_pass_in_order_waits_for_nothing(directory: Path) -> None:
    whole = load_model(directory)
    model = load_model(directory, cpu_offload_bytes=5 * per_layer(whole))
    pool = BlockPool(model.layout, 1)
    sequence = Sequence(pool.allocate(1), WindowState.zeros(model.layout, 0))
    for token in range(3):
        forward(model, pool, [(sequence, TOKENS[token : token + 1])])
    assert of(model).num_waits == 0


def test_the_device_holds_two_layers_of_what_is_offloaded(directory: Path) -> None:
    whole = load_model(directory)
    model = load_model(directory, cpu_offload_bytes=5 * per_layer(whole))
    held = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()}
    assert sum(held.values()) == sum(
        tensor.numel() * tensor.element_size() for tensor in whole.state_dict().values()
    ) - 3 * per_layer(whole)


def test_ranks_offload_their_shares(directory: Path) -> None:
    share = load_model(directory, ranks=Ranks(rank=1, size=2))
    model = load_model(directory, ranks=Ranks(rank=1, size=2), cpu_offload_bytes=3 * per_layer(share))
    first = of(model)._host[0]["gate_up_proj.codes"]
    assert torch.equal(first, share.state_dict()["model.layers.0.mlp.experts.gate_up_proj.codes"])


def test_offloaded_layers_are_spread_and_bounded(directory: Path) -> None:
    model = load_model(directory)
    size = per_layer(model)
    assert offloaded_layers(model, 3 * size, torch.float32) == (0, 1, 3)
    with pytest.raises(ConfigError, match="the card needs as many bytes"):
        offloaded_layers(model, 2 * size, torch.float32)
    with pytest.raises(ConfigError, match="all experts take"):
        offloaded_layers(model, 5 * size + 1, torch.float32)
    with pytest.raises(ConfigError, match="needs --device cuda"):
        WorkerSettings(cpu_offload_bytes=1 << 30)
