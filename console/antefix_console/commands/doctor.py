"""`antefix doctor`: is this machine fit to run Antefix, and does its arithmetic allow bit-exact hits?"""

from __future__ import annotations

import argparse
import asyncio
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
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from antefix.store.store_stats import StoreTotals

PACKAGES = ("grpcio", "protobuf", "lmdb", "zstandard", "xxhash", "numpy", "redis")
# What prefill and decode need; a host that runs a router or a store has no use for them.
WORKER_PACKAGES = ("torch", "safetensors")
_PROBE_BYTES = 64 << 20
# Below this a durable put of one V4-Flash block (450 KB) takes longer than computing it on a fast GPU.
_DISK_WRITE_MIN = 50e6
# Of a store's budget: two segments are kept for compaction, a sixteenth where segments have their usual size.
_BUDGET_HELD_MIN = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One check. status: "ok", "warn" (slower or weaker than it could be) or "fail" (will not work)."""

    check: str
    status: str
    detail: str
    advice: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data-dir", type=Path, help="probe this directory's disk (default: the temporary directory)")
    parser.add_argument(
        "--store", metavar="HOST:PORT", help="ask this store service as well: is all stored, is there room"
    )
    parser.add_argument("--router", metavar="HOST:PORT", help="ask this router as well: is all that it computes stored")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    findings = [_python(), *_packages()]
    if importlib.util.find_spec("torch") is not None:
        findings += [_arithmetic(), _gpu()]
    findings += [_disk(args.data_dir), _open_files()]
    findings += _store(args.store) if args.store else []
    findings += _router(args.router) if args.router else []
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


def _store(address: str) -> list[Finding]:
    """Whether a running store takes what it is given. Raises:  Unavailable: it does not answer."""
    from antefix.store.client import RemoteStore
    from antefix.store.store_stats import read_stats

    async def ask() -> StoreTotals:
        store = RemoteStore(address)
        try:
            return await read_stats(store)
        finally:
            await store.close()

    stats = asyncio.run(ask())
    writes = Finding(check="store writes", status="ok", detail="none that could never be stored")
    if stats.impossible_writes:
        detail = f"{stats.impossible_writes} could never be stored; the last: {stats.impossible_write}"
        advice = "these callers are served without the cache: mend what is named"
        writes = Finding(check="store writes", status="fail", detail=detail, advice=advice)
    space = (
        f"{stats.used_bytes / 1e6:.0f} of {stats.limit_bytes / 1e6:.0f} MB used, {stats.free_bytes / 1e6:.0f} MB free"
    )
    if stats.stopped:
        advice = "free space on its file system; hits are served meanwhile"
        room = Finding(
            check="store space", status="warn", detail=f"nothing is stored now: {stats.stopped}", advice=advice
        )
    elif stats.limit_bytes < stats.budget_bytes * _BUDGET_HELD_MIN:
        advice = f"its file system cannot hold the budget of {stats.budget_bytes / 1e6:.0f} MB: lower it, or make room"
        room = Finding(check="store space", status="warn", detail=space, advice=advice)
    else:
        room = Finding(check="store space", status="ok", detail=space)
    return [writes, room]


def _router(address: str) -> list[Finding]:
    """Whether what its requests compute is stored. Raises:  Unavailable: it does not answer."""
    from antefix.clients import RouterClient

    counters = asyncio.run(RouterClient(address).status()).counters
    if not counters.unstored:
        return [Finding(check="requests stored", status="ok", detail="all that were computed")]
    detail = f"{counters.unstored} could not all be stored; the last: {counters.unstored_reason}"
    advice = "usage records name the requests: write_error"
    return [Finding(check="requests stored", status="warn", detail=detail, advice=advice)]


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
