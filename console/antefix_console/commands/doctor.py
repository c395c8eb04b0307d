"""`antefix doctor`: is this machine fit to run Antefix, and does its arithmetic allow bit-exact hits?"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

PACKAGES = ("grpcio", "protobuf", "lmdb", "zstandard", "xxhash", "numpy", "redis")
# What prefill and decode need; a host that runs a router or a store has no use for them.
WORKER_PACKAGES = ("torch", "safetensors")
_PROBE_BYTES = 64 << 20
# Below this a durable put of one V4-Flash block (450 KB) takes longer than computing it on a fast GPU.
_DISK_WRITE_MIN = 50e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One check. status: "ok", "warn" (slower or weaker than it could be) or "fail" (will not work)."""

    check: str
    status: str
    detail: str
    advice: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data-dir", type=Path, help="probe this directory's disk (default: the temporary directory)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    findings = [_python(), *_packages()]
    if importlib.util.find_spec("torch") is not None:
        findings += [_arithmetic(), _gpu()]
    findings += [_disk(args.data_dir), _open_files()]
    failed = [finding for finding in findings if finding.status == "fail"]
    if args.json:
        print(json.dumps({"ok": not failed, "findings": [asdict(finding) for finding in findings]}))
    else:
        _print(findings)
    return 1 if failed else 0


def _python() -> Finding:
    ok = sys.version_info >= (3, 11)
    detail = f"{platform.python_version()} on {platform.machine()}, {os.cpu_count()} processors"
    return Finding(check="python", status="ok" if ok else "fail", detail=detail, advice="" if ok else "install 3.11+")


def _packages() -> list[Finding]:
    findings = []
    for name in PACKAGES:
        try:
            findings.append(Finding(check=name, status="ok", detail=importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            findings.append(Finding(check=name, status="fail", detail="not installed", advice="pip install antefix"))
    for name in WORKER_PACKAGES:
        try:
            findings.append(Finding(check=name, status="ok", detail=importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            detail = "not installed: no prefill or decode worker can run here"
            findings.append(Finding(check=name, status="warn", detail=detail, advice="pip install 'antefix[worker]'"))
    return findings


def _arithmetic() -> Finding:
    from antefix.model import row_invariant_ok

    if row_invariant_ok():
        return Finding(check="arithmetic", status="ok", detail="matrix products do not depend on the number of rows")
    return Finding(
        check="arithmetic",
        status="warn",
        detail="a row of a matrix product depends on how many rows there are",
        advice="hits agree with cold runs within rounding here, not to the bit",
    )


def _gpu() -> Finding:
    import torch

    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        if importlib.util.find_spec("triton") is None:
            advice = "pip install 'antefix[gpu]'"
            return Finding(check="gpu", status="warn", detail=f"{name}; no Triton, so no kernels", advice=advice)
        from antefix.model.numerics import card_invariant_ok

        if card_invariant_ok():
            return Finding(check="gpu", status="ok", detail=f"{name}; products do not depend on the number of rows")
        return Finding(
            check="gpu",
            status="warn",
            detail=f"{name}; a row of a product depends on how many rows there are",
            advice="--reproducible will not hold here",
        )
    return Finding(check="gpu", status="ok", detail="none; everything runs on the CPU")


def _disk(directory: Path | None) -> Finding:
    """Sequential write with fdatasync: the limit of a durable put."""
    data = os.urandom(1 << 20)
    try:
        with tempfile.NamedTemporaryFile(dir=directory) as file:
            started = time.perf_counter()
            for _ in range(_PROBE_BYTES // len(data)):
                file.write(data)
            file.flush()
            os.fdatasync(file.fileno())
            rate = _PROBE_BYTES / (time.perf_counter() - started)
    except OSError as err:
        return Finding(check="disk", status="fail", detail=str(err), advice="choose another --data-dir")
    status = "ok" if rate > _DISK_WRITE_MIN else "warn"
    return Finding(check="disk", status=status, detail=f"{rate / 1e9:.2f} GB/s durable sequential write")


def _open_files() -> Finding:
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    status = "ok" if soft >= 1024 else "warn"
    return Finding(
        check="open files", status=status, detail=f"limit {soft}", advice="" if status == "ok" else "ulimit -n 4096"
    )


def _print(findings: list[Finding]) -> None:
    table = Table(title="Antefix doctor")
    for column in ("check", "status", "detail", "advice"):
        table.add_column(column)
    colours = {"ok": "green", "warn": "yellow", "fail": "red"}
    for finding in findings:
        colour = colours[finding.status]
        table.add_row(finding.check, f"[{colour}]{finding.status}[/{colour}]", finding.detail, finding.advice)
    Console().print(table)
