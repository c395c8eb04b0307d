"""Kill -9 at any step of put, evict, compact and open loses no acknowledged block, and needs no manual repair."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.services


ROOT = Path(__file__).parents[2]


def run_seeds(first: int, count: int, timeout_s: float) -> dict[str, object]:
    process = subprocess.run(
        [sys.executable, "-m", "tests.kvstore.crash_workload", str(first), str(count)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr[-3000:]
    result: dict[str, object] = json.loads(process.stdout.splitlines()[-1])
    return result


def test_a_killed_store_keeps_what_it_acknowledged() -> None:
    assert run_seeds(1, 12, 100) == {"kills": 48, "failed_seeds": []}


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_two_thousand_kills() -> None:
    assert run_seeds(1000, 500, 3500) == {"kills": 2000, "failed_seeds": []}
