"""The optimiser, the trainer and the n-gram reference on small problems."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from models.training import baselines, dense
from models.training.corpus import Tokens
from models.training.optimizer import Optimizer, is_muon, orthogonalise
from models.training.parameters import Parameters, initial_parameters, load_parameters, parameter_shapes, read_config
from models.training.train import Source, Stage, Trainer, batches, schedule
from tests.training.conftest import ROOT

STAGE = Stage(share=1.0, length=128, sequences=4, sparse=False, quantise=False, mixture={"text": 0.5, "recall": 0.5})


@pytest.mark.parametrize("shape", [(24, 24), (8, 40), (3, 40, 8)])
def test_orthogonalise_brings_singular_values_near_one(shape: tuple[int, ...]) -> None:
    update = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(update, steps=10).float())
    assert values.min() > 0.5
    assert values.max() < 1.5


def test_each_optimiser_lowers_a_quadratic() -> None:
    torch.manual_seed(0)
    goal = torch.randn(12, 8)
    parameters: Parameters = {"a.weight": torch.zeros(12, 8), "lm_head.weight": torch.zeros(12, 8)}
    for value in parameters.values():
        value.requires_grad_()
    optimizer = Optimizer(parameters, muon_lr=0.1, adam_lr=0.1)
    assert is_muon("a.weight", goal)
    assert not is_muon("lm_head.weight", goal)
    for step in range(100):
        sum((value - goal).square().sum() for value in parameters.values()).backward()
        optimizer.step(1 - step / 100)
    for value in parameters.values():
        assert (value - goal).square().mean() < 0.05 * goal.square().mean()


@pytest.mark.slow
def test_a_few_steps_learn(config: dict[str, Any], text: Tokens) -> None:
    torch.manual_seed(0)
    trainer = Trainer(config, initial_parameters(config, seed=0), torch.device("cpu"), compiled=False)
    stream = batches(Source(text=text, seed=0, workers=0), STAGE)
    rope = dense.rope_tables(trainer.config, STAGE.length, trainer.device)
    losses = []
    for step in range(16):
        tokens, classes = next(stream)
        losses.append(trainer.step(tokens.long(), classes, STAGE, rope, min(1.0, step / 5))["text"].item())
    assert losses[-1] < losses[0] - 0.8
    assert all(value.isfinite().all() for value in trainer.parameters.values() if value.is_floating_point())


def test_a_run_by_the_clock_goes_through_its_stages(config: dict[str, Any], text: Tokens) -> None:
    trainer = Trainer(config, initial_parameters(config, seed=0), torch.device("cpu"), compiled=False)
    sparse = replace(STAGE, sparse=True, quantise=True)
    done = list(trainer.run(Source(text=text, seed=0, workers=0), (STAGE, sparse), seconds=0.5, peak=0.5))
    assert done == [0, 1]
    assert trainer.log[0]["lr_scale"] == pytest.approx(0.005)
    assert all(earlier["elapsed_s"] <= later["elapsed_s"] for earlier, later in pairwise(trainer.log))


def test_the_schedule_warms_up_holds_and_decays() -> None:
    assert schedule(0.0, 0) == pytest.approx(0.01)
    assert schedule(0.3, 1000) == 1.0
    assert schedule(0.75, 1000) == pytest.approx(0.5)
    assert schedule(1.0, 1000) == pytest.approx(0.02)


def test_the_ngram_model_is_a_distribution() -> None:
    data = np.frombuffer(b"abracadabra, abracadabra and a brass candelabra. " * 40, dtype=np.uint8)
    orders = baselines.prune(baselines.count(data), size_bytes=baselines.ENTRY_BYTES * 1000)
    context = b"s cande"
    total = 0.0
    for byte in range(256):
        probe = np.frombuffer(context + bytes([byte]), dtype=np.uint8)
        whole = baselines.bits_per_byte(orders, probe) * 8
        total += 2.0 ** -(whole - baselines.bits_per_byte(orders, probe[:7]) * 7)
    assert total == pytest.approx(1.0)
    assert baselines.bits_per_byte(orders, data) < 1.0


def test_the_ngram_model_keeps_to_its_size() -> None:
    data = np.random.default_rng(0).integers(97, 105, size=4000).astype(np.uint8)
    orders = baselines.prune(baselines.count(data), size_bytes=baselines.ENTRY_BYTES * 200)
    assert 20 < sum(order.num_entries for order in orders) <= 200


def test_the_committed_checkpoint_has_the_config_shapes_and_size() -> None:
    directory = ROOT / "models/antefix-tiny"
    parameters = load_parameters(directory / "model.safetensors")
    assert {name: tuple(value.shape) for name, value in parameters.items()} == parameter_shapes(read_config(directory))
    assert (directory / "model.safetensors").stat().st_size <= 8_000_000
