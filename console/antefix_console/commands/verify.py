"""`antefix verify`: is a hit what a cold run gives? Every strategy, plan and boundary, on this machine."""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from antefix.errors import InvalidRequest
from antefix.layout import KVFormat
from antefix.model.backend import KERNELS
from antefix.store.api import Store
from antefix.store.client import LocalStore
from antefix_console import shipped
from antefix_console.deployment import Deployment, DeploymentConfig
from antefix_console.progress_line import ProgressLine
from antefix_console.verify.models import PLANS, Subject, load_subject, random_subject
from antefix_console.verify.suite import Backend, Coverage, Suite
from antefix_console.verify.verdict import Report, Tally

_FORMATS = (KVFormat.FP8, KVFormat.FLOAT32)
# Blocks have 12 to 128 tokens in the random models and 64 in the shipped one. Short ones are also decoded whole.
# Nine blocks: an exact replay of the shipped model is seven long, so the last ones start inside the document.
SHORT_SHIPPED = Coverage(
    num_blocks=9, num_output_blocks=0, num_forks=1, num_handoffs=2, bounded_windows=(1,), every_pair=False, stride=4
)
SHORT_RANDOM = Coverage(
    num_blocks=7, num_output_blocks=1, num_forks=1, num_handoffs=4, bounded_windows=(1, 2), every_pair=False
)
SHORT_LARGE_BLOCKS = Coverage(
    num_blocks=3, num_output_blocks=0, num_forks=1, num_handoffs=3, bounded_windows=(1,), every_pair=False
)
LONG_SHIPPED = Coverage(
    num_blocks=24, num_output_blocks=2, num_forks=4, num_handoffs=16, bounded_windows=(1, 2, 4), every_pair=True
)
LONG_RANDOM = Coverage(
    num_blocks=24, num_output_blocks=3, num_forks=6, num_handoffs=32, bounded_windows=(1, 2, 4), every_pair=True
)
LONG_LARGE_BLOCKS = Coverage(
    num_blocks=10, num_output_blocks=1, num_forks=4, num_handoffs=16, bounded_windows=(1, 2, 4), every_pair=True
)
_LARGE_BLOCK = 64
FAILURES_SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, help="model directory to verify as well (default: the shipped one)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument(
        "--long",
        action="store_true",
        help="longer prompts, every plan in both formats, for minutes; prints its progress",
    )
    parser.add_argument("--device", default="cpu", help="torch device to verify (default: cpu)")
    parser.add_argument(
        "--kernels", choices=KERNELS, default="auto", help="cache path on a card, as workers take it (default: auto)"
    )
    parser.add_argument(
        "--fast", action="store_true", help="on a card: the faster kernels, whose hits are equal within bounds only"
    )
    parser.add_argument("--plans", nargs="*", choices=PLANS, help="which random models (default: all)")
    parser.add_argument("--data-dir", type=Path, help="where the scratch store goes (default: a temporary directory)")


def run(args: argparse.Namespace) -> int:
    import torch

    # The same bits as with any number of threads; on a busy machine one never waits for its other half.
    torch.set_num_threads(1)
    model = args.model or (shipped.MODEL if shipped.MODEL.is_dir() else None)
    if model is not None and not model.is_dir():
        raise InvalidRequest(f"--model: {model} is not a directory")
    with tempfile.TemporaryDirectory(prefix="antefix-verify-", dir=args.data_dir) as scratch:
        started = time.monotonic()
        backend = Backend(device=args.device, kernels=args.kernels, reproducible=not args.fast)
        subjects = _subjects(model, args.long, args.device, tuple(PLANS) if args.plans is None else args.plans)
        with ProgressLine("verifying", lines=args.long) as progress:
            report = asyncio.run(_verify(subjects, backend, Path(scratch), progress.step))
    seconds = time.monotonic() - started
    if args.json:
        print(json.dumps(report.as_dict() | {"seconds": round(seconds, 2)}))
    else:
        _print(report, seconds)
    return 0 if report.ok else 1


def strategies_of(subject: Subject) -> tuple[str, ...]:
    return "full", f"periodic({3 * subject.block_size})", "boundary", "auto", "zero"


async def _verify(
    subjects: Iterator[tuple[Subject, Coverage]], backend: Backend, scratch: Path, progress: Callable[[str], None]
) -> Report:
    report = Report()
    async with _store_service(scratch) as store:
        for subject, plan in subjects:
            await Suite(subject, store, plan, report, progress, backend).run(strategies_of(subject))
    return report


def _subjects(
    model: Path | None, is_long: bool, device: str, plans: Sequence[str]
) -> Iterator[tuple[Subject, Coverage]]:
    """Loaded as they are needed. Short: each plan in one format, the formats in turn; the model in the served one.

    On a card all in FP8, the format that its kernels know.
    """
    formats = _FORMATS if device == "cpu" else _FORMATS[:1]
    for number, plan in enumerate(plans):
        which = number % len(formats)
        for kv_format in formats if is_long else formats[which : which + 1]:
            subject = random_subject(plan, kv_format, device=device)
            if subject.block_size >= _LARGE_BLOCK:
                yield subject, LONG_LARGE_BLOCKS if is_long else SHORT_LARGE_BLOCKS
            else:
                yield subject, LONG_RANDOM if is_long else SHORT_RANDOM
    for kv_format in formats if is_long else formats[:1]:
        if model is not None:
            yield load_subject(model, kv_format, device=device), LONG_SHIPPED if is_long else SHORT_SHIPPED


@asynccontextmanager
async def _store_service(scratch: Path) -> AsyncIterator[Store]:
    """A real store service on a scratch directory; blocks are read from its files as workers do."""
    deployment = Deployment(DeploymentConfig(model=scratch, data_dir=scratch))
    (scratch / "logs").mkdir()
    try:
        process = await deployment.start_role("kvstore", ["--dir", str(deployment.config.store_dir)])
        store = LocalStore(deployment.config.store_dir, process.address)
        try:
            yield store
        finally:
            await store.close()
    finally:
        await deployment.stop()


def _print(report: Report, seconds: float) -> None:
    table = Table(title="Cold against hit")
    for column in ("strategy", "plan", "cases", "equal bits", "within bounds", "failed", "largest error"):
        is_text = column in ("strategy", "plan")
        table.add_column(column, justify="left" if is_text else "right", no_wrap=is_text)
    # A stable sort by name: strategies as they were run, but all bounded ones together.
    for strategy, plans in sorted(report.by_plan.items(), key=lambda item: item[0].startswith("bounded")):
        for plan, tally in plans.items():
            table.add_row(strategy, plan, *_cells(tally))
    table.add_section()
    table.add_row("all", "", *_cells(report.total))
    console = Console()
    console.print(table)
    if report.total.where:
        console.print(f"largest error: {report.total.max_error:.2g} of the largest value of its kind, in")
        console.print(f"  {report.total.where}", markup=False, highlight=False)
    for failure in report.failures[:FAILURES_SHOWN]:
        console.print(f"failed: {failure}", markup=False, highlight=False)
    verdict = "Every hit is what its bound allows" if report.ok else "NOT every hit is what its bound allows"
    console.print(f"{verdict}; {report.total.cases} cases in {seconds:.1f} s.")


def _cells(tally: Tally) -> tuple[str, ...]:
    counts = tally.cases, tally.bit_identical, tally.within_bounds, tally.failed
    return *(str(count) for count in counts), f"{tally.max_error:.2g}" if tally.max_error else "0"
