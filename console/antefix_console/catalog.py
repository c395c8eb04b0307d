"""Every command and role by name: a description, and how to load it. One row per command.

A loader imports inside a function, so that a command imports only the modules that it needs: `antefix --help` must not
wait for torch, and the router and the store must start where torch is not installed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol


class CommandModule(Protocol):
    """A module under `commands/`. A command's module also has `add_arguments(parser)`, or `add_parser(subparsers)` if
    the command has subcommands of its own.
    """

    def run(self, args: argparse.Namespace, /) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One subcommand of `antefix`."""

    load: Callable[[], CommandModule]
    help: str
    example: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """One service. load: returns the class of its settings, and the function that serves until it is told to stop."""

    load: Callable[[], tuple[type[Any], Callable[..., Coroutine[Any, Any, None]]]]
    example: str


def _up() -> CommandModule:
    from antefix_console.commands import up

    return up


def _generate() -> CommandModule:
    from antefix_console.commands import generate

    return generate


def _demo() -> CommandModule:
    from antefix_console.commands import demo

    return demo


def _inspect() -> CommandModule:
    from antefix_console.commands import inspect

    return inspect


def _fsck() -> CommandModule:
    from antefix_console.commands import fsck

    return fsck


def _simulate() -> CommandModule:
    from antefix_console.commands import simulate

    return simulate


def _trace() -> CommandModule:
    from antefix_console.commands import trace

    return trace


def _health() -> CommandModule:
    from antefix_console.commands import health

    return health


def _plan() -> CommandModule:
    from antefix_console.commands import plan

    return plan


def _usage() -> CommandModule:
    from antefix_console.commands import usage

    return usage


def _window() -> CommandModule:
    from antefix_console.commands import window

    return window


def _explain() -> CommandModule:
    from antefix_console.commands import explain

    return explain


def _verify() -> CommandModule:
    from antefix_console.commands import verify

    return verify


def _model() -> CommandModule:
    from antefix_console.commands import model

    return model


def _bench() -> CommandModule:
    from antefix_console.commands import bench

    return bench


def _top() -> CommandModule:
    from antefix_console.commands import top

    return top


def _certs() -> CommandModule:
    from antefix_console.commands import certs

    return certs


def _load() -> CommandModule:
    from antefix_console.commands import load

    return load


def _audit() -> CommandModule:
    from antefix_console.commands import audit

    return audit


def _store() -> CommandModule:
    from antefix_console.commands import store

    return store


def _drain() -> CommandModule:
    from antefix_console.commands import drain

    return drain


def _doctor() -> CommandModule:
    from antefix_console.commands import doctor

    return doctor


def _keys() -> CommandModule:
    from antefix_console.commands import keys

    return keys


def _secret() -> CommandModule:
    from antefix_console.commands import secret

    return secret


def _kvstore_role() -> tuple[type[Any], Callable[..., Coroutine[Any, Any, None]]]:
    from antefix_kvstore.kvstore_config import KvStoreConfig
    from antefix_kvstore.server import run

    return KvStoreConfig, run


def _prefill_role() -> tuple[type[Any], Callable[..., Coroutine[Any, Any, None]]]:
    from antefix_prefill.server import PrefillConfig, run

    return PrefillConfig, run


def _decode_role() -> tuple[type[Any], Callable[..., Coroutine[Any, Any, None]]]:
    from antefix_decode.server import DecodeConfig, run

    return DecodeConfig, run


def _router_role() -> tuple[type[Any], Callable[..., Coroutine[Any, Any, None]]]:
    from antefix_router.router_config import RouterConfig
    from antefix_router.server import run

    return RouterConfig, run


def _fleet_role() -> tuple[type[Any], Callable[..., Coroutine[Any, Any, None]]]:
    from antefix_router.fleet.fleet_config import FleetConfig
    from antefix_router.fleet.fleet_server import run

    return FleetConfig, run


COMMANDS: dict[str, Command] = {
    "up": Command(
        load=_up,
        help="start all services on this machine, and stop them at Ctrl-C",
        example="antefix up --model models/antefix-tiny --data-dir /var/lib/antefix",
    ),
    "generate": Command(
        load=_generate,
        help="generate text from a prompt, streaming to the terminal",
        example="antefix generate 'class Test(unittest.TestCase):' --max-tokens 64",
    ),
    "demo": Command(
        load=_demo,
        help="show cache hits from disk on a real document, and that a hit does not change the answer",
        example="antefix demo --json",
    ),
    "inspect": Command(
        load=_inspect,
        help="show what the directory of a store contains",
        example="antefix inspect /var/lib/antefix/store",
    ),
    "fsck": Command(
        load=_fsck,
        help="check a store, and repair it; no service may have the store open",
        example="antefix fsck /var/lib/antefix/store --repair",
    ),
    "store": Command(
        load=_store,
        help="copy a store, or delete all data of a tenant from stores",
        example="antefix store copy antefix-data/store /backup/store",
    ),
    "drain": Command(
        load=_drain,
        help="move the records of a store that is shut down to the stores that stay in service",
        example="antefix drain /data/a --to host-b:7010 host-c:7010",
    ),
    "simulate": Command(
        load=_simulate,
        help="compare window-state strategies on a recorded or generated request trace",
        example="antefix simulate --generate agents --strategy all",
    ),
    "trace": Command(
        load=_trace,
        help="convert a log of requests, or the ledger, to a trace for `simulate`, `plan` and `load`",
        example="antefix trace import --format openai-jsonl requests.jsonl --output trace.jsonl.gz",
    ),
    "plan": Command(
        load=_plan,
        help="calculate how many machines the load of a trace needs, what they cost, and which resource limits them",
        example="antefix plan --trace trace.jsonl.gz --model v4-flash --gpu h200 --retention 72h --ttft-p90 2s",
    ),
    "usage": Command(
        load=_usage,
        help="export, verify and report recorded usage and charges",
        example="antefix usage report --ledger antefix-data/ledger",
    ),
    "window": Command(
        load=_window,
        help="show or change the workers' window strategy, and show how accurate their restore-time predictions are",
        example="antefix window --router 127.0.0.1:8400 --strategy auto",
    ),
    "explain": Command(
        load=_explain,
        help="explain why a prompt hits or misses, block by block",
        example="antefix explain --data-dir antefix-data --prompt-file prompt.txt",
    ),
    "verify": Command(
        load=_verify,
        help="check bit by bit that cache hits give the same output as cold runs, for every strategy and restore plan",
        example="antefix verify --json",
    ),
    "model": Command(
        load=_model,
        help="describe the model in a directory, and say whether the model would run here",
        example="antefix model check models/antefix-tiny --json",
    ),
    "bench": Command(
        load=_bench,
        help="compare storage with the machine's limits and with other caches (needs a source checkout)",
        example="antefix bench store --json",
    ),
    "top": Command(
        load=_top,
        help="watch a deployment in the terminal: load, hit rates, tenants, latest misses",
        example="antefix top --url http://127.0.0.1:8000",
    ),
    "certs": Command(
        load=_certs,
        help="make and show the TLS certificates of a deployment over several hosts",
        example="antefix certs issue prefill p1 --ca ca --out credentials/p1 --host worker1.example",
    ),
    "load": Command(
        load=_load,
        help=(
            "send the requests of a trace to an OpenAI- or Anthropic-compatible endpoint, and report what the "
            "clients see"
        ),
        example="antefix load --url http://127.0.0.1:8000/v1 --generate agents --scale 0.1 --speed 20",
    ),
    "audit": Command(
        load=_audit,
        help="measure how an endpoint's prefix cache behaves, and whether it keeps its documented promises",
        example="antefix audit --url http://127.0.0.1:8000/v1 --report audit.md",
    ),
    "doctor": Command(
        load=_doctor,
        help="check this machine: installed packages, arithmetic, disk",
        example="antefix doctor --json",
    ),
    "health": Command(
        load=_health,
        help="test whether a service is ready; the exit status tells probes and supervisors",
        example="antefix health 127.0.0.1:7000 --service antefix.v1.RouterService",
    ),
    "keys": Command(
        load=_keys,
        help="make, list, replace and revoke API keys",
        example="antefix keys create acme --expires 90d",
    ),
    "secret": Command(
        load=_secret,
        help="make, show and change the deployment's secret",
        example="antefix secret rotate antefix-data/secret",
    ),
}
ROLES: dict[str, Service] = {
    "kvstore": Service(
        load=_kvstore_role,
        example="antefix serve kvstore --dir store --address 127.0.0.1:7001 --budget-bytes 200G",
    ),
    "prefill": Service(
        load=_prefill_role,
        example="antefix serve prefill --model MODEL --secret-file SECRET --store-address 127.0.0.1:7001",
    ),
    "decode": Service(
        load=_decode_role,
        example="antefix serve decode --model MODEL --secret-file SECRET --store-address 127.0.0.1:7001",
    ),
    "router": Service(
        load=_router_role,
        example="antefix serve router --model MODEL --secret-file SECRET --store-address 127.0.0.1:7001"
        " --prefill 127.0.0.1:7002 --decode 127.0.0.1:7003",
    ),
    "fleet": Service(
        load=_fleet_role,
        example="antefix serve fleet --workers http://127.0.0.1:8001,http://127.0.0.1:8002 --events 5557 --replay 5657"
        " --http-address 127.0.0.1:8000 --secret-file secret",
    ),
}
