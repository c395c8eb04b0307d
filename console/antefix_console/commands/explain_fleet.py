"""`antefix explain --fleet`: what a router knows of workers that are other engines (a fleet), and of one request."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from antefix.checked_files import parse_json
from antefix.clients.fleet import CandidateEngine, EngineStatus, ExplainedRequest, FleetClient
from antefix.errors import InvalidRequest
from antefix.miss_reason import MissReason
from antefix.text_table import text_table
from antefix_console.commands.prompt_text import given_text, read_text
from antefix_console.explain.text import FLEET_ADVICE

_KNOWLEDGE = {
    "events": "from its events",
    "behind": "from its events, some missed",
    "guess": "guessed: it publishes no events",
}


def add_arguments(parser: argparse.ArgumentParser, prompt: argparse._MutuallyExclusiveGroup) -> None:
    """prompt: the group of flags that name a prompt."""
    prompt.add_argument(
        "--workers",
        action="store_true",
        help="with --fleet, show what the router knows about its workers; needs no prompt",
    )
    parser.add_argument(
        "--fleet", metavar="HOST:PORT", help="gRPC address of a router that serves workers of other inference engines"
    )


def run(args: argparse.Namespace) -> int:
    status, explained = asyncio.run(_ask(args))
    if args.json:
        found = {"workers": [dataclasses.asdict(each) for each in status]} if explained is None else _dict(explained)
        print(json.dumps(found))
        return 0
    for line in _workers(status) if explained is None else _lines(explained):
        print(line)
    return 0


async def _ask(args: argparse.Namespace) -> tuple[Sequence[EngineStatus], ExplainedRequest | None]:
    async with FleetClient(args.fleet) as client:
        if args.workers:
            return await client.status(), None
        return (), await client.explain(_body(args), tenant=args.tenant)


def _body(args: argparse.Namespace) -> str:
    """The request body as a client would send it."""
    if args.messages is not None:
        body = parse_json(read_text(Path(args.messages)), f"--messages {args.messages}")
        return json.dumps({"messages": body} if isinstance(body, list) else body)
    if args.tokens_file is not None:
        return json.dumps({"prompt": parse_json(read_text(args.tokens_file), f"--tokens-file {args.tokens_file}")})
    if args.prompt is not None:
        return json.dumps({"prompt": given_text(args.prompt)})
    if args.prompt_file is not None:
        return json.dumps({"prompt": read_text(args.prompt_file)})
    raise InvalidRequest(
        "--fleet explains a prompt or the workers: give --prompt, --prompt-file, --tokens-file, --messages or --workers"
    )


def _workers(status: Sequence[EngineStatus]) -> Iterator[str]:
    head = ("worker", "state", "cache", "blocks", "tokens each", "running", "expected", "reported", "lost")
    rows = [
        (
            each.worker,
            "serves" if each.up else "is down",
            _KNOWLEDGE.get(each.knowledge, each.knowledge),
            *(str(number) for number in (each.blocks, each.block_size, each.requests)),
            *(str(number) for number in (each.expected_hit_tokens, each.reported_hit_tokens, each.lost_hit_tokens)),
        )
        for each in status
    ]
    yield text_table(head, rows, num_left=3)
    yield ""
    yield 'Expected, reported and lost are hit tokens of the answers so far: docs/FLEET.md, "Lost hits".'


def _lines(found: ExplainedRequest) -> Iterator[str]:
    chosen = next(each for each in found.candidates if each.engine.worker == found.chosen)
    if not found.prompt_tokens:
        yield f"No worker could tokenize the prompt, so {found.chosen} would get it, by load alone."
        return
    share = chosen.hit_tokens / found.prompt_tokens
    yield f"{chosen.hit_tokens} of {found.prompt_tokens} prompt tokens would be hits ({share:.0%}), at {found.chosen}."
    if found.miss_reason is not MissReason.NONE:
        yield f"The first tokens that miss begin at token {found.first_missed_token}: {found.miss_reason}."
    yield ""
    media = [medium for medium, _ in max((each.media for each in found.candidates), key=len, default=())]
    head = ("worker", "state", "cache", "hits", "has", *(f"in {medium}" for medium in media), "running", "to compute")
    yield text_table(head, (_row(each, len(media)) for each in found.candidates), num_left=3)
    if any(each.leading_tokens > each.hit_tokens for each in found.candidates):
        yield ""
        yield (
            "Where `has` exceeds `hits`, a worker's window layers lack the state to continue further on, or only the"
            " last"
        )
        yield "token would be left, which engines compute together with its block."
    if found.miss_reason is not MissReason.NONE:
        yield ""
        yield f"What to do: {FLEET_ADVICE[found.miss_reason]}"


def _row(each: CandidateEngine, num_media: int) -> tuple[str, ...]:
    engine, held = each.engine, [str(tokens) for _, tokens in each.media]
    return (
        engine.worker,
        "serves" if engine.up else "is down",
        _KNOWLEDGE.get(engine.knowledge, engine.knowledge),
        *(str(each.hit_tokens), str(each.leading_tokens)),
        *(held or ["?"] * num_media),
        *(str(engine.requests), str(engine.pending_tokens)),
    )


def _dict(found: ExplainedRequest) -> dict[str, Any]:
    return {**dataclasses.asdict(found), "miss_reason": found.miss_reason.value}
