"""An unused pool takes no memory, with the settings with which workers start."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from antefix_console.deployment import _child_environment
from tests.child_environment import child_environment

GROWN = """
from antefix.model import BlockPool
from tests.model.random_models import make

def anonymous_kib():
    rows = open("/proc/self/status").read().splitlines()
    return next(int(row.split()[1]) for row in rows if row.startswith("RssAnon"))

layout = make("plain").layout
before = anonymous_kib()
pool = BlockPool(layout, (256 << 20) // layout.block_bytes)
print(anonymous_kib() - before, pool.rows.nbytes)
"""


@pytest.mark.services
def test_a_fresh_pool_touches_no_memory(tmp_path: Path):
    environment = _child_environment(tmp_path) | {"PYTHONPATH": child_environment()["PYTHONPATH"]}
    found = subprocess.run([sys.executable, "-c", GROWN], env=environment, capture_output=True, text=True, check=True)
    grown_kib, row_bytes = map(int, found.stdout.split())
    assert row_bytes > 250 << 20
    assert grown_kib < 16 << 10
