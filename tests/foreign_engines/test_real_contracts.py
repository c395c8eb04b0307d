"""The tiers of SGLang and LMCache over these engines' own classes, on a CPU: `make test-engines`. No model runs.

The contract tests run again in the environment that has the engines, where they use the real classes.
"""

import os
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("ANTEFIX_CONTRACTS_PYTHON", REPO / ".engines" / "contracts" / "bin" / "python"))
ROOTS = ("billing", "console", "decode", "engines", "kernels", "kvstore", "prefill", "router", "simulate")

pytestmark = [pytest.mark.engines, pytest.mark.services]


@pytest.mark.parametrize(
    ("tests", "switch"),
    [("test_sglang_hicache.py", "ANTEFIX_SGLANG_REAL"), ("test_lmcache_adapter.py", "ANTEFIX_LMCACHE_REAL")],
)
def test_the_contract_over_the_engines_own_classes(tests, switch):
    if not PYTHON.is_file():
        pytest.skip(f"no SGLang and LMCache in {PYTHON}: `make test-engines` installs them")
    paths = [REPO, *(REPO / root for root in ROOTS)]
    environment = {**os.environ, switch: "1", "PYTHONPATH": ":".join(map(str, paths))}
    command = [str(PYTHON), "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).with_name(tests))]
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "passed" in done.stdout.splitlines()[-1] and "skipped" not in done.stdout.splitlines()[-1]
