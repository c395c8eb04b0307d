"""The benchmark of workers over several cards also runs at small widths on a CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.child_environment import child_environment

SMALL = ("--layers", "3", "--batches", "1", "2", "--context", "256", "--contexts", "256", "--chunk", "128")


@pytest.mark.long
@pytest.mark.services
def test_each_step_leaves_what_it_found(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.ranks_on_cards", "--device", "cpu", "--toy", "--threads", "1"]
    command += ["--steps", "model", "restore", "services", *SMALL, "--repeats", "1", "--lengths", "256"]
    command += ["--service-layers", "3", "--service-tokens", "300", "--out", str(tmp_path)]
    subprocess.run(command, check=True, env=child_environment(), cwd=Path(__file__).parents[2])
    found = {path.name.split(".")[1]: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    assert {row["sequences"] for row in found["model"]["decode"]} == {1, 2}
    assert 0 < found["model"]["prefill"][0]["exchange_share"] < 1
    (restored,) = found["restore"]["restore"]
    assert restored["from_disk"]["bytes_read"] > 0
    assert found["services"]["hit_equals_cold"] is True
