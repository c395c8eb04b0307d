"""`antefix model check DIR`: what a model directory is, whether and how it would run here, and how much memory it
takes.

Only config.json and the files' headers are read, which takes seconds for any model.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from antefix.config import add_flags, given_flags, require
from antefix.errors import AntefixError
from antefix.worker_settings import WorkerSettings
from antefix_console.commands.model_v41 import describe_v41, render_v41
from antefix_console.progress_line import ProgressLine

if TYPE_CHECKING:
    from antefix.model.describe import Description

_GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A device on which a worker could run. needed_bytes: weights and a block pool of `--pool-bytes`, for each GPU."""

    name: str
    dtype: str
    needed_bytes: int
    free_bytes: int

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= self.free_bytes


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `model` with its subcommands; `run` runs them."""
    parser = subparsers.add_parser(
        "model", help="describe the model in a directory, and say whether the model would run here"
    )
    commands = parser.add_subparsers(dest="model_command", required=True)
    example = "antefix model check models/antefix-tiny --json"
    check = commands.add_parser(
        "check",
        help=(
            "check a model directory without reading its weights; the exit status is 1 if the model would not run here"
        ),
        description=__doc__,
        epilog=f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check.add_argument("directory", type=Path, metavar="DIR", help="config.json and *.safetensors")
    check.add_argument("--pool-bytes", default="1G", help="memory for a worker's block pool (default: %(default)s)")
    # By default, as few GPUs as the worker fits on.
    add_flags(check, WorkerSettings, ("tensor_parallel_size",))
    check.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    from antefix.byte_size import parse_byte_size
    from antefix.model.describe import describe

    pool_bytes = parse_byte_size(args.pool_bytes)
    require(pool_bytes > 0, "--pool-bytes must be positive")
    given = given_flags(WorkerSettings, args)
    num_ranks = WorkerSettings(**given).tensor_parallel_size
    try:
        with ProgressLine("reading headers"):
            found = describe(args.directory, num_ranks=num_ranks)
            places = [_host(found, pool_bytes), *_cards(found, pool_bytes)]
            if not given and len(places) > 2 and not any(place.fits for place in places[1:]):
                places += _several_cards(args.directory, pool_bytes, len(places) - 1)
    except AntefixError as err:
        return _refuse(args, str(err))
    if args.json:
        print(json.dumps(_as_json(found, places)))
    else:
        print(render(found, places))
    return 0 if any(place.fits for place in places) else 1


def _refuse(args: argparse.Namespace, reason: str) -> int:
    known = describe_v41(args.directory)
    if args.json:
        about = {"known": asdict(known)} if known else {}
        print(json.dumps({"loads": False, "reason": reason, "path": str(args.directory), **about}))
    else:
        print(f"{args.directory} would not load: {reason}")
        if known:
            print(render_v41(known))
    return 1


def _host(found: Description, pool_bytes: int) -> Place:
    needed = (found.memory_bytes["float32"] + pool_bytes) * found.num_ranks
    return Place(name="cpu", dtype="float32", needed_bytes=needed, free_bytes=_free_memory())


def _free_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return 0


def _cards(found: Description, pool_bytes: int) -> list[Place]:
    """Each GPU, or as many GPUs as a worker of several ranks needs."""
    import torch

    needed = found.memory_bytes["bfloat16"] + pool_bytes
    if found.num_ranks > 1:
        free = [torch.cuda.mem_get_info(number)[0] for number in range(torch.cuda.device_count())][: found.num_ranks]
        enough = min(free) if len(free) == found.num_ranks else 0
        name = f"cuda, {found.num_ranks} cards"
        return [Place(name=name, dtype="bfloat16", needed_bytes=needed, free_bytes=enough)] if free else []
    return [
        Place(
            name=f"cuda:{number} ({torch.cuda.get_device_name(number)})",
            dtype="bfloat16",
            needed_bytes=needed,
            free_bytes=torch.cuda.mem_get_info(number)[0],
        )
        for number in range(torch.cuda.device_count())
    ]


def _several_cards(directory: Path, pool_bytes: int, num_cards: int) -> list[Place]:
    """The fewest GPUs (2, 4, 8 and so on) that a worker fits on; empty if it fits on none."""
    from antefix.model.describe import describe

    num_ranks = 2
    while num_ranks <= num_cards:
        (place,) = _cards(describe(directory, num_ranks=num_ranks), pool_bytes)
        if place.fits:
            return [place]
        num_ranks *= 2
    return []


def _as_json(found: Description, places: list[Place]) -> dict[str, Any]:
    runs_on = [asdict(place) | {"fits": place.fits} for place in places]
    return {"loads": True, **asdict(found), "places": runs_on}


def render(about: Description, places: list[Place]) -> str:
    """The description as text."""
    layers = ", ".join(f"{number} {kind}" for kind, number in about.layers.items())
    packed = ", ".join(f"{_gib(nbytes)} of {form}" for form, nbytes in about.packed.items()) or "none"
    lines = [
        f"{about.path} would load",
        f"  layers      {sum(about.layers.values())}: {layers}; width {about.hidden_size}, {about.num_experts} experts",
        f"  weights     {about.num_weights / 1e9:.2f} billion in {about.num_files} files of {_gib(about.file_bytes)},"
        f" {about.num_tensors} tensors",
        f"  packed      {packed}",
        *(f"  not run     {_gib(nbytes)} of {name}" for name, nbytes in about.skipped.items()),
        f"  memory      {_gib(about.memory_bytes['float32'])} with --dtype float32,"
        f" {_gib(about.memory_bytes['bfloat16'])} with --dtype bfloat16"
        + (f", in each of {about.num_ranks} ranks" if about.num_ranks > 1 else ""),
        f"  KV          {about.kv.token:,.0f} B per token on disk and on a GPU, {about.kv.pool_token:,.0f} B in a"
        f" CPU's pool; blocks of {about.kv.block_tokens} tokens; a checkpoint {about.kv.checkpoint / 1e6:.2f} MB",
        f"  prompts     up to {about.max_tokens:,} tokens, {about.vocab_size:,} token ids;"
        f" {'has a tokenizer' if about.has_tokenizer else 'has no tokenizer: token ids only'}",
        *(f"  note        {note}" for note in about.notes),
        *(_line(place) for place in places),
    ]
    if not any(place.fits for place in places):
        lines.append(
            "A worker does not fit here. --tensor-parallel-size N divides its experts and heads among N cards."
        )
    return "\n".join(lines)


def _line(place: Place) -> str:
    verdict = "fits" if place.fits else "does not fit"
    return (
        f"  {place.name:<11} {verdict}: a worker takes {_gib(place.needed_bytes)} in {place.dtype},"
        f" {_gib(place.free_bytes)} are free"
    )


def _gib(nbytes: int) -> str:
    return f"{nbytes / _GIB:.2f} GiB" if nbytes >= _GIB // 10 else f"{nbytes / (1 << 20):.2f} MiB"
