"""`antefix verify --engine`: runs an engine's own checks and shows their results as a table or JSON."""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from antefix.errors import InvalidRequest
from antefix_console.progress_line import ProgressLine
from antefix_engines.verify import CheckRequest, Finding, findings_of


def run(args: argparse.Namespace, seed: int) -> int:
    """Run the checks of `args.engine`. The exit code of the command is 1 if a check failed.

    Raises:  InvalidRequest: no such model.  ConfigError: the engine's packages are not installed.
    """
    if args.model is not None and not args.model.is_dir():
        raise InvalidRequest(f"--model: {args.model} is not a directory")
    started, found = time.monotonic(), []
    findings = findings_of(args.engine)
    with (
        tempfile.TemporaryDirectory(prefix="antefix-verify-", dir=args.data_dir) as scratch,
        ProgressLine("verifying", lines=args.long) as progress,
    ):
        request = CheckRequest(scratch=Path(scratch), seed=seed, model=args.model, is_long=args.long)
        for finding in findings(request):
            found.append(finding)
            progress.step(f"{finding.subject}: {finding.check}")
    is_ok = bool(found) and all(finding.is_right for finding in found)
    seconds = round(time.monotonic() - started, 2)
    if args.json:
        rows = [dataclasses.asdict(finding) for finding in found]
        print(json.dumps({"ok": is_ok, "engine": args.engine, "findings": rows, "seed": seed, "seconds": seconds}))
    else:
        _print(args.engine, found, seconds, seed)
    return 0 if is_ok else 1


def _print(engine: str, found: Sequence[Finding], seconds: float, seed: int) -> None:
    table = Table(title=f"Restored against cold: {engine}")
    for column in ("model", "checks", "equal bits", "planted faults", "seen"):
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=column == "model")
    for subject in dict.fromkeys(finding.subject for finding in found):
        counts = []
        for is_planted in (False, True):
            mine = [each for each in found if each.subject == subject and each.is_planted is is_planted]
            counts += [str(len(mine)), str(sum(each.is_right for each in mine))]
        table.add_row(subject, *counts)
    console = Console()
    console.print(table)
    for finding in found:
        if not finding.is_right:
            text = f"failed: {finding.subject}, {finding.check}: {finding.told}"
            console.print(text, markup=False, highlight=False)
    is_ok = bool(found) and all(finding.is_right for finding in found)
    verdict = "Every hit equals its cold run" if is_ok else "NOT every hit equals its cold run"
    console.print(f"{verdict}; {len(found)} checks in {seconds:.1f} s.")
    console.print(f"seed {seed}: --seed {seed} runs the same prompts and models again.", highlight=False)
