"""Fills the tables of docs/ from benchmarks/results/*.json: python docs/generate_results.py [--check | --stale]

A document asks for a table with two comments, and this script writes the table between them:

    <!-- figures: placement.json decisions -->
    <!-- end of figures -->

`decisions` is a function of benchmarks/tables*.py. A table over several records names them with `+` between them. The
line under each table has the run's commit, date, machine and command, from the record. `--check` changes nothing and
exits with 1 if a document would change. `--stale` lists records whose code has changed since they were measured, with
the first changed files and the names of what changed in them. Changes of comments, docstrings, layout, help texts, and
messages of errors and logs do not count, and neither do files that only draw plots. `--stale` always exits with 0,
because only a person can tell whether a change affects the figures. Records of `HISTORY` in benchmarks/tables.py
describe earlier code, so they are not listed.

A simulated record may have a field `repeated` with commit, date, command and part: a later run of this part gave the
same figures, so the record counts as of that commit.
"""

from __future__ import annotations

import argparse
import ast
import functools
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import (  # noqa: E402
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
SHOWN_FILES = 3
# Ends of the names of files that draw figures and do not make them.
DRAWING = ("plot.py", "plots.py")
SHOWN_PARTS = 2
# Names of the logging methods whose first argument is a message.
LOGS = {"debug", "info", "warning", "error", "exception", "critical"}
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
    if file in tables.HISTORY:
        named.append("of earlier code, kept for comparison")
    return f"*benchmarks/results/{file}: {'; '.join(part for part in named if part) or 'of an unnamed run'}.*"


def stale(git: Any) -> Iterator[tuple[str, str]]:
    """Each record whose figures may no longer be true, and why.

    git: runs a git command with these arguments and returns its output; raises CalledProcessError as subprocess does.
    """
    measured = {**tables.NAMED, **dict(tables.measured())}
    git = functools.cache(git)  # many records measure the same files
    for path in sorted(RESULTS.glob("*.json")):
        if path.name in tables.HISTORY:
            continue
        record = json.loads(path.read_text())
        commit = _commit(record)
        if path.name not in measured:
            yield path.name, "benchmarks/tables.py does not say which code it measures"
        elif not commit:
            yield path.name, "names no commit"
        else:
            yield from ((path.name, told) for told in _since(commit, measured[path.name], git))


def _commit(record: Any) -> str | None:
    """The commit that the run measured, or that a later run confirmed. If the record names none, the commit that added
    the record.
    """
    if not isinstance(record, dict):
        return None
    named = (record.get("repeated", {}), record, record.get("recorded", {}))
    return next((each["commit"] for each in named if each.get("commit")), None)


def _since(commit: str, code: tuple[str, ...], git: Any) -> Iterator[str]:
    try:
        names = git("diff", "--name-only", commit, "HEAD", "--", *code).split()
    except subprocess.CalledProcessError:
        yield f"names commit {commit[:8]}, which is not in this repository's history"
        return
    names = [name for name in names if not name.endswith(DRAWING)]
    shown = list(itertools.islice((told for name in names if (told := _changed(name, commit, git))), SHOWN_FILES))
    if shown:
        # Comparing all files of an old record takes minutes, and the first few show that the record is old.
        rest = f"; {len(names)} files were edited" if len(shown) == SHOWN_FILES < len(names) else ""
        yield f"since {commit[:8]} changed: {', '.join(shown)}{rest}"


def _changed(name: str, commit: str, git: Any) -> str:
    """The file's name and what changed in its code since that commit; empty if no code changed."""
    versions = []
    for revision in (commit, "HEAD"):
        try:
            versions.append(git("show", f"{revision}:{name}"))
        except subprocess.CalledProcessError:
            return name  # the file was added or removed
    if not name.endswith(".py"):
        return name if versions[0] != versions[1] else ""
    before, after = (_code(text) for text in versions)
    changed = [part for part in {**before, **after} if before.get(part) != after.get(part)]
    if not changed:
        return ""
    more = ", ..." if len(changed) > SHOWN_PARTS else ""
    return f"{name} ({', '.join(changed[:SHOWN_PARTS])}{more})"


def _code(text: str) -> dict[str, str]:
    """The code of each top-level function and class, and under "module" all other code, without texts for readers."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            node.body = node.body[1:]
        for value in _texts_of(node):
            for part in ast.walk(value):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    part.value = ""
    parts: dict[str, str] = {}
    for node in tree.body:
        name = node.name if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) else "module"
        parts[name] = parts.get(name, "") + ast.dump(node)
    return parts


def _texts_of(node: ast.AST) -> list[ast.expr]:
    """The expressions in this node that are only read by people: help texts, and messages of errors and logs."""
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
        return node.exc.args[:1]
    if not isinstance(node, ast.Call):
        return []
    helps = [keyword.value for keyword in node.keywords if keyword.arg in {"help", "description"}]
    if isinstance(node.func, ast.Attribute) and node.func.attr in LOGS:
        return [*helps, *node.args[:1]]
    return helps


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
        for file, told in stale(_git):
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
