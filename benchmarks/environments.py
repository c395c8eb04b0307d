"""In which of the environments of operators does a deployment start, answer and stop?

    python -m benchmarks.environments --json benchmarks/results/environments.json
    python -m benchmarks.environments --junit FILE --json FILE      # of a run of pytest that wrote this report

Runs tests/environments as `make test-environments` does, most of it as root, in a quarter of an hour. The program exits
with 1 if a test failed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from benchmarks.run_record import write

ROOT = Path(__file__).parents[1]


def run_tests(junit: Path) -> None:
    call = (sys.executable, "-m", "pytest", "-rs", "-m", "environments", "tests/environments", f"--junit-xml={junit}")
    subprocess.run(call, cwd=ROOT, check=False)


def outcomes(junit: Path) -> dict[str, Any]:
    """When the run began, how long it took, and by test the numbers of cases that passed, were skipped and failed."""
    suite = ElementTree.parse(junit).getroot()[0]
    tests: dict[str, dict[str, int]] = {}
    skipped_because: list[str] = []
    for case in suite:
        name = case.get("name", "").partition("[")[0].removeprefix("test_").replace("_", " ")
        counts = tests.setdefault(name, {"passed": 0, "skipped": 0, "failed": 0})
        skipped = case.find("skipped")
        ended = "skipped" if skipped is not None else "failed" if len(case) else "passed"
        counts[ended] += 1
        if skipped is not None:
            skipped_because.append(f"{name}: {skipped.get('message', '')}")
    return {
        "began": suite.get("timestamp"),
        "seconds": round(float(suite.get("time", 0))),
        "tests": tests,
        "skipped_because": skipped_because,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--junit", type=Path, help="report of a run; default: run the tests now")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        junit = args.junit or Path(scratch) / "report.xml"
        if args.junit is None:
            run_tests(junit)
        found = outcomes(junit)
    write(args.json, found)
    return int(any(counts["failed"] for counts in found["tests"].values()))


if __name__ == "__main__":
    sys.exit(main())
