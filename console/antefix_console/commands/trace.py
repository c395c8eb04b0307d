"""`antefix trace import`: turns a log of requests, or the ledger, into a trace. The text of requests is hashed with a
key, never stored.
"""

from __future__ import annotations

import argparse
import json
import math
import secrets
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from antefix.errors import InvalidRequest
from antefix.secret import Keyring
from antefix_console.progress_line import ProgressLine
from antefix_simulate.logs.import_log import LOG_FORMATS, ImportedLog, ImportSetup, import_log
from antefix_simulate.logs.ledger_trace import import_ledger
from antefix_simulate.logs.logged_call import Tokens
from antefix_simulate.trace_file import write_trace

# The smallest block size among the models that we looked at; it divides all the others.
_UNIT_TOKENS = 64
_LEDGER = "ledger"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `trace` with its subcommands; `run` runs them."""
    add_arguments(subparsers.add_parser("trace", help="convert a log of requests, or the ledger, to a trace"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="trace_command", required=True)
    text = "Turn a log of requests into a trace: lengths, times and keyed hashes of prefixes, never any text."
    example = "example: antefix trace import --format openai-jsonl requests.jsonl --output trace.jsonl.gz"
    command = commands.add_parser(
        "import", help="convert a log of requests, or the ledger, to a trace", description=text, epilog=example
    )
    command.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="log files, plain or .gz, or the directory of a ledger"
    )
    command.add_argument("--format", required=True, choices=[*LOG_FORMATS, _LEDGER], help="format of the logs")
    command.add_argument(
        "--output", type=Path, default=Path("trace.jsonl.gz"), metavar="FILE", help="the trace to write"
    )
    command.add_argument(
        "--secret-file", metavar="FILE", help="the deployment's secret to hash with (default: a new random key)"
    )
    command.add_argument("--tokenizer", type=Path, metavar="DIR", help="count tokens by this tokenizer.json")
    command.add_argument(
        "--bytes-per-token",
        type=float,
        metavar="N",
        help="how text is counted in tokens (default: by the token counts in the log)",
    )
    command.add_argument(
        "--unit-tokens",
        type=int,
        metavar="N",
        help=f"number of tokens per unit of the trace (default {_UNIT_TOKENS}, or the ledger's block size)",
    )
    command.add_argument(
        "--per-user", action="store_true", help="treat users like tenants: two users never share a prefix"
    )
    command.add_argument(
        "--gap-s", type=float, default=1.0, metavar="S", help="seconds between two requests, for a log without times"
    )
    command.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Returns 0. Raises:  InvalidRequest: a file is not a log of this format, or arguments are invalid."""
    _check(args)
    # 1. Read.
    with ProgressLine("reading requests") as progress:
        if args.format == _LEDGER:
            imported, unit_tokens = import_ledger(args.files, block_size=args.unit_tokens)
        else:
            unit_tokens = args.unit_tokens or _UNIT_TOKENS
            setup = ImportSetup(
                key=_key(args.secret_file),
                unit_tokens=unit_tokens,
                per_user=args.per_user,
                gap_s=args.gap_s,
                bytes_per_token=args.bytes_per_token,
                tokenize=None if args.tokenizer is None else _tokenizer(args.tokenizer),
            )
            imported = import_log(
                args.files, args.format, setup, progress=lambda number: progress.count(number, number)
            )
    # 2. Write.
    about = {"source": args.format, "counted": imported.counted}
    number = write_trace(args.output, imported.requests, unit_tokens=unit_tokens, about=about)
    # 3. Print a summary, and what was left out.
    print(_as_json(args, imported, number, unit_tokens) if args.json else _as_text(args, imported, number, unit_tokens))
    for line in imported.ignored.lines():
        sys.stderr.write(f"left out: {line}\n")
    return 0


def _check(args: argparse.Namespace) -> None:
    for path in args.files:
        if not path.exists():
            raise InvalidRequest(f"there is no {path}")
    if args.unit_tokens is not None and not 1 <= args.unit_tokens <= 1 << 20:
        raise InvalidRequest(f"--unit-tokens must be from 1 to {1 << 20}, is {args.unit_tokens}")
    if args.bytes_per_token is not None and not 0.1 <= args.bytes_per_token <= 1000:
        raise InvalidRequest(f"--bytes-per-token must be from 0.1 to 1000, is {args.bytes_per_token}")
    if not (math.isfinite(args.gap_s) and args.gap_s >= 0):
        raise InvalidRequest(f"--gap-s must be a number of seconds, is {args.gap_s}")
    if not args.output.absolute().parent.is_dir():
        raise InvalidRequest(f"cannot write {args.output}: there is no directory {args.output.parent}")


def _key(secret_file: str | None) -> bytes:
    """The key from a secret file. The same secret file gives the same names for the same text, so traces can be
    compared.
    """
    return secrets.token_bytes(32) if secret_file is None else Keyring.from_file(secret_file).proof(b"trace")


def _tokenizer(directory: Path) -> Callable[[bytes], Tokens]:
    from tokenizers import Tokenizer

    path = directory / "tokenizer.json" if directory.is_dir() else directory
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as err:
        raise InvalidRequest(f"--tokenizer {directory}: {err}") from err

    def tokenize(text: bytes) -> Tokens:
        ids = tokenizer.encode(text.decode(errors="replace"), add_special_tokens=False).ids
        return np.asarray(ids, dtype=np.uint32)

    return tokenize


def _as_text(args: argparse.Namespace, imported: ImportedLog, number: int, unit_tokens: int) -> str:
    tokens = sum(request.num_tokens for request in imported.requests)
    hours = (imported.requests[-1].at_s - imported.requests[0].at_s) / 3600
    counted = {
        "logged": "as the log counts them",
        "tokenizer": "by the tokenizer",
        "estimated": f"at {imported.bytes_per_token:.2f} bytes each where the log does not count them",
    }[imported.counted]
    times = f"{hours:.2f} hours" if imported.has_times else f"no times in the log: one request each {args.gap_s:g} s"
    return (
        f"{args.output}: {number} requests, {tokens / 1e6:.2f}M prompt tokens ({counted}), {times}, "
        f"in units of {unit_tokens} tokens\n"
        f"next: antefix simulate --trace {args.output} --strategy auto --plot saved.svg"
    )


def _as_json(args: argparse.Namespace, imported: ImportedLog, number: int, unit_tokens: int) -> str:
    return json.dumps(
        {
            "trace": str(args.output),
            "requests": number,
            "prompt_tokens": sum(request.num_tokens for request in imported.requests),
            "counted": imported.counted,
            "bytes_per_token": imported.bytes_per_token,
            "has_times": imported.has_times,
            "unit_tokens": unit_tokens,
            "left_out": dict(imported.ignored.reasons),
        }
    )
