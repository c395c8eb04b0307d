"""`antefix generate`: generates from one prompt and streams the output to the terminal."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from antefix.clients import Generated, RouterClient
from antefix.errors import InvalidRequest
from antefix.sampling import Sampling
from antefix.tokenizer import load_tokenizer
from antefix_console.commands.prompt_text import given_text, read_text
from antefix_console.commands.up import add_deployment_arguments, deployment_config
from antefix_console.deployment import Deployment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_deployment_arguments(parser)
    parser.add_argument("prompt", nargs="?", help="the prompt (default: read from --file or standard input)")
    parser.add_argument("--file", type=Path, metavar="FILE", help="file to read the prompt from (-: standard input)")
    parser.add_argument(
        "--router",
        metavar="HOST:PORT",
        help="address of a running router (default: start the services for this call)",
    )
    parser.add_argument(
        "--data-dir", type=Path, help="directory in which the store stays between calls (only without --router)"
    )
    parser.add_argument("--max-tokens", type=int, default=128, metavar="N", help="(default: 128)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 is greedy (default)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="X", help="(default: 1)")
    parser.add_argument(
        "--seed", type=int, metavar="N", help="seed of the sampling; the same seed gives the same output"
    )
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="stop the output at this text; may be repeated"
    )
    parser.add_argument("--tenant", default="", help="tenant whose cache is used")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object at the end instead of streaming text"
    )


def run(args: argparse.Namespace) -> int:
    return asyncio.run(_run(args))


async def _run(args: argparse.Namespace) -> int:
    prompt = _prompt(args)
    tokenizer = load_tokenizer(args.model)
    sampling = Sampling(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        stop=tuple(tuple(tokenizer.encode(text)) for text in args.stop),
    )
    async with _router(args) as router:
        text, last = "", None
        async for message in router.generate(prompt, sampling, tenant=args.tenant):
            text += message.text
            last = message
            if not args.json:
                print(message.text, end="", flush=True)
        assert last is not None
        _report(args, text, last)
    return 0


def _prompt(args: argparse.Namespace) -> str:
    if args.prompt is not None and args.file is not None:
        raise InvalidRequest("give either a prompt or --file, not both")
    if args.prompt is not None:
        return given_text(args.prompt)
    return read_text(args.file if args.file is not None else Path("-"))


@contextlib.asynccontextmanager
async def _router(args: argparse.Namespace) -> AsyncIterator[RouterClient]:
    if args.router:
        async with RouterClient(args.router) as router:
            yield router
        return
    with tempfile.TemporaryDirectory(prefix="antefix-") as scratch:
        print("starting services ...", file=sys.stderr, flush=True)
        async with Deployment(deployment_config(args, args.data_dir or Path(scratch))) as deployment:
            yield deployment.router


def _report(args: argparse.Namespace, text: str, last: Generated) -> None:
    assert last.usage is not None
    usage = last.usage
    if args.json:
        restore = dataclasses.asdict(last.restore) if last.restore else {}
        restore["last_hit_hash"] = last.restore.last_hit_hash.hex() if last.restore else ""
        report = {"text": text, "finish_reason": last.finish_reason, "usage": dataclasses.asdict(usage)}
        print(json.dumps({**report, "restore": restore}))
        return
    plan = last.restore.plan if last.restore else "cold"
    print(
        f"\n\n[{usage.prompt_tokens} prompt tokens = {usage.cache_hit_tokens} hit + {usage.cache_miss_tokens} miss"
        f" ({plan}), {usage.output_tokens} out, first token after {usage.ttft_s:.2f} s, {last.finish_reason}]",
        file=sys.stderr,
    )
