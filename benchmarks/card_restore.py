"""On a GPU, how long does a long prompt take cold and when restored from disk, and where does the time go?

    python -m benchmarks.card_restore --lengths 16384 65536 262144 --out results

The model has V4-Flash's width, as many layers as fit on the GPU, bfloat16 and random weights. The weights' values
affect the times only through how evenly experts are picked. All parts other than the weights run as in workers: store
service, restore, chunks, writes. Before each restore the benchmark drops the store's files from the page cache and
makes a new worker with an empty pool. The new worker first computes a question of the same length, so that its CUDA
graph is recorded. Kernels are compiled before the first timing. Times of restores are medians of `--repeats` runs, and
times of cold prompts are medians of `--cold-repeats` runs. `--parts` selects what is measured. For 64K and 256K tokens,
`--parts restored --cold-repeats 1` takes about 100 s.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import statistics
import tempfile
import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from antefix.layout import KVFormat
from antefix.model import Model, ModelConfig, Sequence, WindowState, forward
from antefix.model.norms_rope import inverse_frequencies
from antefix.model_dir import ModelIdentity
from antefix.record import LookupResult, PutResult, Record, RecordKind
from antefix.store.api import Store
from antefix.store.local_store import LocalStore
from antefix.window import PlanKind
from antefix_console.deployment import Deployment, DeploymentConfig
from antefix_console.verify.models import Subject
from antefix_console.verify.paired_runs import WorkerPair, prompt_of
from antefix_console.verify.stores import EmptyStore
from antefix_prefill.run_prompt import ComputedPrompt, grow, run_prompt
from antefix_prefill.worker.compute_thread import ComputeThread
from antefix_prefill.worker.engine import Engine
from benchmarks import run_record
from benchmarks.store_peers import drop_cache
from benchmarks.ttft import direct_read_rate

_W, _C, _H = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
LAYERS = {"W": _W, "C": _C, "H": _H}
# The config's defaults are V4-Flash's own sizes; these fields have no default.
FLASH: dict[str, Any] = {
    "model_type": "deepseek_v4",
    "head_dim": 512,
    "index_head_dim": 128,
    "sliding_window": 128,
    "compress_rates": {_C: 4, _H: 128},
    "num_hash_layers": 0,
}
QUESTION_TOKENS = 100
PARTS = ("restored", "replay", "compute", "decode")
DECODE_STEPS = 16


@dataclass(slots=True)
class TimedStore:
    """Wraps another store and measures how long its calls take."""

    store: Store
    seconds: dict[str, float] = field(default_factory=dict)
    # When the first read began and the last one ended; blocks and checkpoint are read at the same time.
    first_read: float = math.inf
    last_read: float = 0.0

    async def _timed(self, name: str, call: Any) -> Any:
        started = time.perf_counter()
        result = await call
        ended = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + ended - started
        if name != "lookup":
            self.first_read, self.last_read = min(self.first_read, started), ended
        return result

    async def lookup(self, chain: Seq[bytes], *, fingerprint: bytes, tenant: bytes = b"") -> LookupResult:
        found: LookupResult = await self._timed("lookup", self.store.lookup(chain, fingerprint=fingerprint))
        return found

    async def get_blocks(
        self, hashes: Seq[bytes], into: Seq[memoryview], *, fingerprint: bytes, tenant: bytes = b""
    ) -> int:
        read: int = await self._timed(
            "read", self.store.get_blocks(hashes, into, fingerprint=fingerprint, tenant=tenant)
        )
        return read

    async def get(self, kind: RecordKind, hash: bytes, *, fingerprint: bytes, tenant: bytes = b"") -> bytes | None:
        data: bytes | None = await self._timed(
            "checkpoint", self.store.get(kind, hash, fingerprint=fingerprint, tenant=tenant)
        )
        return data

    async def put(self, records: Seq[Record]) -> PutResult:
        return await self.store.put(records)

    async def register(self, fingerprint: bytes, layout: Any, *, statement: bytes = b"") -> None:
        await self.store.register(fingerprint, layout, statement=statement)

    async def close(self) -> None:
        await self.store.close()


def random_model(layers: str, dtype: torch.dtype, device: str, small: bool) -> Subject:
    """A model whose weights are drawn on the device itself, because copying 13 GB per layer would take too long."""
    fields = dict(FLASH)
    if small:
        fields |= {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 2, "head_dim": 96, "q_lora_rank": 16}
        fields |= {"o_groups": 1, "o_lora_rank": 16, "index_n_heads": 16, "index_head_dim": 64, "index_topk": 8}
        fields |= {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2}
        fields |= {"partial_rotary_factor": 0.25}
    config = ModelConfig.from_dict(
        fields | {"num_hidden_layers": len(layers), "layer_types": [LAYERS[kind] for kind in layers]}
    )
    with torch.device("meta"):
        model = Model(config, kv_format=KVFormat.FP8).to(dtype).requires_grad_(False).eval()
    model = model.to_empty(device=device)
    model.rope_main = inverse_frequencies(config.rope_main, config.geometry.rope_dim).to(device)
    model.rope_compress = inverse_frequencies(config.rope_compress, config.geometry.rope_dim).to(device)
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "norm" in name or name.endswith("scale"):
            weight.fill_(1.0)
        else:
            weight.normal_(0.0, weight.shape[-1] ** -0.5)
    for name, table in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            table.zero_()
    identity = ModelIdentity(
        path=Path("random"),
        geometry=config.geometry,
        weights_revision=f"random-{layers}-{dtype}",
        tokenizer_revision="",
        vocab_size=config.vocab_size,
        max_tokens=config.max_position_embeddings,
    )
    return Subject(name=f"flash-width {layers}", identity=identity, model=model)


class Bench:
    """One model, one store service, and workers made one after another."""

    def __init__(self, subject: Subject, store: Store, directory: Path, args: argparse.Namespace) -> None:
        self.subject, self.store, self.directory, self.args = subject, store, directory, args
        self.compute = ComputeThread("bench")
        self.random = np.random.default_rng(0)

    def tokens(self, num_tokens: int) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
        return self.random.integers(0, self.subject.identity.vocab_size, num_tokens).astype(np.uint32)

    def worker(self, store: Store, num_tokens: int, kind: PlanKind, *, reproducible: bool = False) -> Engine:
        workers = WorkerPair(self.subject, self.compute, self.args.chunk, reproducible=reproducible)
        return workers.new(store, num_tokens + 2 * self.subject.block_size, kind=kind)

    async def prompt(self, engine: Engine, tokens: Any) -> tuple[ComputedPrompt, float]:
        started = time.perf_counter()
        computed = await run_prompt(engine, prompt_of(engine, tokens))
        return computed, time.perf_counter() - started

    async def compute_only(self, tokens: Any, *, reproducible: bool) -> float:
        """Seconds of a cold prompt without any store."""
        engine = self.worker(EmptyStore(), len(tokens), PlanKind.COLD, reproducible=reproducible)
        computed, seconds = await self.prompt(engine, tokens)
        assert np.isfinite(computed.logits).all(), "logits are not finite"
        return seconds

    async def decode_ms(self, tokens: Any, *, reproducible: bool) -> float:
        """Median milliseconds per token when tokens are decoded one after the other after a restored prompt."""
        engine = self.worker(self.store, len(tokens), PlanKind.CHECKPOINT, reproducible=reproducible)
        computed, _ = await self.prompt(engine, tokens)
        spans = []
        for _ in range(DECODE_STEPS):
            grow(engine, computed.sequence, computed.sequence.position + 1)
            started = time.perf_counter()
            batch = [(computed.sequence, self.tokens(1))]
            out = await engine.compute.run(forward, engine.model, engine.pool, batch, ops=engine.ops)
            out.float().cpu()
            spans.append(time.perf_counter() - started)
        return 1e3 * statistics.median(spans)

    async def cold(self, document: Any) -> dict[str, Any]:
        """Run a prompt cold as a worker does, which writes blocks and a checkpoint at the same time."""
        engine = self.worker(self.store, len(document) + QUESTION_TOKENS, PlanKind.COLD)
        await self.store.register(engine.fingerprint, engine.layout)
        computed, seconds = await self.prompt(engine, document)
        report = computed.report
        return {
            "seconds": seconds,
            "until_logits_s": report.restore_s + report.compute_s,
            "bytes_written": report.bytes_written,
        }

    async def restored(self, document: Any, kind: PlanKind, *, drops: bool = True) -> dict[str, Any]:
        """Restore the document from disk (or, if nothing is dropped, from the page cache), and compute another question
        after it.
        """
        if drops:
            drop_cache(self.directory / "segments")
        else:
            read_all(self.directory / "segments")
        store = TimedStore(self.store)
        question = np.concatenate((document, self.tokens(QUESTION_TOKENS)))
        engine = self.worker(store, len(question), kind)
        copied = _timed_copy(engine)
        await engine.compute.run(_record_rest, engine, len(document))
        computed, _ = await self.prompt(engine, question)
        report = computed.report
        assert report.plan == kind.value and report.hit_tokens == len(document), (report.plan, report.hit_tokens)
        read = store.seconds
        reading_s = store.last_read - store.first_read
        parts = {
            "lookup_s": read["lookup"],
            "reading_s": reading_s,
            "read_s": read["read"],
            "checkpoint_s": read.get("checkpoint", 0.0),
            "copy_to_card_s": copied[0],
            "compute_s": report.compute_s,
        }
        # The restore time includes the replay.
        rest = report.restore_s - parts["lookup_s"] - reading_s - copied[0]
        parts["replay_s" if report.replayed_tokens else "other_s"] = rest
        return {
            "until_logits_s": report.restore_s + report.compute_s,
            "bytes_read": report.bytes_read,
            "replayed_tokens": report.replayed_tokens,
            "computed_tokens": report.miss_tokens,
            **parts,
        }


def read_all(directory: Path) -> None:
    """Read the files once, so that they are in the page cache."""
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            with path.open("rb", buffering=0) as stream:
                while stream.read(1 << 24):
                    pass


def _record_rest(engine: Engine, num_tokens: int) -> None:
    """Compute a question after `num_tokens` tokens once, as a worker has done that served such a hit before."""
    size = engine.block_size
    table = engine.pool.allocate(-(-(num_tokens + QUESTION_TOKENS) // size))
    sequence = Sequence(table, WindowState.zeros(engine.layout, num_tokens, engine.device))
    forward(engine.model, engine.pool, [(sequence, np.zeros(QUESTION_TOKENS, np.uint32))], ops=engine.ops)
    engine.pool.release(table)


def _timed_copy(engine: Engine) -> list[float]:
    """Seconds for copying payloads to the GPU and checking them there."""
    seconds = [0.0]
    plain = engine.pool.fill

    def fill(block_ids: Any) -> list[int]:
        started = time.perf_counter()
        bad = plain(block_ids)
        seconds[0] += time.perf_counter() - started
        return bad

    engine.pool.fill = fill  # type: ignore[method-assign]
    return seconds


async def measure(subject: Subject, store: Store, directory: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    bench = Bench(subject, store, directory, args)
    rows = []
    for length in args.lengths:
        row: dict[str, Any] = {"tokens": length}
        if "compute" in args.parts:
            await _compute_alone(bench, length, row, args.repeats)
        runs: dict[str, list[dict[str, Any]]] = {"cold": [], "checkpoint": [], "replay": []}
        # The first round compiles the remaining kernels.
        for _ in range(args.cold_repeats + 1):
            document = bench.tokens(length)
            runs["cold"].append(await bench.cold(document))
        for _ in range(args.repeats + 1):
            runs["checkpoint"].append(await bench.restored(document, PlanKind.CHECKPOINT))
            if "replay" in args.parts:
                runs["replay"].append(await bench.restored(document, PlanKind.REPLAY))
        for name, of in runs.items():
            if of:
                row[name] = {key: statistics.median(run[key] for run in of[1:]) for key in of[0]}
        if "decode" in args.parts:
            question = np.concatenate((document, bench.tokens(QUESTION_TOKENS)))
            row["decode_fast_ms"] = await bench.decode_ms(question, reproducible=False)
            row["decode_reproducible_ms"] = await bench.decode_ms(question, reproducible=True)
        rows.append(row)
        print(json.dumps(row), flush=True)
    bench.compute.close()
    return rows


async def _compute_alone(bench: Bench, length: int, row: dict[str, Any], repeats: int) -> None:
    warm = bench.tokens(length + QUESTION_TOKENS)
    for name, reproducible in (("fast", False), ("reproducible", True)):
        await bench.compute_only(warm, reproducible=reproducible)
        spans = [await bench.compute_only(warm, reproducible=reproducible) for _ in range(repeats)]
        row[f"compute_only_{name}_s"] = statistics.median(spans)


def table(result: dict[str, Any]) -> str:
    head = (
        "| tokens | cold, ms | restored, ms | times | lookup | reads | MB read | copy to card "
        "| of the reads: checkpoint | computing "
    )
    lines = [
        f"# Cold prefill against restore from disk, on {result['device']}",
        "",
        f"Layers {result['layers']} of V4-Flash's width, {result['dtype']}, random weights; chunks of {result['chunk']}"
        f", medians of {result['repeats']}. torch {result['torch']}. A restore computes {QUESTION_TOKENS} tokens."
        f" Direct reads of 1 MiB, one at a time: {result['disk_read_gb_s']:.2f} GB/s.",
        "",
        head + "100 tokens | other |",
        "| ---: " * 11 + "|",
    ]
    for row in result["rows"]:
        cold, hit = row["cold"], row["checkpoint"]
        cells = [f"{row['tokens']:,}", f"{1e3 * cold['until_logits_s']:.1f}", f"{1e3 * hit['until_logits_s']:.1f}"]
        cells += [f"{cold['until_logits_s'] / hit['until_logits_s']:.1f}"]
        cells += [f"{1e3 * hit['lookup_s']:.2f}", f"{1e3 * hit['reading_s']:.2f}", f"{hit['bytes_read'] / 1e6:.1f}"]
        cells += [f"{1e3 * hit[key]:.2f}" for key in ("copy_to_card_s", "checkpoint_s", "compute_s", "other_s")]
        lines.append("| " + " | ".join(cells) + " |")
    names = "| tokens | replay instead of a checkpoint, ms | of it replaying | tokens replayed |"
    lines += ["", names + " cold, no store, ms | the same, reproducible | a decode step, ms | reproducible |"]
    lines.append("| ---: " * 8 + "|")
    for row in result["rows"]:
        if not {"replay", "compute_only_fast_s", "decode_fast_ms"} <= row.keys():
            continue
        replay = row["replay"]
        cells = [f"{row['tokens']:,}", f"{1e3 * replay['until_logits_s']:.1f}", f"{1e3 * replay['replay_s']:.1f}"]
        cells += [f"{replay['replayed_tokens']:,}", f"{1e3 * row['compute_only_fast_s']:.1f}"]
        cells += [f"{1e3 * row['compute_only_reproducible_s']:.1f}"]
        cells += [f"{row['decode_fast_ms']:.2f}", f"{row['decode_reproducible_ms']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


async def run(args: argparse.Namespace) -> dict[str, Any]:
    subject = random_model(args.layers, getattr(torch, args.dtype), args.device, args.small)
    name = torch.cuda.get_device_name() if args.device == "cuda" else args.device
    with tempfile.TemporaryDirectory(prefix="antefix-card-", dir=args.data_dir) as scratch:
        directory = Path(scratch)
        (directory / "logs").mkdir()
        deployment = Deployment(DeploymentConfig(model=directory, data_dir=directory))
        try:
            process = await deployment.start_role("kvstore", ["--dir", str(deployment.config.store_dir)])
            store = LocalStore(deployment.config.store_dir, process.address)
            rows = await measure(subject, store, deployment.config.store_dir, args)
            disk_read_gb_s = direct_read_rate(deployment.config.store_dir) / 1e9
            await store.close()
        finally:
            await deployment.stop()
    return {
        "device": name,
        "torch": torch.__version__,
        "layers": args.layers,
        "dtype": args.dtype,
        "chunk": args.chunk,
        "repeats": args.repeats,
        "weights_gb": sum(p.numel() * p.element_size() for p in subject.model.parameters()) / 1e9,
        "disk_read_gb_s": disk_read_gb_s,
        "block_bytes": subject.model.layout.block_bytes,
        "checkpoint_bytes": subject.model.layout.checkpoint_bytes,
        "peak_card_gb": torch.cuda.max_memory_allocated() / 1e9 if args.device == "cuda" else 0.0,
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[16384, 65536, 262144])
    parser.add_argument(
        "--layers",
        default="WCHC",
        help="the model's layers, one letter each (W window-only, C CSA, H HCA; default: WCHC)",
    )
    parser.add_argument("--chunk", type=int, default=8192)
    parser.add_argument(
        "--repeats",
        type=int,
        default=3,
        help="how many times each restore, and each computation without the cache, is repeated",
    )
    parser.add_argument("--cold-repeats", type=int, default=3)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--small", action="store_true", help="use very small tensor widths, to see whether the benchmark runs"
    )
    parser.add_argument("--data-dir", help="directory for the temporary store (default: a temporary directory)")
    parser.add_argument("--out", type=Path, help="directory for card_restore.json and card_restore.md")
    args = parser.parse_args()
    result = asyncio.run(run(args))
    text = table(result)
    print(text)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        run_record.write(args.out / "card_restore.json", result, "torch", "triton")
        (args.out / "card_restore.md").write_text(text)


if __name__ == "__main__":
    main()
