"""`antefix usage push`: sends new ledger entries to billing systems, once or until stopped."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from prometheus_client.core import Metric

from antefix.directory_lock import DirectoryLock
from antefix.errors import ConfigError
from antefix.security.listening import is_loopback, parse_address
from antefix.telemetry import Registry
from antefix.telemetry.exposition import MetricsServer
from antefix.telemetry.shown import Shown, Table, counter, gauge
from antefix_billing.ledger_files import ledgers_of
from antefix_billing.push.push_config import load_sinks
from antefix_billing.push.pusher import Pusher
from antefix_billing.push.sinks import open_sink
from antefix_console.commands.usage_source import add_ledgers

_EVERY_S = 2.0
# Fields of `pusher.PushCounters`.
PUSH: Final[Table] = {
    "sent": Shown(name="antefix_push_sent", help="Usage records and adjustments that a receiver accepted."),
    "dead": Shown(
        name="antefix_push_refused",
        help="Usage records and adjustments that were set aside because a receiver refused them.",
    ),
    "failed": Shown(name="antefix_push_failed", help="Failed calls to a receiver of usage records; they are repeated."),
}


def add_push_arguments(parser: argparse.ArgumentParser) -> None:
    add_ledgers(parser)
    parser.add_argument(
        "--config", type=Path, required=True, help="file that says where to send usage (TOML, docs/BILLING.md)"
    )
    parser.add_argument(
        "--state", type=Path, required=True, help="directory that keeps the sending positions and the refused entries"
    )
    parser.add_argument("--once", action="store_true", help="send the entries that exist now, and exit")
    parser.add_argument("--retry-dead", action="store_true", help="send dead letters again first")
    parser.add_argument(
        "--metrics-address", default="", help="host:port on loopback at which metrics can be read (default: none)"
    )
    parser.add_argument(
        "--json", action="store_true", help="print as JSON at the end what was sent, and the sending positions"
    )


def run_push(args: argparse.Namespace) -> int:
    """The exit status is 1 if entries that a receiver refused (dead letters) remain. Raises: ConfigError: a setting or
    a client library cannot be used.
    """
    args.state.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        lock = DirectoryLock(args.state, "lock")
    except BlockingIOError as err:
        raise ConfigError(f"--state {args.state}: another `antefix usage push` uses this directory") from err
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    try:
        sinks, ledgers = load_sinks(args.config), ledgers_of(args.ledger)
        pushers = [Pusher(each, open_sink(each), ledgers, args.state, sleep=stopped.wait) for each in sinks]
        if args.metrics_address:
            _serve(args.metrics_address, pushers)
        if args.retry_dead:
            for pusher in pushers:
                pusher.push_dead()
        # One thread each, so that a receiver that does not answer does not hold up the others.
        threads = [threading.Thread(target=_follow, args=(each, stopped, args.once)) for each in pushers]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)
    finally:
        lock.close()
    said = {each.config.name: _said(each) for each in pushers}
    lines = [
        f"{name}: {row['sent']} sent, {row['dead']} dead letters, {row['backlog']} left" for name, row in said.items()
    ]
    sys.stdout.write((json.dumps(said) if args.json else "\n".join(lines)) + "\n")
    return 1 if any(row["dead"] for row in said.values()) else 0


def _said(pusher: Pusher) -> dict[str, object]:
    return {
        "sent": pusher.counters.sent,
        "dead": pusher.num_dead,
        "backlog": pusher.backlog(),
        "cursors": pusher.cursors,
    }


def _follow(pusher: Pusher, stopped: threading.Event, once: bool) -> None:
    while pusher.push() and not once and not stopped.wait(_EVERY_S):
        continue


def _serve(address: str, pushers: list[Pusher]) -> None:
    host, port = parse_address(address)
    if not is_loopback(host):
        raise ConfigError(
            f"--metrics-address {address}: the metrics of `antefix usage push` may be served on loopback only"
        )
    registry = Registry("push")
    registry.add(lambda: push_metrics(pushers))
    MetricsServer(registry, host, port, tls=None)


def push_metrics(pushers: list[Pusher]) -> Iterable[Metric]:
    """Metrics of the entries that are sent to receivers."""
    by_name = {(each.config.name,): each for each in pushers}
    label = ("sink",)
    backlog = {name: float(each.backlog()) for name, each in by_name.items()}
    yield gauge("antefix_push_backlog_entries", "Ledger entries that are not sent yet.", backlog, label)
    for field, shown in PUSH.items():
        counts = {name: float(getattr(each.counters, field)) for name, each in by_name.items()}
        yield counter(shown.name, shown.help, counts, label)
    dead = {name: float(each.num_dead) for name, each in by_name.items()}
    yield gauge("antefix_push_dead_letters", "Entries that a receiver refused for good.", dead, label)
