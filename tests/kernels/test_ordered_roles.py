"""Triton's instructions order the roles of decode attention on Hopper correctly. No card is needed."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

# Any thread of a role accesses memory, all the role's threads meet, and one arrives. Another role waits for the arrival
# and then reads or writes.
ORDERED = {
    "shrinks, written and then read": ["write", "meet", "arrive", "wait", "read"],
    "shrinks, read and then written again": ["read", "meet", "arrive", "wait", "write"],
    "inverses, written and then read": ["write", "meet", "arrive", "wait", "read"],
}


@pytest.mark.long
@pytest.mark.skipif(platform.machine() != "x86_64", reason="Triton brings its assembler for x86-64")
def test_all_threads_of_a_role_meet_before_one_arrives(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_roles"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout)
    # The scorer arrives at ready and empty, and twice at done; the summer at asked and empty; each loader at full.
    assert len(found["arrivals"]) == 8
    assert all(arrival["all_met"] for arrival in found["arrivals"])
    if "pairs" in found:
        assert found["pairs"] == ORDERED
    assert found["states"] == {"found": True, "read_behind_a_meeting": True, "written_before_one": True}
