"""A plan is computed from a trace and measured files. It can be checked by hand, and says if it cannot be met."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from antefix.errors import ConfigError, InvalidRequest
from antefix_console.commands import plan as plan_command
from antefix_simulate.machine import model_sizes
from antefix_simulate.plan.demand import Demand, demand_of
from antefix_simulate.plan.sizing import at_rate, ttft_bound
from antefix_simulate.trace import Trace, TraceRequest

RATES = {
    "machine": "a card",
    "date": "2026-11-29",
    "commit": "abc",
    "model": {
        "layers": 43,
        "weights_gib": 100.0,
        "decode": [{"sequences": 1, "step_s": 0.02}, {"sequences": 64, "step_s": 0.05}],
        "prefill": {"tokens_per_s": 20_000.0},
    },
}
STORE = {"flash": {"restore_gb_per_s": 3.0, "raw_write_gb_per_s": 1.0, "remote_gb_per_s": 4.0}}


def _trace(count: int = 200, gap_s: float = 10.0, again: int = 2) -> Trace:
    """A trace in which every prompt comes `again` times: 1,024 tokens in units of 128, and 100 answer tokens."""
    requests = [
        TraceRequest(
            at_s=gap_s * index,
            num_tokens=1024 + 5,
            output_tokens=100,
            names=np.arange(8, dtype=np.int64) + 8 * (index // again),
        )
        for index in range(count)
    ]
    return Trace(name="t", unit_tokens=128, requests=tuple(requests))


def _file(tmp_path: Path, name: str, value: Any) -> str:
    path = tmp_path / name
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return str(path)


def _argv(tmp_path: Path, *flags: str) -> list[str]:
    rows = [{"antefix_trace": 1, "unit_tokens": 128}]
    for request in _trace().requests:
        names = request.names.tolist()
        rows.append({"at_s": request.at_s, "tokens": request.num_tokens, "output": 100, "names": names})  # type: ignore[dict-item]
    trace = _file(tmp_path, "trace.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    rates, store = _file(tmp_path, "rates.json", RATES), _file(tmp_path, "store.json", STORE)
    return ["--trace", trace, "--rates", rates, "--store-rates", store, *flags]


def _run(argv: list[str]) -> int:
    parser = argparse.ArgumentParser()
    plan_command.add_arguments(parser)
    return plan_command.run(parser.parse_args(argv))


def test_what_is_used_again_in_time_hits_and_stays() -> None:
    demand = demand_of(_trace(), retention_s=60)
    assert demand.hit_rate == pytest.approx(1024 / 1029 / 2)
    # Each prefix is used at 0 and 10 s, and kept for 60 s more.
    assert demand.life_s == pytest.approx(70)
    assert demand.new_tokens_per_s == pytest.approx(100 * 1024 / 1990)
    late = demand_of(_trace(), retention_s=5)
    assert late.hit_rate == 0
    assert late.new_tokens_per_s == pytest.approx(200 * 1024 / 1990)


def test_kept_bytes_are_what_comes_times_how_long_it_stays() -> None:
    sizes, demand = model_sizes("v4-flash"), demand_of(_trace(), retention_s=60)
    assert demand.kept_bytes(sizes, 0.0) == pytest.approx(100 * 8 / 1990 * 70 * sizes.block_bytes)


def test_the_bound_on_first_tokens_holds_in_a_simulated_queue() -> None:
    """Compares with a simulated queue that has random arrivals and as many servers as the plan says."""
    rng = random.Random(3)
    service = np.asarray([0.05 + rng.expovariate(1 / 0.4) for _ in range(4000)])
    demand = demand_of(_trace(), retention_s=60)
    for rate, servers in ((2.0, 2), (2.0, 3), (20.0, 11), (20.0, 14)):
        one = at_rate(demand, 1.0)
        scaled = one.scaled(rate / one.requests_per_s)
        bound = ttft_bound(_with_peak(scaled, 1.0), service, servers)
        free = [0.0] * servers
        now, took = 0.0, []
        for seconds in service:
            now += rng.expovariate(rate)
            index = min(range(servers), key=free.__getitem__)
            free[index] = max(free[index], now) + float(seconds)
            took.append(free[index] - now)
        assert float(np.quantile(took, 0.9)) <= bound
        # The bound is not far above the simulated time.
        assert bound < 5 * float(np.quantile(took, 0.9))


def test_too_few_servers_have_no_bound() -> None:
    demand = demand_of(_trace(), retention_s=60)
    assert ttft_bound(demand, np.asarray([1000.0]), 1) == float("inf")


def _with_peak(demand: Demand, peak: float) -> Demand:
    values = {name: getattr(demand, name) for name in Demand.__slots__}  # type: ignore[attr-defined]
    return Demand(**(values | {"peak": peak}))


def test_a_thousand_times_the_load_takes_about_a_thousand_times_the_machines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plans = []
    for tokens in ("1e10", "1e13"):
        assert _run([*_argv(tmp_path, "--tokens-per-day", tokens), "--json"]) == 0
        plans.append(json.loads(capsys.readouterr().out))
    small, large = ({need["name"]: need["number"] for need in plan["needs"]} for plan in plans)
    for name in ("prefill workers", "decode workers", "disks"):
        assert 500 * small[name] <= large[name] + 500
        assert large[name] <= 1000 * small[name]
    # Computed by hand: 1e13 tokens per day, 100 of 1,129 are answers, 64 sequences in 0.05 s, 80% utilisation.
    answers_per_s = 1e13 / 86400 * 100 / 1129
    assert large["decode workers"] == pytest.approx(answers_per_s * plans[1]["peak"] / (64 / 0.05) / 0.8, rel=1e-3)
    assert plans[1]["dollars_per_million_tokens"] <= plans[0]["dollars_per_million_tokens"]


@pytest.mark.usefixtures("plots")
def test_the_text_says_what_binds_what_more_gives_and_what_it_rests_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "plan.svg"
    flags = ["--retention", "72h", "--ttft-p90", "2s", "--local-retention", "12h", "--tokens-per-day", "1e11"]
    assert _run([*_argv(tmp_path, *flags), "--plot", str(plot)]) == 0
    out = capsys.readouterr().out
    for said in (
        "prefill workers",
        "object store",
        "the limit is",
        "one more gives",
        "rates.json (a card",
        "lower bound",
    ):
        assert said in out
    assert "speeds are not of H200" in out
    assert plot.stat().st_size > 5_000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ttft-p90", "0.01s"], "no number of workers"),
        (["--tpot", "1e-3s"], "must be a time"),
        (["--tpot", "0.001s"], "fastest takes 0.02"),
        (["--retention", "soon"], "must be a time"),
        (["--gpu", "z80"], "none of h200"),
        (["--tokens-per-day", "nan"], "--tokens-per-day"),
        (["--plot", "plan.gif"], "cannot plot"),
    ],
)
def test_what_cannot_be_planned_is_refused_with_its_reason(tmp_path: Path, flags: list[str], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        _run(_argv(tmp_path, *flags))


def test_files_without_measurements_are_refused(tmp_path: Path) -> None:
    empty = _file(tmp_path, "empty.json", {"model": {}})
    with pytest.raises(InvalidRequest, match="no measured prefill"):
        _run([*_argv(tmp_path), "--rates", empty])
    with pytest.raises(InvalidRequest, match="no measured restore"):
        _run([*_argv(tmp_path), "--store-rates", empty])
    with pytest.raises(ConfigError, match="card is missing"):
        _run([*_argv(tmp_path), "--gpu", _file(tmp_path, "site.toml", "disk_tb = 1\n")])


def test_the_shipped_files_give_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = _argv(tmp_path)
    assert _run([*argv[:2], "--ttft-p90", "10s", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert any("H200" in line for line in plan["rests_on"])
    assert plan["needs"][0]["dollars_per_month"] > 0
