"""Fills the tables of docs/ from benchmarks/results/*.json: python docs/generate_results.py [--check | --stale]

A document asks for a table with two comments, and this script writes the table between them:

    <!-- figures: placement.json decisions -->
    <!-- end of figures -->

`decisions` is a function of benchmarks/tables*.py. A table over several records names them with `+` between them. The
line under each table has the run's commit, date, machine and command, from the record. `--check` changes nothing and
exits with 1 if a document would change. `--stale` lists records whose code has changed since they were measured, with
the first changed files and the names of what changed in them. benchmarks/record_age.py says which files count, and
benchmarks/code_changes.py which changes. `--stale` always exits with 0, because only a person can tell whether a change
affects the figures. Records of `HISTORY` in benchmarks/tables.py describe earlier code, so they are not listed.

A simulated record may have a field `repeated` with commit, date, command and part: a later run of this part gave the
same figures, so the record counts as of that commit.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import (  # noqa: E402
    record_age,
    tables,
    tables_cards,  # noqa: F401
    tables_engines,  # noqa: F401
    tables_faults,  # noqa: F401
    tables_services,  # noqa: F401
    tables_tiers,  # noqa: F401
    tables_weights,  # noqa: F401
    tables_windows,  # noqa: F401
)

RESULTS = ROOT / "benchmarks" / "results"
_REGION = re.compile(r"(<!-- figures: (\S+) (\S+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)


def documents() -> list[Path]:
    """All documents that may contain tables of figures."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def filled(text: str) -> str:
    """The document with its tables written again.

    Raises:  KeyError: it asks for a table or a record that is not there.
    """
    return _REGION.sub(lambda found: f"{found[1]}{_table(found[2], found[3])}{found[4]}", text)


def _table(file: str, name: str) -> str:
    records = {each: json.loads((RESULTS / each).read_text()) for each in file.split("+")}
    record = records if len(records) > 1 else records[file]
    rows = [[str(cell) for cell in row] for row in tables.TABLES[file, name].rows(record)]
    head, *body = rows
    aligned = ["---" if column == 0 or not _is_number(body, column) else "---:" for column in range(len(head))]
    lines = ["| " + " | ".join(row) + " |" for row in (head, aligned, *body)]
    named = [line for each, found in records.items() for line in ("", provenance(each, found))]
    return "\n".join([*lines, *named, ""])


def _is_number(body: list[list[str]], column: int) -> bool:
    return all(re.match(r"[-+]?[0-9]", row[column]) for row in body if row[column])


def provenance(file: str, record: Any) -> str:
    """One line of Markdown that says which run the figures come from."""
    record = record if isinstance(record, dict) else {}
    named = [
        f"commit {record['commit'][:8]}" if record.get("commit") else "",
        str(record.get("date", ""))[:10],
        record.get("machine") or record.get("device", ""),
        f"`{record['command']}`" if record.get("command") else "",
    ]
    if not record.get("commit"):
        recorded = record.get("recorded", {})
        why = "the run's commit is lost" if recorded.get("lost_commit") else "the run named no commit"
        named.append(f"{why}; recorded in {recorded['commit']}, {recorded['date']}" if recorded else "")
    if repeated := record.get("repeated"):
        named.append(
            f"{repeated['part']} run again at {repeated['commit'][:8]}, {repeated['date'][:10]}: the same figures"
        )
    if runs := record.get("runs"):
        named.append(f"added to {len(runs)} earlier run{'s' * (len(runs) > 1)}, which the record names")
    if file in tables.HISTORY:
        named.append("of earlier code, kept for comparison")
    return f"*benchmarks/results/{file}: {'; '.join(part for part in named if part) or 'of an unnamed run'}.*"


def _git(*arguments: str) -> str:
    call = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(call, capture_output=True, text=True, check=True).stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; the exit status is 1 if a document would change"
    )
    parser.add_argument(
        "--stale", action="store_true", help="list the result files that are older than the code that they measure"
    )
    args = parser.parse_args()
    if args.stale:
        for file, told in record_age.stale(RESULTS, _git):
            print(f"{file}: {told}")
        return 0
    changed = [path for path in documents() if filled(path.read_text()) != path.read_text()]
    for path in changed:
        print(f"{path.relative_to(ROOT)}: {'differs from its figures' if args.check else 'written'}")
        if not args.check:
            path.write_text(filled(path.read_text()))
    return 1 if args.check and changed else 0


if __name__ == "__main__":
    sys.exit(main())
