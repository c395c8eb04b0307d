"""The command prints the requested results and refuses contradictory arguments."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from antefix.errors import AntefixError, ConfigError, InvalidRequest
from antefix_console.commands.simulate import ALL_STRATEGIES, add_parser, run

FIELDS = {
    "token_hit_rate",
    "ideal_token_hit_rate",
    "checkpoints_per_request",
    "bytes_kept",
    "bytes_written",
    "recomputed_tokens",
    "ttft_p50_s",
    "ttft_p90_s",
    "ttft_p99_s",
    "dollars",
}


def _run(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    return run(parser.parse_args(["simulate", *argv]))


@pytest.fixture
def trace_path(tmp_path: Path) -> Path:
    rows = [
        {"timestamp": 1000 * i, "input_length": 2000 + i, "output_length": 9, "hash_ids": [0, 1, 2, 10 + i % 3]}
        for i in range(20)
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _json(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


def test_json_has_every_strategy_with_every_field(trace_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("--trace", str(trace_path), "--format", "mooncake", "--strategy", "all", "--json") == 0
    out = _json(capsys)
    assert tuple(out["strategies"]) == ALL_STRATEGIES
    for row in out["strategies"].values():
        assert set(row) >= FIELDS
    assert out["strategies"]["full"]["token_hit_rate"] == out["strategies"]["full"]["ideal_token_hit_rate"]


def test_several_store_sizes_give_a_list(trace_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--trace", str(trace_path), "--format", "mooncake", "--strategy", "auto", "--json"]
    assert _run(*argv, "--store-bytes", "10MB", "--store-bytes", "1GB") == 0
    out = _json(capsys)
    assert [row["store_bytes"] for row in out] == [10_000_000, 1_000_000_000]
    assert all(row["strategies"]["auto"]["bytes_kept"] <= row["store_bytes"] for row in out)


def test_the_table_names_each_strategy_and_the_ideal(trace_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--trace", str(trace_path), "--format", "mooncake", "--strategy", "auto", "--strategy", "zero"]
    assert _run(*argv, "--strategy", "auto") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "ideal hit rate" in lines[0]
    assert [line.split()[0] for line in lines[1:4]] == ["strategy", "auto", "zero"]
    # The table is followed by the meaning of each column.
    legend = " ".join(lines[4:])
    assert all(f"{column}:" in legend for column in ("hit", "of ideal", "spared", "ckpt/req", "recomputed", "dollars"))


@pytest.mark.parametrize("suffix", ["svg", "png"])
@pytest.mark.usefixtures("plots")
def test_plots_are_written_for_one_size_and_for_several(trace_path: Path, tmp_path: Path, suffix: str) -> None:
    argv = ["--trace", str(trace_path), "--format", "mooncake", "--strategy", "all"]
    one, several = tmp_path / f"one.{suffix}", tmp_path / f"several.{suffix}"
    assert _run(*argv, "--plot", str(one)) == 0
    assert _run(*argv, "--plot", str(several), "--store-bytes", "20MB", "--store-bytes", "80MB") == 0
    assert one.stat().st_size > 5_000
    assert several.stat().st_size > 5_000


def test_without_matplotlib_a_plot_says_how_to_get_it(
    trace_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(InvalidRequest, match=r"matplotlib: pip install .*\[plots\]"):
        _run("--trace", str(trace_path), "--format", "mooncake", "--plot", str(tmp_path / "x.svg"))


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (["--trace", "nowhere.jsonl", "--format", "mooncake"], InvalidRequest),
        (["--generate", "chat", "--requests", "0"], InvalidRequest),
        (["--generate", "chat", "--strategy", "clever"], ConfigError),
        (["--generate", "chat", "--store-bytes", "much"], ConfigError),
        (["--generate", "chat", "--model", "gpt"], InvalidRequest),
        (["--generate", "chat", "--prefill-tokens-per-s", "0"], InvalidRequest),
    ],
)
def test_what_makes_no_sense_is_refused(argv: list[str], error: type[AntefixError]) -> None:
    with pytest.raises(error):
        _run(*argv)


def test_a_trace_files_format_is_found_out_or_asked_for(
    trace_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run("--trace", str(trace_path), "--strategy", "auto", "--json") == 0
    assert _json(capsys)["unit_tokens"] == 512
    unknown = tmp_path / "other.jsonl"
    unknown.write_text('{"question": "what am I?"}\n')
    with pytest.raises(InvalidRequest, match=r"--format .*trace import"):
        _run("--trace", str(unknown))


def test_generated_traces_and_local_models_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {
        "num_hidden_layers": 4,
        "head_dim": 64,
        "qk_rope_head_dim": 32,
        "index_head_dim": 32,
        "sliding_window": 16,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    argv = ["--generate", "documents", "--requests", "30", "--model", str(tmp_path), "--strategy", "auto", "--json"]
    assert _run(*argv) == 0
    assert _json(capsys)["num_requests"] == 30


@pytest.mark.slow
def test_break_even_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("--break-even") == 0
    assert "next turn: fastest" in capsys.readouterr().out


@pytest.mark.parametrize("source", [("--break-even",), ("--generate", "agents", "--requests", "20")])
def test_a_plot_that_cannot_be_written_is_refused_before_the_work(source: tuple[str, ...], tmp_path: Path) -> None:
    for path in (tmp_path / "plot.gif", tmp_path / "no" / "plot.svg"):
        with pytest.raises(InvalidRequest, match="cannot plot to"):
            _run(*source, "--plot", str(path))


@pytest.mark.slow
@pytest.mark.usefixtures("plots")
def test_the_break_even_table_is_plotted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("--break-even", "--plot", str(tmp_path / "plot.svg")) == 0
    assert "boundary" in capsys.readouterr().out
    assert "seconds saved per stored GB" in (tmp_path / "plot.svg").read_text()
