"""`antefix load`: replay a trace against an OpenAI- or Anthropic-compatible endpoint, with the trace's own timing."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import secrets
from collections.abc import Iterator
from pathlib import Path

from antefix.errors import InvalidRequest
from antefix_console.commands.endpoint_flags import add_endpoint_flags, endpoint_of
from antefix_console.endpoint.client import EndpointClient, EndpointConfig
from antefix_console.endpoint.reply import Question
from antefix_console.load.load_plot import plot_load
from antefix_console.load.load_report import as_text, summarise
from antefix_console.load.prompt_text import TokenRate, measure_token_rate, prompt_text
from antefix_console.load.replay import Planned, Sent, replay
from antefix_console.progress_line import ProgressLine
from antefix_simulate.generated_traces import SHAPES, generate
from antefix_simulate.plot import check_path
from antefix_simulate.trace import FORMATS, Trace, TraceRequest, format_of, load

# The block size of the model that Antefix ships. Prefixes are told apart in this unit; a generated trace has none.
_GENERATED_UNIT_TOKENS = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_endpoint_flags(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--trace", type=Path, metavar="FILE", help="a trace file, plain or .gz (see `antefix trace`)")
    source.add_argument("--generate", choices=sorted(SHAPES), help="use a generated trace instead of a file")
    parser.add_argument(
        "--format", choices=sorted(FORMATS), help="format of the trace file (default: detected from the file's content)"
    )
    parser.add_argument(
        "--requests",
        type=int,
        default=200,
        metavar="N",
        help="send only the first N requests of the trace (default 200)",
    )
    parser.add_argument(
        "--speed", type=float, default=1.0, help="factor by which the trace is replayed faster (default 1)"
    )
    parser.add_argument(
        "--scale", type=float, default=1.0, help="factor by which all lengths in the trace are multiplied (default 1)"
    )
    parser.add_argument(
        "--max-output-tokens", type=int, default=256, metavar="N", help="most output tokens per answer (default 256)"
    )
    parser.add_argument(
        "--concurrency",
        type=int,
        default=256,
        metavar="N",
        help="most requests that run at the same time (default 256)",
    )
    parser.add_argument("--spread-s", type=float, default=3600.0, help="seconds over which conversations start")
    parser.add_argument("--seed", type=int, default=0, help="seed of a generated trace (default 0)")
    parser.add_argument(
        "--salt",
        default="",
        metavar="TEXT",
        help="seed of the prompts' text (default: a new seed, so that no prompt is cached)",
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="also write a plot, as .svg or .png; needs matplotlib"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    """The exit code is 0 if all requests were answered, else 1.

    Raises:  InvalidRequest: the arguments or the trace are invalid.  Unavailable: the endpoint does not answer.
    """
    for name in ("speed", "scale", "spread_s"):
        if not (math.isfinite(getattr(args, name)) and getattr(args, name) > 0):
            raise InvalidRequest(f"--{name.replace('_', '-')} must be above 0")
    for name in ("requests", "max_output_tokens", "concurrency"):
        if getattr(args, name) < 1:
            raise InvalidRequest(f"--{name.replace('_', '-')} must be 1 or more")
    if args.plot:
        check_path(args.plot)
    trace = _trace(args)
    config = endpoint_of(args)
    sent = asyncio.run(_replay(args, trace, config))
    report = summarise(sent)
    if args.plot:
        plot_load(sent, args.plot, f"{trace.name}: {len(sent)} requests to {config.url}")
    print(json.dumps(report.as_dict(), indent=1) if args.json else as_text(report))
    return 0 if report.num_ok == report.num_requests else 1


def _trace(args: argparse.Namespace) -> Trace:
    if args.generate:
        return generate(args.generate, num_requests=args.requests, unit_tokens=_GENERATED_UNIT_TOKENS, seed=args.seed)
    if not args.trace.is_file():
        raise InvalidRequest(f"there is no trace file {args.trace}")
    return load(args.trace, args.format or format_of(args.trace), block_size=1, spread_s=args.spread_s)


async def _replay(args: argparse.Namespace, trace: Trace, config: EndpointConfig) -> list[Sent]:
    salt = args.salt or secrets.token_hex(8)
    async with EndpointClient(config) as client:
        await client.choose_model()
        # 1. Measure how many tokens a word takes here.
        rate = await measure_token_rate(client.ask, args.seed)
        # 2. Send every request at its time.
        planned = list(_planned(args, trace, rate, salt))
        with ProgressLine("replaying", lines=True) as progress:
            done = 0

            def note(sent: Sent) -> None:
                nonlocal done
                done += 1
                progress.count(done, len(planned))

            return await replay(planned, client.ask, concurrency_max=args.concurrency, on_sent=note)


def _planned(args: argparse.Namespace, trace: Trace, rate: TokenRate, salt: str) -> Iterator[Planned]:
    requests = trace.requests[: args.requests]
    started_s = requests[0].at_s
    seen: set[int] = set()
    for number, request in enumerate(requests):
        names = request.names.tolist()
        known = next((index for index, name in enumerate(names) if name not in seen), len(names))
        seen.update(names)

        def question(request: TraceRequest = request, number: int = number) -> Question:
            text = prompt_text(
                request, number=number, unit_tokens=trace.unit_tokens, scale=args.scale, rate=rate, salt=salt
            )
            wanted = max(1, round(request.output_tokens * args.scale))
            return Question(prompt=text, max_tokens=min(wanted, args.max_output_tokens))

        yield Planned(
            at_s=(request.at_s - started_s) / args.speed,
            question=question,
            ideal_tokens=known * trace.unit_tokens,
            trace_tokens=request.num_tokens,
        )
