"""Lists the records whose code has changed since they were measured. `docs/generate_results.py --stale` prints them.

A record that ran in one process has a field `code`: the repository's files that the run loaded. Only these files count
for it. For other records the files and folders count that their tables name as `measures`. Files that are not Python
count if a table names their folder. benchmarks/code_changes.py says which changes of a file count.
"""

from __future__ import annotations

import functools
import itertools
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import tables
from benchmarks.code_changes import changed_parts

SHOWN_FILES = 3
SHOWN_PARTS = 2
# Ends of the names of files that draw figures or are read by people. They make no figures.
IGNORED = ("plot.py", "plots.py", ".md", ".css", ".html", ".js", ".svg", "py.typed")


def stale(results: Path, git: Any) -> Iterator[tuple[str, str]]:
    """Each record whose figures may no longer be true, and why.

    results: the folder of the records.
    git: runs a git command with these arguments and returns its output; raises CalledProcessError as subprocess does.
    """
    measured = dict(tables.NAMED)
    for file, code in tables.measured():  # a record may have several tables
        measured[file] = (*measured.get(file, ()), *code)
    git = functools.cache(git)  # many records measure the same files
    for path in sorted(results.glob("*.json")):
        if path.name in tables.HISTORY:
            continue
        record = json.loads(path.read_text())
        commit = _commit(record)
        if path.name not in measured:
            yield path.name, "benchmarks/tables.py does not say which code it measures"
        elif not commit:
            yield path.name, "names no commit"
        else:
            loaded = tuple(record.get("code", ())) or None
            yield from ((path.name, told) for told in _since(commit, measured[path.name], loaded, git))


def _commit(record: Any) -> str | None:
    """The commit that the run measured, or that a later run confirmed. If the record names none, the commit that added
    the record.
    """
    if not isinstance(record, dict):
        return None
    named = (record.get("repeated", {}), record, record.get("recorded", {}))
    return next((each["commit"] for each in named if each.get("commit")), None)


def _since(commit: str, folders: tuple[str, ...], loaded: tuple[str, ...] | None, git: Any) -> Iterator[str]:
    try:
        names = git("diff", "--name-only", commit, "HEAD", "--", *folders).split()
        if loaded is not None:
            others = [name for name in names if not name.endswith(".py")]
            names = sorted({*git("diff", "--name-only", commit, "HEAD", "--", *loaded).split(), *others})
    except subprocess.CalledProcessError:
        yield f"names commit {commit[:8]}, which is not in this repository's history"
        return
    names = [name for name in names if not name.endswith(IGNORED)]
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
    changed = changed_parts(name, versions[0], versions[1])
    if not changed or changed == [name]:
        return "".join(changed)
    more = ", ..." if len(changed) > SHOWN_PARTS else ""
    return f"{name} ({', '.join(changed[:SHOWN_PARTS])}{more})"
