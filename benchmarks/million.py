"""Can the real services handle a prompt of a million tokens, and what does it cost? Only attention may grow faster than
linearly, and no limit of a message, queue or index may be reached.

    python benchmarks/million.py --tokens 1000000 --json benchmarks/results/million.json

The benchmark starts all roles with a small random model that has V4's kinds of layers. The benchmark sends shorter
prompts and then the long prompt, all cold. After that it sends prompts that hit prefixes of the long prompt. Before
each hit it restarts all processes, so that nothing is in memory. The benchmark prints the time to the first token of
each request with its parts, the peak memory of each role, and the bytes on disk. The client measures the times.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from antefix.layout import KVFormat
from antefix.model import Model, ModelConfig, init_weights, save_model
from antefix.sampling import Sampling
from antefix.store.remote_store import RemoteStore
from antefix.tokenizer import load_tokenizer
from antefix_console.deployment import Deployment, DeploymentConfig
from benchmarks.run_record import write

ROOT = Path(__file__).parents[1]
QUESTION_TOKENS = 40
# The first request of a process includes torch's one-time set-up.
WARM_UP_TOKENS = 300
OUTPUT_TOKENS = 4
# One layer of each kind is small enough for two cores. m is 16, not 4, so there are a quarter as many indexer keys.
CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "vocab_size": 264,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
    "mlp_layer_types": ["hash_moe", "moe", "moe"],
    "compress_rates": {"compressed_sparse_attention": 16, "heavily_compressed_attention": 128},
    "sliding_window": 128,
    "num_attention_heads": 2,
    "head_dim": 32,
    "partial_rotary_factor": 0.25,
    "q_lora_rank": 16,
    "o_groups": 2,
    "o_lora_rank": 8,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 16,
    "hc_mult": 2,
    "hc_sinkhorn_iters": 3,
    "moe_intermediate_size": 16,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "max_position_embeddings": 1 << 20,
}


def make_model(directory: Path) -> Path:
    """A random model with the tokenizer of the model that is shipped."""
    model = init_weights(Model(ModelConfig.from_dict(CONFIG), kv_format=KVFormat.FP8), seed=1)
    save_model(model, directory, config=CONFIG)
    shipped = ROOT / "models" / "antefix-tiny"
    shutil.copy(shipped / "antefix_tokenizer.json", directory)
    load_tokenizer(directory)
    return directory


async def ask(deployment: Deployment, prompt: npt.NDArray[np.uint32], timeout_s: float) -> dict[str, Any]:
    """Send one request. Returns the client's time to the first token, and the prefill worker's report."""
    started = time.perf_counter()
    ttft_s = 0.0
    sampling = Sampling(max_tokens=OUTPUT_TOKENS, ignore_eos=True)
    async for message in deployment.router.generate(prompt, sampling, timeout_s=timeout_s):
        ttft_s = ttft_s or time.perf_counter() - started
        last = message
    assert last.restore is not None and last.usage is not None
    restore = last.restore
    return {
        "prompt_tokens": len(prompt),
        "ttft_s": round(ttft_s, 3),
        "total_s": round(time.perf_counter() - started, 3),
        "restore_s": round(restore.restore_s, 3),
        "compute_s": round(restore.compute_s, 3),
        "other_s": round(ttft_s - restore.restore_s - restore.compute_s, 3),
        "predicted_s": round(restore.predicted_s, 3),
        "plan": restore.plan,
        "hit_tokens": restore.hit_tokens,
        "miss_tokens": restore.miss_tokens,
        "replayed_tokens": restore.replayed_tokens,
        "bytes_read": restore.bytes_read,
        "bytes_written": restore.bytes_written,
        "peak_mb": peak_memory_mb(deployment),
    }


def peak_memory_mb(deployment: Deployment) -> dict[str, float]:
    """Peak resident memory of each role so far (VmHWM)."""
    peaks = {}
    for process in deployment.processes:
        status = Path(f"/proc/{process.process.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
        peaks[process.role] = round(int(line.split()[1]) / 1024, 1)
    return peaks


async def measure(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    chunk = ("--prefill-chunk", str(args.prefill_chunk))
    config = DeploymentConfig(
        model=make_model(scratch / "model"),
        data_dir=scratch / "data",
        strategy=args.strategy,
        extra_flags={"prefill": chunk, "decode": chunk, "router": ("--ttft-s-max", str(args.timeout_s))},
    )
    rng = np.random.default_rng(1)

    def tokens(count: int) -> npt.NDArray[np.uint32]:
        return rng.integers(0, 256, count).astype(np.uint32)

    document = tokens(args.tokens)
    cold, hits = [], []
    async with Deployment(config) as deployment:
        for length in [*args.shorter, args.tokens]:
            text = document if length == args.tokens else tokens(length)
            cold.append(await ask(deployment, np.concatenate((text, tokens(QUESTION_TOKENS))), args.timeout_s))
            print(json.dumps(cold[-1]), flush=True)
        stats = await RemoteStore(deployment.one("kvstore").address).stats()
    for length in [min(hit, args.tokens) for hit in args.hits]:
        async with Deployment(config) as deployment:
            await ask(deployment, tokens(WARM_UP_TOKENS), args.timeout_s)
            prompt = np.concatenate((document[:length], tokens(QUESTION_TOKENS)))
            hits.append(await ask(deployment, prompt, args.timeout_s))
            print(json.dumps(hits[-1]), flush=True)
    kinds = {kind.name.lower(): vars_of(totals) for kind, totals in stats.kinds.items()}
    return {"strategy": args.strategy, "cold": cold, "hits": hits, "store_bytes": stats.used_bytes, "kinds": kinds}


def vars_of(totals: Any) -> dict[str, int]:
    return {name: getattr(totals, name) for name in ("num_records", "stored_bytes", "payload_bytes")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument(
        "--shorter",
        type=int,
        nargs="*",
        default=[62_500, 250_000],
        help="lengths of the shorter prompts that are prefilled cold before the long prompt",
    )
    parser.add_argument("--hits", type=int, nargs="*", default=[1_000_000, 999_872, 500_000])
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--prefill-chunk", type=int, default=1024)
    parser.add_argument("--timeout-s", type=float, default=7200.0)
    parser.add_argument("--json", type=Path, help="also write the record here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="antefix-million-") as scratch:
        result = asyncio.run(measure(args, Path(scratch)))
    print(json.dumps(result, indent=2))
    if args.json:
        write(args.json, result, "torch", "grpcio", "lmdb")


if __name__ == "__main__":
    main()
