"""Batched steps, short prefills and recorded steps over several ranks give the results of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.mark.long
@pytest.mark.services
@pytest.mark.skipif(torch.cuda.is_available(), reason="runs in the interpreter, over gloo")
@pytest.mark.parametrize("size", [2, 4])
def test_any_number_of_ranks_runs_each_way_with_the_same_bits(tmp_path: Path, size: int) -> None:
    """In reproducible mode, steps alone, in shared launches and replayed have equal bits on every rank."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.kernels.ranks_program", str(rank), str(size), str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    told = []
    try:
        for process in processes:
            out, errors = process.communicate(timeout=800)
            assert process.returncode == 0, errors[-3000:]
            told.append([line.split() for line in out.splitlines()])
    finally:
        for process in processes:
            process.kill()
    assert [way for way, _, _ in told[0]] == ["alone", "together", "graphs-over-ranks"]
    assert len({digest for each in told for _, digest, _ in each}) == 1
    # All calls of the last way were replayed.
    assert {each[2][2] for each in told} == {"4"}
