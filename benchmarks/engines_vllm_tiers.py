"""Compares vLLM's file tier and Antefix's: moving a V4-Flash prompt between host memory and disk, in vLLM's Python:

    .engines/vllm/bin/python benchmarks/engines_vllm_tiers.py DIRECTORY [--tokens 16384] [--runs 5]

Rows have the layout of vLLM's planner for Flash (tests/foreign_engines/vllm_flash_plan.json) and hold random bytes. No
model runs. The benchmark gives the same jobs to the two tier classes that vLLM loads. The benchmark prints one JSON
object with the bytes on disk, and the seconds to store, to restore from the page cache and to restore from the disk.
The seconds are medians of --runs runs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import mmap
import os
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

PLAN = Path(__file__).parents[1] / "tests" / "foreign_engines" / "vllm_flash_plan.json"
# The plan's group of caches that every token may need.
BLOCKS = 2


def spec_of(plan: dict[str, Any], *, is_aligned: bool) -> Any:
    """A stand-in for an `OffloadingSpec` with the attributes that a tier reads."""
    groups = tuple(
        SimpleNamespace(group_id=row["id"], tokens_per_block=row["num_tokens"], layer_names=tuple(row["layers"]))
        for row in plan["groups"]
    )
    parallel = dict.fromkeys(("world_size", "tp_size", "pp_size", "pcp_size", "dcp_size"), 1)
    config = SimpleNamespace(
        groups=groups,
        worker_kv_bytes_per_block=plan["row_bytes"],
        model=SimpleNamespace(name="flash", dtype="fp8_ds_mla"),
        cache=SimpleNamespace(tokens_per_hash=4, blocks_per_chunk=1),
        parallel=SimpleNamespace(**parallel, rank=0, is_parallelism_agnostic=False),
        replicated_layout=False,
        canonical_layout=False,
        kv_cache_layout="BLHNC",
    )
    return SimpleNamespace(
        config=config,
        replicated_layout=False,
        blocks_per_chunk=1,
        antefix_aligned_hits=is_aligned,
        kv_events_config=SimpleNamespace(enable_kv_cache_events=False),
    )


def rows_of(plan: dict[str, Any], num_tokens: int) -> list[tuple[int, int]]:
    """The rows, as pairs (group, end), that a hit at the prompt's end needs."""
    rows = []
    for row in plan["groups"]:
        step, window = row["num_tokens"], row["num_window_rows"]
        first = num_tokens - step * (window - 1) if window else step
        rows += [(row["id"], end) for end in range(first, num_tokens + 1, step)]
    return rows


def key_of(group: int, end: int) -> bytes:
    return hashlib.sha256(end.to_bytes(8, "big")).digest() + group.to_bytes(4, "big")


class Driver:
    """Gives jobs to a tier and waits for them."""

    def __init__(self, make: Any, memory: np.ndarray, rows: list[tuple[int, int]]) -> None:
        from vllm.v1.kv_offload.base import ReqContext

        self.tier = make(memoryview(memory.view(np.int8)))
        self.keys = [key_of(*row) for row in rows]
        self.chunks = np.arange(len(rows))
        self.ends = [end for _, end in rows]
        self.context = ReqContext
        self.num_jobs = 0

    def job(self, *, is_load: bool) -> float:
        from vllm.v1.kv_offload.base import LookupResult
        from vllm.v1.kv_offload.tiering.base import TransferJob

        self.num_jobs += 1
        context = self.context(req_id=str(self.num_jobs))
        for key, end in zip(self.keys, self.ends, strict=True):
            context.set_offload_key_position(key, end)
        self.tier.on_new_request(context)
        started = time.monotonic()
        if is_load:
            waiting = list(self.keys)
            while waiting:
                found = [self.tier.lookup(key, context) for key in waiting]
                self.tier.on_schedule_end(None)
                assert LookupResult.MISS not in found, "not every row is there"
                waiting = [key for key, one in zip(waiting, found, strict=True) if one is LookupResult.RETRY]
                time.sleep(0.0005)
        submit = self.tier.submit_load if is_load else self.tier.submit_store
        submit(TransferJob(self.num_jobs, self.keys, self.chunks, is_load, context))
        done: list[Any] = []
        while not done:
            done = list(self.tier.get_finished_jobs())
            time.sleep(0.0005)
        seconds = time.monotonic() - started
        assert done[0].success, done
        self.tier.on_request_finished(context)
        return seconds


def forget_pages(directory: Path) -> None:
    """Ask the kernel to drop the files' pages."""
    os.sync()
    for path in directory.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def measured(
    make: Any, memory: np.ndarray, rows: list[tuple[int, int]], directory: Path, runs: int
) -> dict[str, float]:
    driver = Driver(make, memory, rows)
    before = memory.copy()
    store_s = driver.job(is_load=False)
    os.sync()
    nbytes = sum(path.stat().st_size for path in directory.rglob("*.seg")) or sum(
        path.stat().st_size for path in directory.rglob("*.bin")
    )
    cached, from_disk = [], []
    for _ in range(runs):
        memory[...] = 0
        cached.append(driver.job(is_load=True))
        forget_pages(directory)
        from_disk.append(driver.job(is_load=True))
    # This compares one page of entries in each block as a sample. The tests compare every byte.
    blocks = [number for number, (group, _) in enumerate(rows) if group == BLOCKS]
    assert np.array_equal(before[blocks, :4096], memory[blocks, :4096])
    driver.tier.shutdown()
    return {
        "disk_bytes": nbytes,
        "store_s": store_s,
        "restore_cached_s": statistics.median(cached),
        "restore_disk_s": statistics.median(from_disk),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    from vllm.v1.kv_offload.tiering.fs.manager import FileSystemTierManager

    from antefix_engines.vllm.tier import AntefixTier

    plan = json.loads(PLAN.read_text())
    rows = rows_of(plan, args.tokens)
    stride = -(-plan["row_bytes"] // 4096) * 4096
    # Host memory is mapped, as in vLLM, because the file tier uses direct I/O, which needs page-aligned buffers.
    memory = np.frombuffer(mmap.mmap(-1, len(rows) * stride), np.uint8).reshape(len(rows), stride)
    memory[...] = np.random.default_rng(0).integers(0, 256, memory.shape, np.uint8)
    ours, theirs = args.directory / "antefix", args.directory / "files"
    common = {"primary_kv_view": None, "tier_type": "bench"}
    settings = {
        "directory": str(ours),
        "budget_bytes": "8G",
        "queue_bytes": "8G",
        "weights_revision": "random",
        "lookup_wait_s": 60.0,
    }

    def antefix(view: memoryview) -> Any:
        return AntefixTier(
            **common | {"offloading_spec": spec_of(plan, is_aligned=True), "primary_kv_view": view}, **settings
        )

    def files(view: memoryview) -> Any:
        own = {"offloading_spec": spec_of(plan, is_aligned=False), "primary_kv_view": view}
        return FileSystemTierManager(**common | own, root_dir=str(theirs))

    kept = memory.copy()
    report: dict[str, Any] = {"tokens": args.tokens, "rows": len(rows)}
    report["files"] = measured(files, memory, rows, theirs, args.runs)
    memory[...] = kept
    report["antefix"] = measured(antefix, memory, rows, ours, args.runs)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
