"""The `antefix` command. Parses, hands over, turns errors into exit codes; the only place that reads the environment.

Exit codes: 0 done; 1 the command ran and what it checks is not so; 2 a wrong call, setting or model; 3 a service could
not be reached or is full; 130 interrupted.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from antefix import __version__
from antefix.config import add_flags, as_json, resolve
from antefix.errors import AntefixError, InvalidRequest, ResourceExhausted, Unavailable

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_UNAVAILABLE, EXIT_INTERRUPTED = 0, 1, 2, 3, 130


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A subcommand, imported only when it is used: `module` has `run(args) -> exit code`, and `add_arguments(parser)`
    or, where it has commands of its own, `add_parser(subparsers)`."""

    module: str
    help: str
    example: str


COMMANDS: dict[str, Command] = {
    "up": Command(
        module="antefix.commands.up",
        help="run all roles on this machine until Ctrl-C",
        example="antefix up --model models/antefix-tiny --data-dir /var/lib/antefix",
    ),
    "generate": Command(
        module="antefix.commands.generate",
        help="generate from a prompt, streaming to the terminal",
        example="antefix generate 'def fibonacci(n):' --max-tokens 64",
    ),
    "demo": Command(
        module="antefix.commands.demo",
        help="show hits from disk on a real document, and that they change nothing",
        example="antefix demo --json",
    ),
    "inspect": Command(
        module="kvstore.commands.inspect",
        help="what a store directory holds",
        example="antefix inspect /var/lib/antefix/store",
    ),
    "fsck": Command(
        module="kvstore.commands.fsck",
        help="check a store that no service has open, and repair it",
        example="antefix fsck /var/lib/antefix/store --repair",
    ),
    "simulate": Command(
        module="simulate.cli",
        help="compare window-state strategies on a trace",
        example="antefix simulate --generate agents --strategy all",
    ),
    "usage": Command(
        module="antefix.usage.cli",
        help="export, verify and report what was used and billed",
        example="antefix usage report --ledger antefix-data/ledger",
    ),
    "window": Command(
        module="antefix.commands.window",
        help="show or change the workers' window strategy, and how well they predict restores",
        example="antefix window --router 127.0.0.1:8400 --strategy auto",
    ),
    "explain": Command(
        module="antefix.commands.explain",
        help="why a prompt hits or misses, block by block",
        example="antefix explain --data-dir antefix-data --prompt-file prompt.txt",
    ),
    "verify": Command(
        module="antefix.commands.verify",
        help="compare hits with cold runs, bit by bit, for every strategy and plan",
        example="antefix verify --json",
    ),
    "bench": Command(
        module="antefix.commands.bench",
        help="measure beside the machine's limits and beside peers (in a checkout)",
        example="antefix bench store --json",
    ),
    "doctor": Command(
        module="antefix.commands.doctor",
        help="check this machine: packages, arithmetic, disk",
        example="antefix doctor --json",
    ),
}
ROLES = {
    "kvstore": ("kvstore.server", "KvStoreConfig"),
    "prefill": ("prefill.server", "PrefillConfig"),
    "decode": ("decode.server", "DecodeConfig"),
    "router": ("router.server", "RouterConfig"),
}
EXAMPLES = {
    "kvstore": "antefix serve kvstore --dir store --address 127.0.0.1:7001 --budget-bytes 200G",
    "prefill": "antefix serve prefill --model MODEL --secret-file SECRET --store-address 127.0.0.1:7001",
    "decode": "antefix serve decode --model MODEL --secret-file SECRET --store-address 127.0.0.1:7001",
    "router": "antefix serve router --model MODEL --secret-file SECRET --store-address 127.0.0.1:7001"
    " --prefill 127.0.0.1:7002 --decode 127.0.0.1:7003",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    try:
        return _run(args)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output left (`antefix ... | head`): nothing is wrong, and nobody is there to be told.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except InvalidRequest as err:
        return _fail(err, EXIT_USAGE)
    except (Unavailable, ResourceExhausted) as err:
        return _fail(err, EXIT_UNAVAILABLE)
    except AntefixError as err:
        return _fail(err, EXIT_FAILED)
    except OSError as err:
        # A file or directory of the caller's; anything else of the system's is for whoever mends the program.
        if err.filename is None:
            raise
        return _fail(err, EXIT_USAGE)


def _run(args: list[str]) -> int:
    # Only the command that is asked for is imported: `antefix --help` must not wait for torch.
    name = next((arg for arg in args if not arg.startswith("-")), "")
    parser = argparse.ArgumentParser(prog="antefix", description=__import__("antefix").__doc__)
    parser.add_argument("--version", action="version", version=f"antefix {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run: Callable[[argparse.Namespace], int] | None = None
    for command, about in COMMANDS.items():
        if command != name:
            _subparser(subparsers, command, about.help, about.example)
            continue
        module = importlib.import_module(about.module)
        run = module.run
        if hasattr(module, "add_parser"):
            module.add_parser(subparsers)
            subparsers.choices[name].epilog = _example(about.example)
        else:
            module.add_arguments(_subparser(subparsers, command, about.help, about.example))
    serve = _subparser(subparsers, "serve", "run one role", "antefix serve kvstore --dir /var/lib/antefix/store")
    if name == "serve":
        _add_roles(serve, args)
        run = _serve
    parsed = parser.parse_args(args)
    assert run is not None
    return run(parsed)


def _subparser(
    subparsers: argparse._SubParsersAction[argparse.ArgumentParser], name: str, help_text: str, example: str
) -> argparse.ArgumentParser:
    return subparsers.add_parser(name, help=help_text, description=help_text, epilog=_example(example))


def _example(call: str) -> str:
    return f"example: {call}"


def _add_roles(parser: argparse.ArgumentParser, args: list[str]) -> None:
    roles = parser.add_subparsers(dest="role", required=True, metavar="|".join(ROLES))
    for role, (module, config_name) in ROLES.items():
        sub = roles.add_parser(role, help=f"run a {role} service", epilog=_example(EXAMPLES[role]))
        sub.add_argument("--watch-stdin", action="store_true", help="stop when stdin closes (set by `antefix up`)")
        if role in args:
            add_flags(sub, getattr(importlib.import_module(module), config_name))


def _serve(args: argparse.Namespace) -> int:
    module_name, config_name = ROLES[args.role]
    module = importlib.import_module(module_name)
    config = resolve(getattr(module, config_name), args, os.environ, section=args.role, sections=tuple(ROLES))
    if args.print_config:
        print(as_json(config))
        return EXIT_OK
    asyncio.run(module.run(config, watch_stdin=args.watch_stdin))
    return EXIT_OK


def _fail(err: Exception, code: int) -> int:
    print(f"antefix: {type(err).__name__}: {err}", file=sys.stderr)
    return code
