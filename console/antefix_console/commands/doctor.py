"""`antefix doctor`: checks whether this machine can run Antefix, and whether its arithmetic allows bit-exact hits."""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import platform
import sys
import tempfile
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from antefix.extras import install_command
from antefix.host_limits import usable_cores
from antefix_console import shipped
from antefix_console.finding import Finding
from antefix_console.installed_packages import package_findings
from antefix_console.progress_line import ProgressLine

if TYPE_CHECKING:
    from antefix.clients import RouterStatus
    from antefix.model import Model
    from antefix.store.store_stats import StoreTotals

_ARITHMETIC_ON = "arithmetic on "
_PROBE_BYTES = 64 << 20
# At a lower write speed, a durable put of one V4-Flash block (450 KB) takes longer than computing it on a fast GPU.
_DISK_WRITE_MIN = 50e6
# Share of a store's budget that data may use: two segments, a sixteenth at the usual segment size, are for compaction.
_BUDGET_HELD_MIN = 0.9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data-dir", type=Path, help="test the disk of this directory (default: the temporary directory)"
    )
    parser.add_argument(
        "--model",
        type=Path,
        default=shipped.MODEL,
        help="test the tensor shapes of this model (default: the shipped model)",
    )
    parser.add_argument(
        "--threads", type=int, default=0, metavar="N", help="number of torch threads; use the workers' setting"
    )
    parser.add_argument(
        "--device", default="", help="device to test in addition to the CPU (default: a graphics card, if there is one)"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="precision of the weights in the test; use the workers' setting",
    )
    parser.add_argument(
        "--reproducible", action="store_true", help="test the reproducible mode on a GPU; use the workers' setting"
    )
    parser.add_argument(
        "--store",
        metavar="HOST:PORT",
        help="also ask this store service whether all writes are stored and whether there is room",
    )
    parser.add_argument(
        "--router",
        metavar="HOST:PORT",
        help="also ask this router whether all workers compute alike and whether all writes are stored",
    )
    parser.add_argument(
        "--deployment",
        metavar="ROUTER",
        help="check a deployment over several hosts instead of this machine, starting at its router's HOST:PORT:"
        " whether each service answers, how long certificates last, and whether clocks, names, secrets and"
        " versions agree",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    if args.deployment:
        from antefix_console.deployment_check import check_deployment

        with ProgressLine("asking the deployment's services"):
            return _show(check_deployment(args.deployment), as_json=args.json)
    with ProgressLine("checking this machine") as progress:
        findings = [_python(), *package_findings()]
        if importlib.util.find_spec("torch") is not None:
            progress.step("arithmetic")
            findings += _arithmetic(args)
            progress.step("GPU")
            findings += [_gpu(), _ranks()]
        if args.router:
            progress.step("workers")
            findings += _workers(args.router, findings)
        progress.step("disk")
        findings += [_disk(args.data_dir), _open_files()]
        progress.step("services")
        findings += _store(args.store) if args.store else []
        findings += _router(args.router) if args.router else []
    return _show(findings, as_json=args.json)


def _show(findings: list[Finding], *, as_json: bool) -> int:
    failed = [finding for finding in findings if finding.status == "fail"]
    if as_json:
        print(json.dumps({"ok": not failed, "findings": [asdict(finding) for finding in findings]}))
    else:
        _print(findings)
    return 1 if failed else 0


def _python() -> Finding:
    ok = sys.version_info >= (3, 11)
    detail = f"{platform.python_version()} on {platform.machine()}, {usable_cores()} cores to use"
    return Finding(check="python", status="ok" if ok else "fail", detail=detail, advice="" if ok else "install 3.11+")


def _arithmetic(args: argparse.Namespace) -> list[Finding]:
    """The arithmetic of this machine for the model with these threads: its name, and the operations that were not found
    exact.
    """
    import torch

    from antefix.errors import AntefixError
    from antefix.model import load_model, probe
    from antefix.model.backend import uses_triton

    torch.set_num_threads(args.threads or min(torch.get_num_threads(), usable_cores()))
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    findings: list[Finding] = []
    for where in dict.fromkeys(("cpu", device)):
        dtype = torch.bfloat16 if args.dtype == "bfloat16" else torch.float32
        try:
            model = load_model(args.model, device=where, dtype=dtype)
        except AntefixError as err:
            return [*findings, Finding(check="model", status="fail", detail=str(err), advice="see --model")]
        if where == "cpu":
            findings += _model(model, args.model.name)
        kernels = "triton" if uses_triton("auto", model.layout, where) else "torch"
        measured = probe(model, reproducible=args.reproducible, kernels=kernels)
        detail = f"{measured.name}: {measured.num_proved} checks of {args.model.name} held on {measured.setup}"
        findings.append(Finding(check=f"{_ARITHMETIC_ON}{where}", status="ok", detail=detail))
        advice = "hits agree with cold runs within rounding, not to the bit; --reproducible true keeps them exact"
        findings += [Finding(check="exactness", status="warn", detail=text, advice=advice) for text in measured.failed]
        findings += [Finding(check="not proved", status="ok", detail=text) for text in measured.unproved]
    return findings


def _model(model: Model, name: str) -> list[Finding]:
    """The fields of the config that Antefix computes differently from others, and how much KV a worker keeps in memory
    by default.
    """
    from antefix_prefill.worker.engine import BLOCK_BYTES_MIN, EngineConfig, pool_block_bytes

    (pool_bytes,) = (field.default for field in fields(EngineConfig) if field.name == "pool_bytes")
    assert isinstance(pool_bytes, int)
    num_blocks = pool_bytes // max(pool_block_bytes(model.layout), BLOCK_BYTES_MIN)
    num_tokens = num_blocks * model.layout.geometry.block_size
    detail = f"{name}: {num_tokens} tokens of KV fit into a worker's default pool on a CPU"
    pool = Finding(check="model", status="ok" if num_blocks else "warn", detail=detail, advice="")
    advice = "read docs/MODEL_CONFIGS.md before comparing with another implementation"
    return [pool, *(Finding(check="model", status="warn", detail=note, advice=advice) for note in model.config.notes)]


def _workers(router: str, found: list[Finding]) -> list[Finding]:
    """The arithmetic that a deployment's workers report, and whether a worker here would share KV with them."""
    from antefix.errors import AntefixError

    try:
        status = asyncio.run(_status_of(router))
    except AntefixError as err:
        return [Finding(check="workers", status="fail", detail=str(err), advice="is that a router's address?")]
    findings: list[Finding] = []
    for worker in status.workers:
        name = worker.arithmetic or "has not said what it computes"
        agrees = worker.arithmetic == status.arithmetic
        detail = f"{name} on {worker.setup}" if worker.setup else name
        advice = "" if agrees else f"hits nothing of the others, who compute {status.arithmetic}"
        status_word = "ok" if agrees else "warn"
        findings.append(
            Finding(check=f"{worker.role} {worker.address}", status=status_word, detail=detail, advice=advice)
        )
    here = [finding for finding in found if finding.check.startswith(_ARITHMETIC_ON)]
    shares = any(finding.detail.startswith(f"{status.arithmetic}:") for finding in here)
    if here and not shares:
        detail = f"a worker here would hit nothing of theirs: they compute {status.arithmetic}"
        advice = "compare the set-ups above; the model, threads and dtype must be theirs too"
        findings.append(Finding(check="sharing", status="warn", detail=detail, advice=advice))
    elif here:
        findings.append(Finding(check="sharing", status="ok", detail="a worker here computes what they compute"))
    return findings


async def _status_of(router: str) -> RouterStatus:
    from antefix.clients import RouterClient

    async with RouterClient(router) as client:
        return await client.status()


def _gpu() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding(check="gpu", status="ok", detail="none; everything runs on the CPU")
    name = torch.cuda.get_device_name()
    if importlib.util.find_spec("triton") is None:
        detail = f"{name}; no Triton, so no kernels"
        return Finding(check="gpu", status="warn", detail=detail, advice=install_command("gpu"))
    return Finding(check="gpu", status="ok", detail=name)


def _ranks() -> Finding:
    """The values of `--tensor-parallel-size` that this machine allows."""
    import torch
    import torch.distributed as dist

    cards = torch.cuda.device_count()
    if not dist.is_available() or not dist.is_gloo_available():
        advice = "a worker takes one process; install a PyTorch that has them"
        return Finding(check="ranks", status="warn", detail="PyTorch without torch.distributed or gloo", advice=advice)
    if cards < 2:
        return Finding(check="ranks", status="ok", detail="over processes on the CPU (gloo); there are no two cards")
    if not dist.is_nccl_available():
        advice = "--tensor-parallel-size takes a PyTorch with NCCL"
        return Finding(check="ranks", status="warn", detail=f"{cards} cards and no NCCL between them", advice=advice)
    version = ".".join(map(str, torch.cuda.nccl.version()))
    kinds = sorted({torch.cuda.get_device_name(number) for number in range(cards)})
    status = "ok" if len(kinds) == 1 else "warn"
    advice = "" if len(kinds) == 1 else "ranks of one worker need cards of one kind: choose by CUDA_VISIBLE_DEVICES"
    detail = f"--tensor-parallel-size up to {cards}: {', '.join(kinds)}, NCCL {version}"
    return Finding(check="ranks", status=status, detail=detail, advice=advice)


def _disk(directory: Path | None) -> Finding:
    """Measure sequential writes with fdatasync, which limit durable puts."""
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
    """Whether a running store stores all records that it is given. Raises:  Unavailable: it does not answer."""
    from antefix.store.remote_store import RemoteStore

    async def ask() -> StoreTotals:
        store = RemoteStore(address)
        try:
            return await store.stats()
        finally:
            await store.close()

    stats = asyncio.run(ask())
    writes = Finding(check="store writes", status="ok", detail="there were no writes that could never be stored")
    if stats.impossible_writes:
        detail = f"{stats.impossible_writes} could never be stored; the last: {stats.impossible_write}"
        advice = "these callers are served without the cache: correct what the message names"
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
    """Whether the KV that a router's requests compute is stored. Raises:  Unavailable: it does not answer."""
    counters = asyncio.run(_status_of(address)).counters
    if not counters.unstored:
        return [Finding(check="requests stored", status="ok", detail="all KV that requests computed was stored")]
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
