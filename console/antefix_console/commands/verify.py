"""`antefix verify`: checks that a hit gives what a cold run gives, for every strategy, plan and boundary, on this
machine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import secrets
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from antefix.config import add_flags, given_flags
from antefix.errors import InvalidRequest
from antefix.store.api import Store
from antefix.store.local_store import LocalStore
from antefix.store.object_access import check_object_store
from antefix.store.remote_store import RemoteStore
from antefix.store.store_members import Member
from antefix.store.tier import Tier
from antefix.tier_kind import TierKind
from antefix.worker_settings import WorkerSettings
from antefix_console import shipped
from antefix_console.deployment import Deployment, DeploymentConfig
from antefix_console.progress_line import ProgressLine
from antefix_console.verify import engine_checks
from antefix_console.verify.against import compare_workers
from antefix_console.verify.models import PLANS
from antefix_console.verify.selection import Selection, strategies_of
from antefix_console.verify.setups import LONG_SETUPS, SHORT_SETUPS, check_setups
from antefix_console.verify.spread_stores import SpreadStores
from antefix_console.verify.suite import Backend, Suite
from antefix_console.verify.verdict import Report, Tally
from antefix_engines.verify import CHECKS
from antefix_prefill.worker.rank_processes import RankProcesses

FAILURES_SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=Path, help="model directory to verify in addition to random models (default: the shipped model)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument(
        "--long",
        action="store_true",
        help="verify longer prompts, and every restore plan in both formats; takes minutes, and prints the progress",
    )
    add_flags(
        parser.add_argument_group("as the workers have them"),
        WorkerSettings,
        ("device", "kernels", "tensor_parallel_size"),
    )
    parser.add_argument(
        "--fast",
        action="store_true",
        help="use the faster kernels on a GPU; their hits equal cold runs only within bounds",
    )
    parser.add_argument("--plans", nargs="*", choices=PLANS, help="which random models to verify (default: all)")
    parser.add_argument(
        "--drawn", type=int, metavar="N", help="number of random model shapes to verify (default: 2; with --long 40)"
    )
    parser.add_argument(
        "--seed",
        type=int,
        help="seed of the random shapes, prompts and cut positions; the same seed repeats a verification",
    )
    parser.add_argument(
        "--against",
        nargs="+",
        metavar="HOST:PORT",
        help="instead, ask workers of a running deployment the same prompts and compare their answers; addresses of"
        " at least two workers, or of a router, which stands for all of its workers",
    )
    parser.add_argument(
        "--engine",
        choices=CHECKS,
        help="verify another inference engine instead: compare its runs from the store with its cold runs",
    )
    parser.add_argument(
        "--stores",
        type=int,
        default=1,
        metavar="N",
        help=(
            "number of store services that the blocks are distributed over: one on this host's disk, the others as "
            "if on other hosts (default 1)"
        ),
    )
    parser.add_argument(
        "--object-store",
        default="",
        metavar="URL",
        help=(
            "keep some of the blocks in an object store, such as s3://BUCKET/PREFIX or file:///PATH; its new "
            "objects are deleted at the end"
        ),
    )
    parser.add_argument(
        "--data-dir", type=Path, help="directory of the temporary store (default: a temporary directory)"
    )


def run(args: argparse.Namespace) -> int:
    import torch

    from antefix.model.loading import check_device

    if args.seed is not None and args.seed < 0:
        raise InvalidRequest(f"--seed must not be negative, is {args.seed}")
    seed = secrets.randbelow(1 << 31) if args.seed is None else args.seed
    if args.stores < 1:
        raise InvalidRequest(f"--stores must be at least 1, is {args.stores}")
    check_object_store(args.object_store)
    if args.against:
        return _run_against(args, seed)
    if args.engine:
        return engine_checks.run(args, seed)
    # One thread gives the same bits as any number of threads, and never waits for another thread on a busy machine.
    torch.set_num_threads(1)
    model = args.model or (shipped.MODEL if shipped.MODEL.is_dir() else None)
    if model is not None and not model.is_dir():
        raise InvalidRequest(f"--model: {model} is not a directory")
    worker = WorkerSettings(**given_flags(WorkerSettings, args))
    check_device(worker.device)
    with (
        tempfile.TemporaryDirectory(prefix="antefix-verify-", dir=args.data_dir) as scratch,
        _ranks_of(worker) as ranks,
    ):
        started = time.monotonic()
        backend = Backend(device=worker.device, kernels=worker.kernels, reproducible=not args.fast)
        selection = Selection(
            model=model,
            is_long=args.long,
            device=worker.device,
            plans=tuple(PLANS) if args.plans is None else tuple(args.plans),
            num_drawn=args.drawn,
            seed=seed,
            ranks=ranks,
        )
        with ProgressLine("verifying", lines=args.long) as progress:
            where = partial(_stores, Path(scratch), args.stores, args.object_store)
            report, notes = asyncio.run(_verify(selection, backend, where, progress.step))
    return _conclude(args, report, seed, time.monotonic() - started, notes)


@contextmanager
def _ranks_of(worker: WorkerSettings) -> Iterator[RankProcesses | None]:
    if worker.tensor_parallel_size == 1:
        yield None
        return
    ranks = RankProcesses(worker.tensor_parallel_size, device=worker.device, threads=1)
    try:
        yield ranks
    finally:
        ranks.close()


def _run_against(args: argparse.Namespace, seed: int) -> int:
    started = time.monotonic()
    report = Report()
    notes = asyncio.run(compare_workers(args.against, report, seed=seed))
    return _conclude(args, report, seed, time.monotonic() - started, notes)


def _conclude(args: argparse.Namespace, report: Report, seed: int, seconds: float, notes: Sequence[str] = ()) -> int:
    if args.json:
        print(json.dumps(report.as_dict() | {"notes": list(notes), "seed": seed, "seconds": round(seconds, 2)}))
    else:
        _print(report, seconds)
        for note in notes:
            print(note)
        print(f"seed {seed}: --seed {seed} runs the same prompts, cuts and random models again.")
    return 0 if report.ok else 1


async def _verify(
    selection: Selection,
    backend: Backend,
    where: Callable[[], contextlib.AbstractAsyncContextManager[Store]],
    progress: Callable[[str], None],
) -> tuple[Report, list[str]]:
    """where: opens the store."""
    report = Report()
    async with where() as store, asyncio.TaskGroup() as others:
        if backend.device == "cpu":
            # They run in other processes, at the same time as the checks in this one.
            others.create_task(check_setups(LONG_SETUPS if selection.is_long else SHORT_SETUPS, report))
        for subject, plan in selection.subjects():
            await Suite(subject, store, plan, report, progress, backend).run(strategies_of(subject, plan))
    return report, [read_text(store)] if isinstance(store, SpreadStores) else []


def read_text(stores: SpreadStores) -> str:
    """How many blocks were read from each store. A store from which nothing was read has not been tested."""
    read = stores.num_blocks_read
    parts = [f"{read[tier.label]} from {tier.label}" for tier in stores.tiers]
    return f"blocks were read from all tiers at once: {', '.join(parts)}"


@asynccontextmanager
async def _stores(scratch: Path, num_stores: int, object_store: str) -> AsyncIterator[Store]:
    """Real store services on temporary directories. Blocks of the first store are read from its files, as
    workers do.
    """
    deployment = Deployment(DeploymentConfig(model=scratch, data_dir=scratch))
    (scratch / "logs").mkdir()
    try:
        members = []
        for number in range(num_stores):
            directory = deployment.config.store_dir_of(number)
            process = await deployment.start_role("kvstore", ["--dir", str(directory)])
            opened = RemoteStore(process.address) if number else LocalStore(directory, process.address)
            kind = TierKind.PEER if number else TierKind.DISK
            tier = Tier(f"store-{number}", kind, opened)
            page_cache = None if number else tier.in_page_cache()
            members.append(
                Member(tier=tier, store=opened, address=process.address, near=not number, page_cache=page_cache)
            )
        store = SpreadStores(members, object_store) if num_stores > 1 or object_store else members[0].store
        try:
            yield store
        finally:
            await store.close()
    finally:
        await deployment.stop()


def _print(report: Report, seconds: float) -> None:
    table = Table(title="Exactness")
    for column in ("strategy", "plan", "cases", "equal bits", "within bounds", "failed", "largest error"):
        is_text = column in ("strategy", "plan")
        table.add_column(column, justify="left" if is_text else "right", no_wrap=is_text)
    # A stable sort by name: strategies in the order in which they ran, with all bounded ones last.
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
