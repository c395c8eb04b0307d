"""`antefix up`: runs every role on this machine until Ctrl-C."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import signal
import sys
from collections.abc import Coroutine
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from antefix.config import GRACE_S, add_flags, given_flags, require
from antefix.errors import AntefixError, Unavailable
from antefix.keep_running import keep_running
from antefix.redis_access import RedisAccess, RedisConfig
from antefix.telemetry.logs import FORMATS, LEVELS
from antefix.window_pool import DISK, MEMORY, RedisWindowPool
from antefix.worker_settings import WorkerSettings
from antefix_console import shipped
from antefix_console.deployment import Deployment, DeploymentConfig
from antefix_console.orphans import reap_orphans
from antefix_console.preflight import check_before_start
from antefix_console.supervise import GaveUp, Supervisor


def add_deployment_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that all commands that start services have."""
    parser.add_argument(
        "--model", type=Path, default=shipped.MODEL, help="model directory (default: the shipped model)"
    )
    parser.add_argument("--num-prefill", type=int, default=1, metavar="N", help="prefill workers (default: 1)")
    parser.add_argument("--num-decode", type=int, default=1, metavar="N", help="decode workers (default: 1)")
    group = parser.add_argument_group("workers", "docs/OPERATIONS.md has examples")
    add_flags(group, WorkerSettings)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_deployment_arguments(parser)
    _add_store_arguments(parser)
    _add_router_arguments(parser)
    _add_bill_arguments(parser)
    parser.add_argument(
        "--grace-s",
        type=float,
        default=GRACE_S,
        metavar="S",
        help=f"how many seconds running requests may take when the deployment stops (default: {GRACE_S:g})",
    )
    parser.add_argument(
        "--log-level", choices=LEVELS, default="info", help="lowest level of log lines that are written (default: info)"
    )
    parser.add_argument(
        "--log-format", choices=FORMATS, default="text", help="format of the logs of all services (default: text)"
    )
    parser.add_argument(
        "--traces",
        default="",
        metavar="URL",
        help="address of an OTLP collector (gRPC) to send traces to (default: send no traces)",
    )
    parser.add_argument("--json", action="store_true", help="print the addresses of the services as one line of JSON")


def _add_store_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data-dir", type=Path, default=Path("antefix-data"), help="directory for the secret, the store and the logs"
    )
    parser.add_argument(
        "--store-bytes",
        default="",
        metavar="SIZE",
        help="disk space that the store may use, such as 200G (default: 64G)",
    )
    for kind, usual in (("block", "72 hours"), ("checkpoint", "6 hours")):
        help_text = f"how long a {kind} stays in the store after its last use; 0 for ever (default: {usual})"
        parser.add_argument(f"--{kind}-ttl-s", type=float, metavar="S", help=help_text)
    parser.add_argument(
        "--object-store",
        default="",
        metavar="URL",
        help="object store behind the stores, as s3://BUCKET/PREFIX or file:///PATH (default: none)",
    )
    parser.add_argument(
        "--num-stores",
        type=int,
        default=1,
        metavar="N",
        help=(
            "number of stores, as if each were on another host; workers are distributed over them in turn (default: 1)"
        ),
    )
    parser.add_argument(
        "--encrypt",
        action="store_true",
        help="encrypt stored records with one key per tenant, derived from DATA_DIR/store.key (default: off)",
    )


def _add_router_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--address", default="127.0.0.1:0", help="address at which the router listens (default: a free port)"
    )
    parser.add_argument(
        "--http-address", default="127.0.0.1:0", help="address at which the HTTP API listens (empty: no HTTP API)"
    )
    parser.add_argument(
        "--num-routers",
        type=int,
        default=1,
        metavar="N",
        help="number of routers, each with its own ledger (default: 1)",
    )
    parser.add_argument(
        "--tenants-file", type=_not_empty, metavar="FILE", help="file with the tenants' limits and keys"
    )
    parser.add_argument(
        "--api-keys-file", type=_not_empty, metavar="FILE", help="file with API keys, made by `antefix keys`"
    )
    parser.add_argument(
        "--chat-format",
        choices=("auto", "plain", "deepseek-v4", "deepseek-v4-0731", "template"),
        default="auto",
        help=(
            "chat format in which conversations are given to the model; deepseek-v4 supports tools and thinking "
            "(default: auto)"
        ),
    )
    parser.add_argument(
        "--model-aliases",
        default="",
        metavar="FILE",
        help="file of model names that clients may use in requests (example: deploy/model_aliases.toml)",
    )
    parser.add_argument(
        "--prefix-rules",
        default="",
        metavar="FILE",
        help=(
            "file of rules that move changing lines of a system prompt behind its stable part "
            "(deploy/prefix_rules.toml), or off"
        ),
    )


def _add_bill_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ratecards",
        nargs="*",
        default=(),
        metavar="FILE",
        help="files of prices (examples: deploy/ratecards/*.toml)",
    )
    parser.add_argument(
        "--anchors",
        nargs="*",
        default=(),
        metavar="PLACE",
        help="files on another disk or host, or object stores, that receive signed hashes of the ledgers",
    )
    parser.add_argument(
        "--bill-redis", default="", metavar="URL", help="Redis server through which several routers share one bill"
    )


def _not_empty(text: str) -> str:
    """Refuse an empty file name, such as that of an unset variable, because it would turn API keys off."""
    require(bool(text.strip()), "--tenants-file or --api-keys-file is empty: leave it out where it is not meant")
    return text


def deployment_config(args: argparse.Namespace, data_dir: Path, address: str = "127.0.0.1:0") -> DeploymentConfig:
    """Raises:  ConfigError: settings that are invalid, or too few workers to answer a request."""
    # Decode workers can prefill themselves, but only they can decode.
    require(args.num_decode > 0, f"--num-decode must be at least 1, is {args.num_decode}")
    return DeploymentConfig(
        model=args.model,
        data_dir=data_dir,
        num_prefill=args.num_prefill,
        num_decode=args.num_decode,
        router_address=address,
        **given_flags(WorkerSettings, args),
    )


def run(args: argparse.Namespace) -> int:
    config = dataclasses.replace(
        deployment_config(args, args.data_dir, args.address),
        store_bytes=args.store_bytes,
        block_ttl_s=args.block_ttl_s,
        checkpoint_ttl_s=args.checkpoint_ttl_s,
        http_address=args.http_address,
        num_routers=args.num_routers,
        num_stores=args.num_stores,
        object_store=args.object_store,
        ratecards=tuple(args.ratecards),
        tenants_file=args.tenants_file or "",
        api_keys_file=args.api_keys_file or "",
        bill_redis=args.bill_redis,
        anchors=tuple(args.anchors),
        encrypt=args.encrypt,
        chat_format=args.chat_format,
        model_aliases=args.model_aliases,
        prefix_rules=args.prefix_rules,
        grace_s=args.grace_s,
        log_level=args.log_level,
        log_format=args.log_format,
        traces=args.traces,
    )
    check_before_start(config)
    return asyncio.run(_run(config, as_json=args.json))


async def _run(config: DeploymentConfig, *, as_json: bool) -> int:
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, asked.set)
    _tell("starting services ...")
    deployment = Deployment(config, _tell)
    loop.add_signal_handler(signal.SIGHUP, deployment.reload)
    reaping = keep_running(
        partial(reap_orphans, lambda: {each.process.pid for each in deployment.processes}),
        "the wait for orphaned processes",
    )
    stopped = asyncio.create_task(asked.wait())
    try:
        if not await _until(_start(deployment, config, as_json=as_json), stopped):
            _tell("stopped while starting")
            return 0
        try:
            await _until(Supervisor(deployment, _tell).run(), stopped)
            has_failed = False
        except GaveUp as err:
            _tell(f"antefix up gives up: {err}")
            has_failed = True
        loop.add_signal_handler(signal.SIGINT, deployment.hurry)
        # Ignore further SIGTERMs, which a supervisor may send; only Ctrl-C hurries.
        loop.add_signal_handler(signal.SIGTERM, lambda: None)
        return max(await _stop(deployment), int(has_failed))
    finally:
        for task in (stopped, reaping):
            task.cancel()
        await deployment.stop()


async def _start(deployment: Deployment, config: DeploymentConfig, *, as_json: bool) -> None:
    await warn_of_pool(config.window_pool, config)
    await deployment.start()
    _announce(deployment, as_json=as_json)


async def _until(work: Coroutine[Any, Any, None], stopped: asyncio.Task[Any]) -> bool:
    """Run until the work ends or this process is told to stop. Returns whether the work ended. Raises what the work
    raised.
    """
    working = asyncio.create_task(work)
    await asyncio.wait({working, stopped}, return_when=asyncio.FIRST_COMPLETED)
    if not working.done():
        working.cancel()
    await asyncio.gather(working, return_exceptions=True)
    if working.cancelled():
        return False
    working.result()
    return True


async def _stop(deployment: Deployment) -> int:
    """The exit code is 1 if a service had to be killed."""
    _tell("stopping ...")
    with contextlib.suppress(AntefixError):
        if num_running := await deployment.num_running():
            grace_s = deployment.config.grace_s
            _tell(f"waiting for {num_running} running requests, {grace_s:g} s at most; Ctrl-C ends them now")
    killed = await deployment.stop(_tell)
    _tell(f"{len(killed)} processes had to be killed" if killed else "stopped")
    return 1 if killed else 0


def _tell(text: str) -> None:
    _say(text, sys.stderr)


def _say(text: str, stream: TextIO | None) -> None:
    """Print a line, and ignore errors such as a full disk or a closed pipe, because the running services must
    continue.
    """
    with contextlib.suppress(OSError, ValueError):
        print(text, file=stream, flush=True)


async def warn_of_pool(address: str, config: RedisConfig | None = None) -> None:
    """Warn if Redis does not answer. An unreachable Redis is no error, because checkpoints then go to disk, but its
    address may be mistyped.
    """
    if address in (DISK, MEMORY):
        return
    pool = RedisWindowPool(RedisAccess.of(address, config) if config else address, bytes_max=1)
    try:
        await pool.check()
    except Unavailable as err:
        _tell(f"warning: {err}; checkpoints go to disk until the window pool answers")
    finally:
        await pool.close()


def _announce(deployment: Deployment, *, as_json: bool) -> None:
    rows = [
        {
            "role": p.role,
            "address": p.address,
            "pid": p.process.pid,
            "metrics_address": p.metrics_address,
            **({"http_address": p.http_address} if p.http_address else {}),
            **({"store": store} if (store := deployment.store_of(p)) else {}),
        }
        for p in deployment.processes
    ]
    http_addresses = [p.http_address for p in deployment.processes if p.http_address]
    if as_json:
        http_address = deployment.one("router").http_address
        said = {"ready": True, "processes": rows, "http_address": http_address, "http_addresses": http_addresses}
        _say(json.dumps(said), sys.stdout)
        return
    lines = []
    for row in rows:
        more = f"  {row['store']}" if "store" in row else ""
        where, metrics = f"{row['address']:<22} pid {row['pid']:<8}", f"http://{row['metrics_address']}/metrics"
        lines.append(f"{row['role']:<8} {where} metrics {metrics}{more}")
    lines += [f"HTTP API (OpenAI, Anthropic) at http://{http_address}/v1" for http_address in http_addresses]
    lines += [f"Page with load and hits at http://{http_address}/ui" for http_address in http_addresses[:1]]
    router = deployment.one("router").address
    lines += ["", f"Try:  antefix generate --router {router} 'class Test(unittest.TestCase):'"]
    _say("\n".join([*lines, "Ctrl-C stops everything."]), sys.stdout)
