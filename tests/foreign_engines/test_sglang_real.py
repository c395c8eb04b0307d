"""The HiCache tier over SGLang's own classes on a CPU: `make test-engines`. No model runs: SGLang's V4 needs a card."""

import os
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("ANTEFIX_SGLANG_PYTHON", REPO / ".engines" / "sglang" / "bin" / "python"))
ROOTS = ("billing", "console", "decode", "engines", "kernels", "kvstore", "prefill", "router", "simulate")

pytestmark = [pytest.mark.engines, pytest.mark.services]


def test_the_contract_over_sglangs_own_pools_and_hashes():
    if not PYTHON.is_file():
        pytest.skip(f"no SGLang in {PYTHON}: `make test-engines` installs it")
    paths = [REPO, *(REPO / root for root in ROOTS)]
    environment = {**os.environ, "ANTEFIX_SGLANG_REAL": "1", "PYTHONPATH": ":".join(map(str, paths))}
    command = [
        str(PYTHON),
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(Path(__file__).with_name("test_sglang_hicache.py")),
    ]
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout.splitlines()[-1]
