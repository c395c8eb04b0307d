"""Triton's instructions order the roles of the kernels on Hopper correctly. No card is needed."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest

from tests.waiting import AT_MOST_S

pytest.importorskip("triton", reason="Triton is not installed")

# Any thread of a role accesses memory, all the role's threads meet, and one arrives. Another role waits for the arrival
# and then reads or writes.
ORDERED = {
    "shrinks, written and then read": ["write", "meet", "arrive", "wait", "read"],
    "shrinks, read and then written again": ["read", "meet", "arrive", "wait", "write"],
    "inverses, written and then read": ["write", "meet", "arrive", "wait", "read"],
}
# The function and the kind of the instruction before each arrival, and how many there are. At "meet" all 128 threads of
# a role meet.
ARRIVALS = {
    # The scorer arrives at ready and empty, and twice at done; the summer at asked and empty; each loader, whose
    # function is in another file, at full.
    "decode attention": {("_scorer", "meet"): 4, ("_summer", "meet"): 2, ("", "meet"): 2},
    # The scorer arrives at ready, empty_left and done; the summer at asked and empty_right. Each thread of
    # the copier arrives for itself ("copied").
    "prefill attention": {("_scorer", "meet"): 3, ("_summer", "meet"): 2},
    "prefill attention, picked": {("_scorer", "meet"): 3, ("_summer", "meet"): 2},
    # Each of two scorers arrives at empty. The role that brings queries has one warp, so at "warp" all its threads
    # meet. Its arrival at full says how many bytes the copy engine will write. The engine itself does not arrive: it
    # counts the bytes, and a wait for full ends after the arrival and all bytes.
    "index scores": {("_score", "meet"): 2, ("_queries", "warp"): 1},
    "index scores, one query": {("_score", "meet"): 2, ("_queries", "warp"): 1},
}
# Each scorer waits for queries; the tensor cores read them, and have read them before the scorer arrives. The third
# role waits for both scorers' arrivals, and then the copy engine writes.
TURNS = [["wait", "product", "done", "meet", "arrive"]] * 2 + [["wait", "warp", "arrive", "warp", "copy"]]

pytestmark = [
    pytest.mark.long,
    pytest.mark.services,
    pytest.mark.skipif(platform.machine() != "x86_64", reason="Triton brings its assembler for x86-64"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What compile_roles reports, for each kernel's form."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_roles"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=AT_MOST_S,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    reported: dict[str, dict[str, Any]] = json.loads(run.stdout)
    return reported


@pytest.mark.parametrize("form", ARRIVALS)
def test_all_threads_of_a_role_meet_before_one_arrives(found: dict[str, dict[str, Any]], form: str) -> None:
    arrivals = Counter((arrival["function"], arrival["before"]) for arrival in found[form]["arrivals"])
    assert arrivals == ARRIVALS[form]


@pytest.mark.parametrize("form", ARRIVALS)
def test_all_warps_meet_between_writes_and_reads_of_their_roles(found: dict[str, dict[str, Any]], form: str) -> None:
    assert found[form]["states"] == {
        "found": True, "read_behind_a_meeting": True, "written_before_one": True, "written_again_behind_one": True
    }  # fmt: skip


def test_pairs_that_racecheck_named_are_ordered(found: dict[str, dict[str, Any]]) -> None:
    if "pairs" not in found["decode attention"]:
        pytest.skip("later versions than Triton 3.6 give waits other lines")
    assert found["decode attention"]["pairs"] == ORDERED


@pytest.mark.parametrize("form", ["index scores", "index scores, one query"])
def test_queries_are_copied_and_read_in_turns(found: dict[str, dict[str, Any]], form: str) -> None:
    # With one query there is no loop, and all warps meet at the end.
    assert [[kind for kind in turn if kind != "all"] for turn in found[form]["turns"]] == TURNS


@pytest.mark.parametrize("form", ["prefill attention", "prefill attention, picked"])
def test_halves_of_tiles_are_copied_in_turns(found: dict[str, dict[str, Any]], form: str) -> None:
    turns = found[form]["turns"]
    # The copier waits for a free half, starts its copies, and each thread arrives when its own are complete.
    half = ["wait", "piece", "copied"]
    assert half * 2 in turns and half in turns
    # The summer arrives at empty_right after the tensor cores have read the half.
    assert any(turn[-4:] == ["product", "done", "meet", "arrive"] for turn in turns)
