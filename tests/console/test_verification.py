"""`antefix verify`'s own rules: hits are bit-identical, and a restore that forgets something is caught."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from antefix.layout import KVFormat
from antefix.window import RestorePlanner
from antefix_console.verify import suite as suite_module
from antefix_console.verify.compare import Difference, compare
from antefix_console.verify.models import PLANS, load_subject, random_subject
from antefix_console.verify.paired_runs import WorkerPair, run_cold
from antefix_console.verify.stores import MemoryStore
from antefix_console.verify.suite import Coverage, Suite
from antefix_console.verify.verdict import Case, Report
from antefix_prefill.worker.compute_thread import ComputeThread
from tests.small_worker_model import small_worker_model

ROOT = Path(__file__).parents[2]
# Stands for the directory of `small_worker_model`, which is written when a test needs it.
SMALL_MODEL = "small"
STRATEGIES = ("full", "boundary", "auto", "zero", "periodic(40)")
SMALL = Coverage(num_blocks=5, num_output_blocks=2, num_forks=1, num_handoffs=3, bounded_windows=(1,), every_pair=False)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def verified(subject, plan=SMALL, strategies=STRATEGIES, parts=("conversations", "handoffs")):
    report = Report()
    asyncio.run(Suite(subject, MemoryStore(), plan, report, lambda _: None).run(strategies, parts))
    return report


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kv_format"), [("pro", KVFormat.FP8), ("odd-ratios", KVFormat.FLOAT32)])
def test_every_exact_hit_of_a_random_model_is_bit_identical(name, kv_format):
    report = verified(random_subject(name, kv_format))
    assert report.ok and report.total.failed == 0
    for strategy, plans in report.by_plan.items():
        for plan, tally in plans.items():
            if not plan.startswith("bounded"):
                assert tally.bit_identical == tally.cases > 0, (strategy, plan, tally)
    assert set(report.by_plan["zero"]) == {"replay", "cold"}
    assert set(report.by_plan["auto"]) == {"checkpoint", "replay", "cold"}


@pytest.mark.slow
def test_the_shipped_models_hits_are_bit_identical():
    plan = Coverage(
        num_blocks=4, num_output_blocks=1, num_forks=1, num_handoffs=2, bounded_windows=(), every_pair=False
    )
    report = verified(load_subject(ROOT / "models" / "antefix-tiny", KVFormat.FP8), plan, ("auto", "zero"))
    assert report.total.bit_identical == report.total.cases >= 15


@pytest.mark.slow
def test_a_replay_that_is_one_block_short_is_caught(monkeypatch):
    """The proof can fail. The first layer is HCA, so only the window carries the previous block's content."""
    subject = random_subject("pro", KVFormat.FLOAT32)
    plain = RestorePlanner._replay

    def short(self, stored, block, kind, replay_tokens):
        return plain(self, stored, block, kind, replay_tokens // 2)

    monkeypatch.setattr(RestorePlanner, "_replay", short)
    plan = Coverage(
        num_blocks=9, num_output_blocks=1, num_forks=0, num_handoffs=0, bounded_windows=(), every_pair=False
    )
    report = verified(subject, plan, ("zero",))
    assert not report.ok
    assert report.total.failed > 0 and report.total.max_error > 0


@pytest.mark.slow
def test_a_checkpoint_of_another_boundary_is_caught():
    class Mixed(MemoryStore):
        """Answers with the checkpoint of another boundary, which has as many bytes."""

        async def get(self, kind, hash, *, fingerprint, tenant=b""):
            other = [name for name in self.payloads if name[:2] == (kind, fingerprint) and name[2] != hash]
            return self.payloads[other[0]] if kind == 2 else None

    report = Report()
    plan = Coverage(
        num_blocks=4, num_output_blocks=1, num_forks=0, num_handoffs=0, bounded_windows=(), every_pair=False
    )
    subject = random_subject("pro", KVFormat.FP8)
    asyncio.run(Suite(subject, Mixed(), plan, report, lambda _: None).run(("full",), ("conversations",)))
    tally = report.by_plan["full"]["checkpoint"]
    assert tally.failed == tally.cases > 0 and "hit" in report.failures[0]


def test_a_flipped_bit_is_a_difference_and_says_where():
    subject = random_subject("pro", KVFormat.FP8)
    workers = WorkerPair(subject, ComputeThread("test"), 64)
    tokens = np.arange(40, dtype=np.uint32)
    one, two = (asyncio.run(run_cold(workers, tokens)) for _ in range(2))
    assert compare(one, two) == Difference(identical=True)
    two.rows[1, 3] ^= 1
    found = compare(one, two)
    assert not found.identical and "layer 0, hca_main" in found.where
    workers.compute.close()


def case(error, bound, problem=""):
    difference = Difference(identical=error == 0, error=error, where="logits")
    return Case(
        strategy="zero", plan="replay", subject="s", kv_format="fp8", hit_tokens=8, prompt_tokens=9, bound=bound,
        difference=difference, problem=problem,
    )  # fmt: skip


def test_verdicts():
    assert case(0, 0).verdict == "bit_identical"
    assert case(0.1, 0).verdict == "failed"
    assert case(0.1, 0.5).verdict == "within_bounds"
    assert case(0.6, 0.5).verdict == "failed"
    assert case(float("nan"), 0.5).verdict == "failed"
    assert case(0, 0.5, problem="wrong plan").verdict == "failed"


def test_an_empty_report_is_not_ok_and_failures_are_told():
    report = Report()
    assert not report.ok
    report.add(case(0, 0))
    assert report.ok
    report.add(case(0.1, 0))
    assert not report.ok
    shown = report.as_dict()
    assert (shown["cases"], shown["bit_identical"], shown["failed"]) == (2, 1, 1)
    assert shown["rows"][0]["strategy"] == "zero" and shown["rows"][0]["plans"]["replay"]["failed"] == 1


def test_the_random_models_differ_in_plan_ratio_and_window():
    geometries = {random_subject(name, KVFormat.FP8).identity.geometry for name in PLANS}
    assert len({(g.layers, g.csa_ratio, g.hca_ratio, g.window) for g in geometries}) == len(PLANS)
    assert any(g.csa_ratio > g.window for g in geometries)
    assert any(g.window > g.block_size for g in geometries) and any(g.window < g.block_size for g in geometries)


def test_the_stated_bounds_are_finite():
    assert all(0 < bound < 1 for bound in suite_module.SHAPE_BOUND.values())
    assert float("inf") > suite_module.BOUNDED_BOUND


# Without a planted fault, verification finds nothing. The long run verifies everything. The short run verifies one
# cheap plan, a drawn model and a small one, which together have every kind of row. test_random_replays and the tests
# above verify each other plan.
@pytest.mark.timeout(900)
@pytest.mark.services
@pytest.mark.parametrize(
    "flags",
    [("--plans", "short-window", "--drawn", "1", "--model", SMALL_MODEL), pytest.param((), marks=pytest.mark.long)],
    ids=["one plan", "all"],
)
def test_the_command_verifies_through_a_real_store_service(flags):
    flags = [str(small_worker_model()) if flag is SMALL_MODEL else flag for flag in flags]
    done = subprocess.run(
        [sys.executable, "-m", "antefix_console", "verify", "--json", "--seed", "1", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=880,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["failed"] == 0 and report["cases"] == report["bit_identical"] + report["within_bounds"]
    assert report["seed"] == 1
    assert {row["strategy"] for row in report["rows"]} >= {"full", "periodic(p)", "boundary", "auto", "zero"}
    assert {row["strategy"] for row in report["rows"]} >= {"cuts", "served", "reused rows", "set-ups", "known answer"}


def test_the_command_fails_when_a_case_failed(monkeypatch, capsys):
    from antefix_console.cli import main
    from antefix_console.commands import verify

    outcome = Report()
    outcome.add(case(0, 0))

    async def fake(*_):
        return outcome, []

    monkeypatch.setattr(verify, "_verify", fake)
    assert main(["verify", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["failed"] == 0
    outcome.add(case(0.1, 0))
    assert main(["verify", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["failed"] == 1
    assert main(["verify"]) == 1
    assert "NOT every hit" in capsys.readouterr().out


def test_the_command_refuses_a_model_that_is_not_there(capsys):
    from antefix_console.cli import main

    assert main(["verify", "--model", "/nowhere/model"]) == 2
    assert "/nowhere/model" in capsys.readouterr().err
