"""`antefix bench`: which arguments it refuses, and that its smallest run measures everything."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from antefix_console.cli import main
from antefix_console.commands import bench


@pytest.mark.parametrize("options", [["--peers", "/no/such/python"], ["--blocks", "0"], ["--repeats", "0"]])
def test_a_wrong_option_is_refused_before_anything_runs(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "store", *options]) == 2
    assert capsys.readouterr().err.startswith("antefix: --")


def test_the_object_tier_takes_a_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "tier", "--s3", str(tmp_path)]) == 2
    assert "there is no S3 server" in capsys.readouterr().err
    assert main(["bench", "tier", "--blocks", "0"]) == 2


def test_an_installed_package_says_where_benchmarks_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "CHECKOUT", tmp_path)
    assert main(["bench", "store"]) == 2
    assert "part of a checkout" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.services
def test_the_smallest_run_gives_every_ratio(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "antefix_console",
        "bench",
        "store",
        "--json",
        "--peers",
        "",
        "--dir",
        str(tmp_path),
    ]
    done = subprocess.run([*command, "--blocks", "32", "--repeats", "1"], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    names = ("restore_ratio", "put_ratio", "warm_ratio", "remote_ratio", "lookup_ms", "restore_zstd_ratio")
    assert all(found[name] > 0 for name in names)
    assert "round 1 of 1" in done.stderr
    assert not list(tmp_path.iterdir())
