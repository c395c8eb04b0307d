"""Verification on a card: the typical token counts, and how a result was computed bounds its allowed difference."""

from __future__ import annotations

import argparse
import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from antefix.config import given_flags
from antefix.layout import KVFormat
from antefix.model import WindowState
from antefix.worker_settings import WorkerSettings
from antefix_console.commands import verify as command
from antefix_console.verify import card
from antefix_console.verify.card import against_cpu, rounds_inputs, typical_difference
from antefix_console.verify.compare import RunOutcome, compare
from antefix_console.verify.models import load_subject, random_subject
from antefix_console.verify.paired_runs import WorkerPair
from antefix_console.verify.suite import Backend
from antefix_console.verify.verdict import Cases, Report
from antefix_prefill.worker.compute_thread import ComputeThread
from tests.model import released_checkpoint


def test_one_wild_token_is_told_apart_from_many_wrong_ones() -> None:
    cpu = torch.linspace(-1, 1, 90).view(9, 10)
    assert typical_difference(cpu, cpu.clone()).identical
    one, all_wrong = cpu.clone(), cpu + 0.3
    one[4] += 0.5
    found = typical_difference(cpu, one)
    assert not found.identical and 0 < found.error <= 1e-12 and "worst token 0.5" in found.where
    assert typical_difference(cpu, all_wrong).error == pytest.approx(0.3, rel=1e-3)
    all_wrong[:] = float("nan")
    assert typical_difference(cpu, all_wrong).error == float("inf")


def test_a_device_that_computes_the_same_is_identical() -> None:
    subject = random_subject("pro", KVFormat.FP8)
    workers = WorkerPair(subject, ComputeThread("test"), 16)
    (found,) = against_cpu(workers, np.arange(40, dtype=np.uint32), 0.05)
    assert found.difference.identical and found.bound == 0.05 and not found.problem
    workers.compute.close()


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    return load_subject(released_checkpoint.write("flash", tmp_path_factory.mktemp("released")), KVFormat.FP8)


def _last_bits(model):
    move = 1 + 2.0**-12 * torch.randn(model.model.embed_tokens.weight.shape, generator=torch.Generator().manual_seed(1))
    model.model.embed_tokens.weight.mul_(move)


def _nibbles(model):
    codes = model.model.layers[1].mlp.experts.down_proj.codes
    codes.copy_(codes << 4 | codes >> 4)


def _shared_expert(model):
    model.model.layers[-1].mlp.shared_experts.down_proj.codes.view(torch.uint8).zero_()


@pytest.mark.parametrize(
    ("change", "plain", "rounded"),
    [
        (_last_bits, "within_bounds", "within_bounds"),
        (_nibbles, "failed", "failed"),
        # A change that is smaller than rounding is found only when inputs are not rounded.
        (_shared_expert, "failed", "within_bounds"),
    ],
)
def test_rounded_inputs_may_differ_as_far_as_one_step_leads(released, change, plain, rounded) -> None:
    model = copy.deepcopy(released.model)
    with torch.no_grad():
        change(model)
    subject = replace(released, model=model, alone=lambda: replace(released, model=copy.deepcopy(released.model)))
    workers = WorkerPair(subject, ComputeThread("test"), 64)
    tokens = np.random.default_rng(0).integers(0, 64, 64).astype(np.uint32)
    rows = against_cpu(workers, tokens, 0.05)
    workers.compute.close()
    report = Report()
    for row in rows:
        Cases(report=report, subject="q", kv_format="fp8").add(
            "card against CPU", row.what, len(tokens), row.difference, bound=row.bound, problem=row.problem
        )
    found = report.by_plan["card against CPU"]
    assert getattr(found["cold, inputs not rounded"], plain) == 1
    assert getattr(found["cold"], rounded) == 1
    assert "one BF16 step" in rows[1].difference.where and rows[1].bound > 0.05
    assert rounds_inputs(model) and rounds_inputs(released.model)


def test_a_model_that_rounding_drowns_shows_nothing(released, monkeypatch) -> None:
    monkeypatch.setattr(card, "_BF16_STEP", 0.9)
    workers = WorkerPair(replace(released, model=copy.deepcopy(released.model)), ComputeThread("test"), 64)
    _, found = against_cpu(workers, np.arange(32, dtype=np.uint32), 0.05)
    workers.compute.close()
    assert "nothing is proved" in found.problem


def test_tails_and_infinite_gates_are_compared() -> None:
    layout = random_subject("pro", KVFormat.FP8).model.layout
    one, two = (WindowState.zeros(layout, 3) for _ in range(2))
    # Gates before the first group are -inf on both sides, so they do not differ.
    two.main[1].tail[0, 0, 0] = 0.5
    one.main[1].tail[0, 0, 0] = 0.5 + 2**-20
    rows, logits = torch.zeros(1, layout.block_bytes, dtype=torch.uint8), np.ones(4, np.float32)
    found = compare(*(RunOutcome(logits=logits, rows=rows, window=window) for window in (one, two)))
    assert not found.identical and "main tail, layer 1" in found.where
    assert 0 < found.error < 1e-5


def test_bits_are_demanded_where_the_reproducible_kernels_run() -> None:
    fp8, floats = random_subject("pro", KVFormat.FP8), random_subject("odd-ratios", KVFormat.FLOAT32)
    pytest.importorskip("triton", reason="Triton is not installed")
    assert Backend(device="cuda").is_invariant(fp8)
    assert not Backend(device="cuda", reproducible=False).is_invariant(fp8)
    assert not Backend(device="cuda", kernels="torch").is_invariant(fp8)
    assert not Backend(device="cuda").is_invariant(floats)


def test_the_command_takes_plans_and_backends() -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    args = parser.parse_args(["--device", "cuda", "--kernels", "torch", "--fast", "--plans", "pro", "flash"])
    assert given_flags(WorkerSettings, args) == {"device": "cuda", "kernels": "torch"}
    assert (args.fast, args.plans) == (True, ["pro", "flash"])
    with pytest.raises(SystemExit):
        parser.parse_args(["--plans", "nothing"])
