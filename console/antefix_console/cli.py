"""The `antefix` command: parses arguments, runs the command, turns errors into exit codes. Of all modules, only this
one reads environment variables.

Exit codes: 0 done; 1 the command ran, and its check failed; 2 a wrong call, setting or model; 3 a service cannot be
reached or is full; 70 a bug of ours (with a traceback, or an error id that is in a service's log); 130 interrupted.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import io
import logging
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final

import antefix
from antefix import __version__
from antefix.config import add_file_flags, add_flags, as_json, resolve
from antefix.errors import (
    AntefixError,
    ConfigError,
    InternalError,
    InvalidRequest,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
)
from antefix.extras import needs
from antefix.security import own_credentials
from antefix.start_threads import with_threads
from antefix.telemetry.logs import set_up_logs, tell_of_crashes
from antefix.telemetry.tracing import start_tracing
from antefix_console.catalog import COMMANDS, ROLES
from antefix_console.operator_credentials import find_credentials, secret_file

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_UNAVAILABLE, EXIT_INTERNAL, EXIT_INTERRUPTED = 0, 1, 2, 3, 70, 130

log = logging.getLogger("antefix.cli")

_BEGIN: Final = (
    "`antefix up` is the place to start. `antefix COMMAND --help` explains a command's flags and has an example."
)
# The optional dependencies, by extra; the router, the store and most commands work without them.
_EXTRA_OF = {
    **dict.fromkeys(("torch", "safetensors", "triton"), "worker"),
    **dict.fromkeys(("zmq", "msgspec", "httpx"), "fleet"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    # Files that a command writes (stores, bills, logs, keys) are private to its user, who may change their mode by
    # hand.
    os.umask(0o077)
    if not logging.getLogger().handlers:
        set_up_logs()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A path may hold bytes that are not text, or the terminal's encoding may lack a character: print these escaped.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return _run(args)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output ended (`antefix ... | head`). That is no error, and nobody is there to read a
        # message.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except ModuleNotFoundError as err:
        if err.name not in _EXTRA_OF:
            raise
        print(f"antefix: {needs('this command', err.name, _EXTRA_OF[err.name])}", file=sys.stderr)
        return EXIT_USAGE
    except InvalidRequest as err:
        return _fail(err, EXIT_USAGE)
    except (Unavailable, ResourceExhausted) as err:
        return _fail(err, EXIT_UNAVAILABLE)
    except InternalError as err:
        log.exception("this is a bug of Antefix; please report it with this trace")
        return _fail(err, EXIT_INTERNAL)
    except AntefixError as err:
        return _fail(err, EXIT_FAILED)
    except OSError as err:
        # An error about a file that the caller named; other system errors get a traceback, for the developers.
        if err.filename is not None:
            return _fail(err, EXIT_USAGE)
        if "temporary directory" in str(err):
            return _fail(
                ConfigError(
                    f"{err.strerror}: set the environment variable TMPDIR to a directory that can be written to"
                ),
                EXIT_USAGE,
            )
        raise


def parser_of(args: list[str]) -> tuple[argparse.ArgumentParser, Callable[[argparse.Namespace], int] | None]:
    """The parser for these arguments, and the function that runs the command; None if no command is named."""
    # Only the requested command is imported: `antefix --help` must not wait for torch.
    name = next((arg for arg in args if not arg.startswith("-")), "")
    # The package's other lines are for programmers.
    description = (antefix.__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="antefix", description=description, epilog=_BEGIN)
    parser.add_argument("--version", action="version", version=f"antefix {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run: Callable[[argparse.Namespace], int] | None = None
    for command, about in COMMANDS.items():
        if command != name:
            _subparser(subparsers, command, about.help, about.example)
            continue
        module: Any = about.load()
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
    _finish(parser)
    return parser, run


def _run(args: list[str]) -> int:
    parser, run = parser_of(args)
    if not gc.isenabled():
        # Imported objects are never garbage. entry.py turned collection off during imports, and no later pass scans
        # them.
        gc.freeze()
        gc.enable()
    parsed = parser.parse_args(args)
    assert run is not None
    if parsed.command != "serve":
        own_credentials.use_found(lambda: find_credentials(parsed, os.environ))
    try:
        return run(parsed)
    except Unauthenticated as err:
        # In a directory of another deployment, a command finds that deployment's secret.
        if parsed.command == "serve" or "secret" not in str(err) or (secret := secret_file(parsed)) is None:
            raise
        raise Unauthenticated(
            f"{err}; this command showed {secret}: name the deployment's own --data-dir or --secret-file"
        ) from err


def _subparser(
    subparsers: argparse._SubParsersAction[argparse.ArgumentParser], name: str, help_text: str, example: str
) -> argparse.ArgumentParser:
    return subparsers.add_parser(name, help=help_text, description=help_text, epilog=_example(example))


class _Help(argparse.HelpFormatter):
    """Keeps an example on one line, so that it can be copied."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith("example: ") else super()._fill_text(text, width, indent)


def _finish(parser: argparse.ArgumentParser) -> None:
    """Make this parser, and those of its commands, keep examples on one line and refuse numbers out of bounds."""
    parser.formatter_class = _Help
    for action in parser._actions:
        action.type = _BOUNDED.get(action.type, action.type)
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                _finish(each)


def _number(text: str) -> float:
    """A number. Python's own `float` accepts nan and inf, which make no sense for any command."""
    try:
        number = float(text[:_DIGITS_MAX])
    except ValueError:
        number = math.nan
    if len(text) > _DIGITS_MAX or not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"expected a finite number, not {text[:_DIGITS_MAX]!r}")
    return number


def _whole_number(text: str) -> int:
    try:
        number = int(text[:_DIGITS_MAX])
    except ValueError:
        number = 1 << 65
    if len(text) > _DIGITS_MAX or abs(number) >= 1 << 64:
        raise argparse.ArgumentTypeError(f"expected a whole number below 2^64, not {text[:_DIGITS_MAX]!r}")
    return number


_DIGITS_MAX: Final = 40
_BOUNDED: Final[dict[Any, Any]] = {float: _number, int: _whole_number}


def _example(call: str) -> str:
    return f"example: {call}"


def _add_roles(parser: argparse.ArgumentParser, args: list[str]) -> None:
    roles = parser.add_subparsers(dest="role", required=True, metavar="|".join(ROLES))
    for role, about in ROLES.items():
        sub = roles.add_parser(role, help=f"run a {role} service", epilog=_example(about.example))
        sub.add_argument(
            "--watch-stdin", action="store_true", help="stop when standard input closes (set by `antefix up`)"
        )
        if role in args:
            add_flags(sub, about.load()[0])
            add_file_flags(sub)


def _serve(args: argparse.Namespace) -> int:
    config_type, serve = ROLES[args.role].load()
    config = resolve(config_type, args, os.environ, section=args.role, sections=tuple(ROLES))
    if args.print_config:
        print(as_json(config))
        return EXIT_OK
    set_up_logs(config.log_level, config.log_format)
    tell_of_crashes()
    stop_tracing = start_tracing(config.traces, role=args.role, share=config.trace_share)
    try:
        asyncio.run(with_threads(serve(config, watch_stdin=args.watch_stdin)))
    finally:
        stop_tracing()
    return EXIT_OK


def _fail(err: Exception, code: int) -> int:
    if isinstance(err, OSError):
        # The system's message about a file, without the error number.
        print(f"antefix: {err.filename}: {err.strerror}", file=sys.stderr)
    else:
        print(f"antefix: {err}", file=sys.stderr)
    return code
