"""vLLM in the environment that `make test-engines` makes, with the shim that lets it run V4 on this machine."""

import os
from pathlib import Path

REPO = Path(__file__).parents[2]
SHIM = REPO / "tests" / "foreign_engines" / "vllm_cpu"
PYTHON = Path(os.environ.get("ANTEFIX_VLLM_PYTHON", REPO / ".engines" / "vllm" / "bin" / "python"))


def missing():
    """Why vLLM cannot run here, or an empty string if it can."""
    if not PYTHON.is_file():
        return f"no vLLM in {PYTHON}: `make test-engines` installs it"
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    if "avx2" not in flags:
        return "vLLM for CPUs needs AVX2, which this processor has not"
    return ""


def environment():
    """Environment variables for vLLM's Python. Its path has the shim first and then this checkout."""
    roots = ("billing", "console", "decode", "engines", "kernels", "kvstore", "prefill", "router", "simulate")
    paths = [SHIM, REPO, *(REPO / root for root in roots)]
    return {**os.environ, "PYTHONPATH": ":".join(map(str, paths)), "OMP_NUM_THREADS": "2"}
