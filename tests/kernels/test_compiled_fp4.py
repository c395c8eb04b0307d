"""How the compiler arranges the FP4 product for Hopper, which the interpreter cannot show. No card is needed."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from tests.waiting import AT_MOST_S

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.mark.long
@pytest.mark.services
@pytest.mark.skipif(platform.machine() != "x86_64", reason="Triton brings its assembler for x86-64")
def test_a_word_of_codes_is_four_bytes_of_one_row(tmp_path):
    """Triton 3.6 moved the broadcast after the conversion, which then packed the bytes of four rows into one word."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_fp4"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=AT_MOST_S,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    # Dims: rows, words of a group, bytes of a word.
    assert set(run.stdout.split()) == {"128x4x4"}
