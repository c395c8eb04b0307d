"""A worker over several GPUs: is it right, and how near is V4-Flash, in its released formats, to the GPUs' floors?

    R="python -m benchmarks.ranks_on_cards --tensor-parallel-size 2 --out $OUT"; export PYTHONUNBUFFERED=1
    $R --steps verify;  $R --steps model;  $R --steps restore --lengths 16384 65536 262144;  $R --steps services

verify    runs `antefix verify` over 1, 2, 4 ... ranks: hits must equal cold runs. It also compares a prompt over
          several ranks with the same prompt over one.
model     measures memory per GPU, decode steps of 1, 32 and 128 sequences after `--context` tokens, and prefill chunks
          after 16K to 256K tokens. Each row has tokens per second, the floor, and the share of time that ranks spend
          in exchanges.
restore   measures the time to first token of prefixes of `--lengths` tokens, cold as a worker runs them, from the page
          cache, and from disk with the page cache dropped before. The times are divided by their floors: of computing,
          or of reading and copying to the GPU (the slower of both) plus the floor of the last 100 tokens.
services  runs `antefix up` with a model of `--service-layers` layers: prefill over all ranks, decode first over all
          ranks and then over one, with the same store. A hit must be answered as a cold start with the same ranks
          answers.

With `--tensor-parallel-size 1`, `model` and `restore` measure a worker on one GPU, which has no ranks.
Each step writes to ranks_on_cards.STEP.json after every row, so that an interrupted run keeps its finished rows.
`--toy` runs everything at small widths, with `--device cpu` over gloo, to test the code. Its figures mean nothing.
A floor is the time in which a GPU can read its share of packed bytes at copy bandwidth, or compute its share of
operations at the BF16 rate, whichever is longer.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from antefix.model import Model, Sequence, WindowState, forward
from antefix.model.backend import make_backend
from antefix.model.packed import PackedLinear
from antefix.model_dir import ModelIdentity
from antefix.sampling import Sampling
from antefix.store.local_store import LocalStore
from antefix.window import PlanKind
from antefix_console.deployment import Deployment, DeploymentConfig
from antefix_console.verify.models import Subject
from antefix_console.verify.stores import EmptyStore
from antefix_prefill.worker.rank_processes import RankProcesses
from benchmarks import run_record
from benchmarks.attention_floor import attention_work
from benchmarks.card_restore import QUESTION_TOKENS, Bench
from benchmarks.drawn_flash import draw_share, draw_with_exchanges, timed_exchanges
from benchmarks.loading_on_card import write
from benchmarks.ttft import direct_read_rate

TINY = Path(__file__).parents[1] / "models" / "antefix-tiny"
BATCHES = (1, 32, 128)
CONTEXTS = (16384, 65536, 262144)


class Found:
    """The results of one step so far, kept in a separate file."""

    def __init__(self, args: argparse.Namespace, step: str) -> None:
        self._file = args.out / f"ranks_on_cards.{step}.json"
        self.values: dict[str, Any] = {"step": step, "ranks": args.tensor_parallel_size, "toy": args.toy}
        self.values["device"] = torch.cuda.get_device_name() if args.device == "cuda" else args.device
        args.out.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, row: Any, *, to_list: bool = False) -> None:
        if to_list:
            self.values.setdefault(name, []).append(row)
        else:
            self.values[name] = row
        print(f"{time.strftime('%H:%M:%S')} {name}", json.dumps(row), flush=True)
        run_record.write(self._file, self.values, "torch")


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def ceilings(args: argparse.Namespace) -> dict[str, float]:
    """The device's measured rates. On a CPU nothing is measured, because the floors of a toy run mean nothing."""
    if args.device != "cuda":
        return {"copy_bytes_per_s": 1e10, "bf16_flops_per_s": 1e11}
    from benchmarks.kernels import ceilings as of_card

    found = of_card()
    torch.cuda.empty_cache()
    return found


class Share:
    """The bytes that one GPU must read and the operations that it must compute for its share of the weights."""

    def __init__(self, model: Model, size: int, top: dict[str, float]) -> None:
        self._config, self._size = model.config, size
        config = model.config
        sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in model.state_dict().items()}
        self._top = top
        self._num_experts, self._num_picked = config.num_experts, config.num_experts_per_token
        self.num_bytes = sum(sizes.values())
        stacks = sum(nbytes for name, nbytes in sizes.items() if ".mlp.experts." in name)
        self._own_experts = config.num_experts // size if config.num_experts % size == 0 else config.num_experts
        self._expert = stacks / self._own_experts
        self._dense = self.num_bytes - stacks - sizes["model.embed_tokens.weight"]
        dense = 0
        for module in model.modules():
            if isinstance(module, PackedLinear):
                dense += module.codes.numel()
            elif isinstance(module, nn.Linear):
                dense += module.weight.numel()
        # A GPU computes only its share of a token's picks. A byte of FP4 codes is two numbers, and 16 of 17
        # bytes are codes.
        self._active = dense + self._num_picked * self._own_experts / self._num_experts * self._expert * 32 / 17

    def floor_s(self, num_tokens: int, *, context: int, num_sequences: int = 1) -> float:
        """Floor of a forward pass over `num_tokens` new tokens in each sequence, with attention and index scores.

        A GPU attends with its share of the heads, and scores all index keys.
        """
        count = num_tokens * num_sequences
        picked = self._own_experts * (1 - (1 - self._num_picked / self._num_experts) ** count)
        config = replace(self._config, num_heads=self._config.num_heads // self._size)
        attention = attention_work(config, context=context, num_tokens=num_tokens, num_sequences=num_sequences)
        nbytes = self._dense + picked * self._expert + attention.nbytes
        operations = 2 * self._active * count + attention.operations
        return max(nbytes / self._top["copy_bytes_per_s"], operations / self._top["bf16_flops_per_s"])

    def cold_floor_s(self, num_tokens: int, chunk: int) -> float:
        """Floor of a whole prompt that is computed in chunks."""
        return sum(self.floor_s(min(chunk, num_tokens - at), context=at) for at in range(0, num_tokens, chunk))


def verify(args: argparse.Namespace, found: Found) -> None:
    for size in args.sizes or [1 << power for power in range(args.tensor_parallel_size.bit_length())]:
        command = [sys.executable, "-m", "antefix_console", "verify", "--json", "--seed", "7", "--drawn", "1"]
        command += ["--device", args.device, "--tensor-parallel-size", str(size), "--plans", *args.plans]
        started = time.perf_counter()
        try:
            ran = subprocess.run(command, stdout=subprocess.PIPE, timeout=args.limit_s, check=False)
        except subprocess.TimeoutExpired:
            found.add("verify", {"ranks": size, "status": f"not done in {args.limit_s:.0f} s"}, to_list=True)
        else:
            lines = ran.stdout.splitlines()
            report = json.loads(lines[-1]) if lines else {}
            row = {"ranks": size, "status": ran.returncode, "seconds": time.perf_counter() - started, "report": report}
            found.add("verify", row, to_list=True)


def start(args: argparse.Namespace, found: Found) -> tuple[RankProcesses | None, Model]:
    """The model, and the processes of its other ranks, if there are any."""
    started = time.perf_counter()
    settings = {"num_layers": args.layers, "toy": args.toy, "dtype": torch.bfloat16 if not args.toy else torch.float32}
    if args.tensor_parallel_size == 1:
        ranks, model = None, draw_share(ranks=None, device=args.device, **settings)
    else:
        ranks = RankProcesses(args.tensor_parallel_size, device=args.device, threads=args.threads)
        model = ranks.load(draw_with_exchanges, hidden=128 if args.toy else 4096, **settings)
        found.add("exchanges", list(timed_exchanges))
    synchronize(args.device)
    found.add("draw_s", time.perf_counter() - started)
    return ranks, model


def memory(args: argparse.Namespace) -> float:
    """GiB that this rank's GPU holds now."""
    return torch.cuda.memory_allocated() / 2**30 if args.device == "cuda" else 0.0


def timed(model: Model, call: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the call, and their share in exchanges between ranks. The share is 0 if the time of exchanges in this
    call was not sampled.
    """
    meter = model.ranks.time if model.ranks is not None else None
    before = (meter.exchange_s, meter.call_s) if meter else (0.0, 0.0)
    synchronize(model.device.type)
    started = time.perf_counter()
    call()
    synchronize(model.device.type)
    seconds = time.perf_counter() - started
    if meter is None:
        return seconds, 0.0
    meter.settle()
    spent = meter.call_s - before[1]
    return seconds, (meter.exchange_s - before[0]) / spent if spent else 0.0


def measure_model(args: argparse.Namespace, found: Found) -> None:
    top = ceilings(args)
    found.add("ceilings", top)
    ranks, model = start(args, found)
    if model.ranks is not None:
        model.ranks.time.sampled = 1
    share = Share(model, args.tensor_parallel_size, top)
    found.add("weights", {"share_gib": share.num_bytes / 2**30, "card_gib": memory(args)})
    size, chunk = model.layout.geometry.block_size, args.chunk
    longest = max(args.contexts)
    num_blocks = longest // size + chunk // size + 2 * max(BATCHES) + 8
    pool, ops = make_backend(
        "auto",
        model.layout,
        num_blocks,
        model.device,
        lead=model.lead,
        decode_steps=args.decode_steps,
        short_prefills=args.short_prefills,
    )
    found.add("pool", {"blocks": num_blocks, "card_gib": memory(args)})
    prefix = pool.allocate(longest // size)
    random = np.random.default_rng(0)

    def sequence(position: int, blocks: list[int]) -> Sequence:
        return Sequence(prefix[: position // size] + blocks, WindowState.zeros(model.layout, position, model.device))

    def draw(count: int) -> np.ndarray[Any, np.dtype[np.uint32]]:
        return random.integers(0, model.config.vocab_size, count).astype(np.uint32)

    for batch in args.batches:
        held = [pool.allocate(2) for _ in range(batch)]
        running = [sequence(args.context, blocks) for blocks in held]

        def run(running: list[Sequence] = running) -> object:
            return forward(model, pool, [(each, draw(1)) for each in running], ops=ops)

        runs = [timed(model, run) for _ in range(args.repeats + 2)][2:]
        step = statistics.median(seconds for seconds, _ in runs)
        floor = share.floor_s(1, context=args.context, num_sequences=batch)
        row = {"sequences": batch, "context": args.context, "step_s": step, "tokens_per_s": batch / step}
        row["steps_s"] = [round(seconds, 4) for seconds, _ in runs]
        row |= {"floor_s": floor, "over": step / floor, "exchange_share": statistics.median(part for _, part in runs)}
        found.add("decode", row, to_list=True)
        del running, run
        for blocks in held:
            pool.release(blocks)
    blocks = pool.allocate(chunk // size)
    for context in args.contexts:
        runs = []
        for _ in range(args.repeats + 1):
            one = sequence(context - chunk, blocks) if context == longest else sequence(context, blocks)
            runs.append(timed(model, lambda one=one: forward(model, pool, [(one, draw(chunk))], ops=ops)))
        step = statistics.median(seconds for seconds, _ in runs[1:])
        floor = share.floor_s(chunk, context=context - chunk if context == longest else context)
        row = {"context": context, "chunk": chunk, "chunk_s": step, "tokens_per_s": chunk / step, "floor_s": floor}
        row |= {"over": step / floor, "exchange_share": statistics.median(part for _, part in runs[1:])}
        found.add("prefill", row, to_list=True)
    found.add("peak_card_gib", torch.cuda.max_memory_allocated() / 2**30 if args.device == "cuda" else 0.0)
    if ranks is not None:
        ranks.close()


async def measure_restore(args: argparse.Namespace, found: Found) -> None:
    top = ceilings(args)
    ranks, model = start(args, found)
    share = Share(model, args.tensor_parallel_size, top)
    identity = ModelIdentity(
        path=Path("random"), geometry=model.config.geometry, weights_revision=f"drawn-{args.layers}",
        tokenizer_revision="", vocab_size=model.config.vocab_size, max_tokens=model.config.max_position_embeddings,
    )  # fmt: skip
    subject = Subject(name="flash", identity=identity, model=model)
    with tempfile.TemporaryDirectory(prefix="antefix-ranks-", dir=args.data_dir) as scratch:
        directory = Path(scratch)
        (directory / "logs").mkdir()
        deployment = Deployment(DeploymentConfig(model=directory, data_dir=directory))
        try:
            process = await deployment.start_role("kvstore", ["--dir", str(deployment.config.store_dir)])
            store = LocalStore(deployment.config.store_dir, process.address)
            disk = direct_read_rate(deployment.config.store_dir)
            found.add("disk_gb_per_s", disk / 1e9)
            found.add("copy_to_card_gb_per_s", copy_to_card_rate(args.device) / 1e9)
            bench = Bench(subject, store, deployment.config.store_dir, args)
            started = time.perf_counter()
            await bench.compute.run(compile_for, bench, args)
            found.add("warm_s", time.perf_counter() - started)
            for length in args.lengths:
                found.add("restore", await restore_row(bench, length, share, found), to_list=True)
            bench.compute.close()
            await store.close()
        finally:
            await deployment.stop()
    if model.ranks is not None:
        found.add("exchange_share", model.ranks.time.share)
    if ranks is not None:
        ranks.close()


def compile_for(bench: Bench, args: argparse.Namespace) -> None:
    """Run a chunk behind each number of tokens that doubles, so that the timed prompts compile no kernel."""
    longest = max(args.lengths)
    engine = bench.worker(EmptyStore(), longest, PlanKind.COLD)
    table = engine.pool.allocate(longest // engine.block_size)
    contexts = [0, args.chunk]
    while contexts[-1] < longest - args.chunk:
        contexts.append(min(2 * contexts[-1], longest - args.chunk))
    for context in contexts:
        window = WindowState.zeros(engine.layout, context, engine.device)
        own = Sequence(table[: (context + args.chunk) // engine.block_size], window)
        forward(engine.model, engine.pool, [(own, bench.tokens(args.chunk))], ops=engine.ops)
        synchronize(args.device)


async def restore_row(bench: Bench, length: int, share: Share, found: Found) -> dict[str, Any]:
    """Times of one prefix: cold (one run), from disk and from the page cache (medians; the first run is left out)."""
    rates = {"disk": found.values["disk_gb_per_s"], "copy": found.values["copy_to_card_gb_per_s"]}
    document = bench.tokens(length)
    cold = await bench.cold(document)
    cold_s, cold_floor_s = cold["until_logits_s"], share.cold_floor_s(length, bench.args.chunk)
    row: dict[str, Any] = {"tokens": length, "cold": cold, "cold_floor_s": cold_floor_s}
    row |= {"prefill_tokens_per_s": length / cold_s, "cold_over": cold_s / cold_floor_s}
    found.add(f"cold {length}", row)
    for name, drops in (("disk", True), ("page_cache", False)):
        runs = []
        for _ in range(bench.args.repeats + 1):
            runs.append(await bench.restored(document, PlanKind.CHECKPOINT, drops=drops))
            # The worker that is done still holds its pool on the GPU if it is part of a cycle.
            gc.collect()
        hit = {key: statistics.median(run[key] for run in runs[1:]) for key in runs[0]}
        slower = min(rates.values()) if drops else rates["copy"]
        floor_s = hit["bytes_read"] / slower / 1e9 + share.floor_s(QUESTION_TOKENS, context=length)
        row[f"from_{name}"] = hit
        row |= {f"from_{name}_floor_s": floor_s, f"from_{name}_over": hit["until_logits_s"] / floor_s}
        row[f"from_{name}_all_s"] = [run["until_logits_s"] for run in runs]
        row[f"times_{name}"] = cold_s / hit["until_logits_s"]
        found.add(f"{name} {length}", row)
    return row


def copy_to_card_rate(device: str) -> float:
    """Bytes per second from pinned host memory to the GPU."""
    if device != "cuda":
        return 1e10
    host = torch.zeros(1 << 30, dtype=torch.uint8, pin_memory=True)
    card = torch.empty_like(host, device=device, pin_memory=False)
    spans = []
    for _ in range(5):
        torch.cuda.synchronize()
        started = time.perf_counter()
        card.copy_(host, non_blocking=True)
        torch.cuda.synchronize()
        spans.append(time.perf_counter() - started)
    return len(host) / min(spans)


async def measure_services(args: argparse.Namespace, found: Found) -> None:
    with tempfile.TemporaryDirectory(prefix="antefix-ranks-", dir=args.data_dir) as scratch:
        directory = Path(scratch) / "model"
        directory.mkdir()
        dtype = torch.float32 if args.toy else torch.bfloat16
        settings: dict[str, Any] = {"num_layers": args.service_layers, "toy": args.toy, "dtype": dtype}
        drawn = draw_share(ranks=None, device=args.device, **settings)
        nbytes = write(drawn, directory, toy=args.toy)
        del drawn
        if args.device == "cuda":
            torch.cuda.empty_cache()
        for name in ("antefix_tokenizer.json", "tokenizer.json"):
            if (TINY / name).is_file():
                shutil.copy(TINY / name, directory / name)
        found.add("directory_gb", nbytes / 1e9)
        size = args.tensor_parallel_size
        shared: dict[str, Any] = {"model": directory, "device": args.device, "tensor_parallel_size": size}
        shared |= {"dtype": "float32" if args.toy else "bfloat16", "reproducible": args.device == "cuda"}
        prompt = np.random.default_rng(5).integers(3, 60, args.service_tokens).astype(np.uint32)
        longer = np.concatenate((prompt, prompt[:200]))
        # 1. Decode over all ranks too. The second start needs the arithmetic of this one, to read its store.
        where = DeploymentConfig(data_dir=Path(scratch) / "one", **shared)
        started = time.perf_counter()
        async with Deployment(where) as deployment:
            found.add("start_s", time.perf_counter() - started)
            arithmetic = (await deployment.router.status()).arithmetic
            found.add("arithmetic", arithmetic)
            for tokens, what in ((prompt, "cold"), (longer, "hit")):
                row = await _ask(deployment, tokens, f"prefill {size}, decode {size}, {what}")
                found.add("services", row, to_list=True)
        # 2. Decode over one rank with the same store, so the request is a hit from disk. On GPUs this rank stores
        # nothing.
        decode = ("--tensor-parallel-size", "1", "--arithmetic", arithmetic)
        where = DeploymentConfig(data_dir=Path(scratch) / "one", extra_flags={"decode": decode}, **shared)
        async with Deployment(where) as deployment:
            row = await _ask(deployment, longer, f"prefill {size}, decode 1, hit from disk")
            found.add("services", row, to_list=True)
        # 3. Decode over one rank with an empty store, for the answer of a cold run.
        where = DeploymentConfig(data_dir=Path(scratch) / "two", extra_flags={"decode": decode}, **shared)
        async with Deployment(where) as deployment:
            row = await _ask(deployment, longer, f"prefill {size}, decode 1, cold")
            found.add("services", row, to_list=True)
        rows = found.values["services"]
        found.add("hit_equals_cold", rows[2]["output"] == rows[3]["output"] and rows[2]["hit_tokens"] > 0)


async def _ask(deployment: Deployment, prompt: Any, what: str) -> dict[str, Any]:
    output: list[int] = []
    first_s, started = 0.0, time.perf_counter()
    last: Any = None
    async for message in deployment.router.generate(prompt, Sampling(max_tokens=16, ignore_eos=True)):
        first_s = first_s or time.perf_counter() - started
        output += [int(token) for token in message.tokens]
        last = message
    usage = last.usage
    return {"what": what, "prompt_tokens": len(prompt), "first_s": first_s, "output": output,
            "hit_tokens": usage.cache_hit_tokens, "plan": usage.restore_plan}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", nargs="+", default=["verify", "model", "restore", "services"])
    parser.add_argument("--tensor-parallel-size", type=int, default=2, metavar="N")
    parser.add_argument("--layers", type=int, default=43)
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument(
        "--context", type=int, default=8192, help="number of earlier tokens in the cache when a decode step runs"
    )
    parser.add_argument(
        "--decode-steps",
        choices=("alone", "together", "graphs", "graphs-over-ranks"),
        help="as the workers' setting (default: alone; with one rank graphs)",
    )
    parser.add_argument(
        "--short-prefills",
        choices=("alone", "together"),
        help="as the workers' setting (default: alone; with one rank together)",
    )
    parser.add_argument(
        "--contexts", type=int, nargs="+", default=list(CONTEXTS), help="tokens behind which chunks run"
    )
    parser.add_argument("--chunk", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--lengths", type=int, nargs="+", default=[16384, 65536, 262144])
    parser.add_argument("--plans", nargs="*", default=["flash", "pro"], help="plans of `antefix verify`")
    parser.add_argument(
        "--sizes", type=int, nargs="+", help="numbers of ranks for `antefix verify` (default: 1, 2, 4 ... N)"
    )
    parser.add_argument(
        "--limit-s", type=float, default=280.0, help="time limit in seconds for each run of `antefix verify`"
    )
    parser.add_argument("--service-layers", type=int, default=4)
    parser.add_argument("--service-tokens", type=int, default=16384)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--toy", action="store_true", help="use small tensor widths, to see whether the benchmark runs")
    parser.add_argument("--data-dir", help="directory for temporary files (default: a temporary directory)")
    parser.add_argument("--out", type=Path, default=Path(os.curdir))
    args = parser.parse_args()
    is_one = args.tensor_parallel_size == 1
    args.decode_steps = args.decode_steps or ("graphs" if is_one else "alone")
    args.short_prefills = args.short_prefills or ("together" if is_one else "alone")
    torch.set_grad_enabled(False)
    for step in args.steps:
        found = Found(args, step)
        if step == "verify":
            verify(args, found)
        elif step == "model":
            measure_model(args, found)
        elif step == "restore":
            asyncio.run(measure_restore(args, found))
        elif step == "services":
            asyncio.run(measure_services(args, found))
        else:
            parser.error(f"no step is called {step}")


if __name__ == "__main__":
    main()
