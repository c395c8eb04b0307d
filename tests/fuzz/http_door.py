"""Fuzzes the HTTP API with schemathesis, by the OpenAPI document that it publishes: `make fuzz`, or

    python -m tests.fuzz.http_door --seconds 600

Answers must have a status, a type and a form that the document names, and never be an internal error. The workers are a
script. Requests that the document allows may be refused, and some that it does not name are harmless, so neither counts
as a fault.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
import time
from pathlib import Path

from tests.fuzz.run import note
from tests.gateway.scripted import Script, make_front, serving

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
# The scripted router has no ledger, so these paths answer 503.
RUN = "from schemathesis.cli import schemathesis; schemathesis()"
LEFT_OUT = "/v1/usage/.*"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--kept", type=Path, default=Path(".fuzz"), metavar="DIR", help="where a run continues")
    args = parser.parse_args()
    args.kept.mkdir(parents=True, exist_ok=True)
    return asyncio.run(fuzz(args.seconds, args.kept.absolute()))


async def fuzz(seconds: int, kept: Path) -> int:
    begin = time.monotonic()
    front = make_front(Script(), ledger=None)
    async with serving(front, chat_format="deepseek-v4") as url:
        command = [
            *(sys.executable, "-c", RUN, "run", f"{url}/openapi.json"),
            *("--checks", CHECKS, "--exclude-path-regex", LEFT_OUT, "--max-time", str(seconds)),
            *("--phases", "examples,coverage,fuzzing", "--max-examples", "100000", "--continue-on-failure"),
            *("--suppress-health-check", "all", "--no-color"),
            *("--generation-database", str(kept / "schemathesis")),
        ]
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        out, _ = await process.communicate()
    told = out.decode(errors="replace")
    sys.stdout.write(told[-6000:])
    broken = bool(process.returncode) or bool(front.accounts._running)
    note(kept / "hours.json", "http_door", time.monotonic() - begin, cases_of(told), broken)
    return int(broken)


def cases_of(told: str) -> int:
    """The number of cases in a summary such as `Test cases: 1,234 generated`."""
    found = re.search(r"([\d,]+) generated", told)
    return int(found[1].replace(",", "")) if found else 0


if __name__ == "__main__":
    sys.exit(main())
