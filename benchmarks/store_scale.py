"""What does a store cost apart from its payloads? The benchmark measures look-ups, the index, and opening a store."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from antefix.block import chain_of
from antefix.lane_hashes import compiled_code, used_instead
from antefix.record import Record, RecordKind
from antefix_kvstore.kvstore_config import KvStoreConfig
from antefix_kvstore.storage_engine import StorageEngine
from benchmarks.spread import with_spread

FINGERPRINT = b"F" * 32
BLOCK_TOKENS = 128
PROMPT_BLOCKS = 7813
OPENINGS = 3

OPEN = """
import json, sys, time
from benchmarks.store_scale import memory_kib
from antefix_kvstore.kvstore_config import KvStoreConfig
from antefix_kvstore.storage_engine import StorageEngine
before = memory_kib("VmRSS")
start, start_cpu = time.perf_counter(), time.process_time()
engine = StorageEngine(KvStoreConfig(dir=sys.argv[1], budget_bytes=8 << 30, compression="off"))
opened, cpu = time.perf_counter() - start, time.process_time() - start_cpu
print(json.dumps([opened, cpu, memory_kib("VmHWM") - before, memory_kib("VmRSS") - before]))
engine.abandon()
"""


def memory_kib(field: str) -> int:
    """This process' VmRSS, or its peak VmHWM. getrusage is not used, because its peak is inherited from the process
    that started this one.
    """
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1])


def reset_peak_memory() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def scale_figures(directory: Path, *, num_blocks: int) -> dict[str, float]:
    """Figures of a store of `num_blocks` small blocks. Each chain of 7,813 is a 1M-token prompt with a checkpoint."""
    config = KvStoreConfig(dir=str(directory / "scale"), budget_bytes=8 << 30, compression="off", scrub_bytes_per_s=0)
    engine = StorageEngine(config)
    num_prompts = max(1, num_blocks // PROMPT_BLOCKS)
    start = time.perf_counter()
    for number in range(num_prompts):
        engine.put(small_prompt(number))
    put_s = time.perf_counter() - start
    stored = num_prompts * PROMPT_BLOCKS
    out = {"scale_blocks": float(stored), "scale_put_blocks_per_s": stored / put_s}
    out |= _lookups(engine, num_prompts)
    out["index_bytes_per_block"] = engine.space.index_bytes / stored
    engine.close()
    out |= _opening(directory / "scale")
    return out


def _tokens(number: int) -> np.ndarray:
    return np.arange(PROMPT_BLOCKS * BLOCK_TOKENS, dtype=np.uint32) + np.uint32(number)


def small_prompt(number: int) -> list[Record]:
    chain = chain_of(_tokens(number), fingerprint_digest=FINGERPRINT, key=b"k" * 32, block_size=BLOCK_TOKENS)
    blocks = [
        Record(
            kind=RecordKind.BLOCK,
            hash=block_hash,
            parent=chain.parent(index),
            fingerprint=FINGERPRINT,
            position=(index + 1) * BLOCK_TOKENS,
            payload=block_hash + block_hash,
        )
        for index, block_hash in enumerate(chain.hashes)
    ]
    return [*blocks, dataclasses.replace(blocks[-1], kind=RecordKind.CHECKPOINT)]


def _lookups(engine: StorageEngine, num_prompts: int) -> dict[str, float]:
    """Median times of a look-up, over prompts: from tokens to the answer, and the store's part of that time."""
    # Is made now, and not in the middle of a measurement.
    code = compiled_code()
    whole, uncompiled, floor = [], [], []
    # BLAKE2b alone over as many bytes. A block takes six compressions of 128 bytes, including the one for the key.
    hashed_bytes = bytes(PROMPT_BLOCKS * 6 * 128)
    for number in range(min(num_prompts, 20)):
        with used_instead(code):
            whole.append(_lookup_ms(engine, number))
        with used_instead(None):
            uncompiled.append(_lookup_ms(engine, number))
        start = time.perf_counter()
        hashlib.blake2b(hashed_bytes).digest()
        floor.append(time.perf_counter() - start)
    return {
        **with_spread("lookup_ms", [all_ms for all_ms, _ in whole]),
        **with_spread("lookup_uncompiled_ms", [all_ms for all_ms, _ in uncompiled]),
        "lookup_store_ms": statistics.median(store_ms for _, store_ms in whole),
        "lookup_blake2b_ms": 1e3 * statistics.median(floor),
    }


def _lookup_ms(engine: StorageEngine, number: int) -> tuple[float, float]:
    """Time of a look-up from tokens to the answer, and the store's part of it."""
    tokens = _tokens(number)
    start = time.perf_counter()
    chain = chain_of(tokens, fingerprint_digest=FINGERPRINT, key=b"k" * 32, block_size=BLOCK_TOKENS)
    hashed = time.perf_counter()
    found = engine.lookup(chain.hashes, fingerprint=FINGERPRINT)
    ended = time.perf_counter()
    assert (found.num_blocks, found.checkpoints) == (PROMPT_BLOCKS, (PROMPT_BLOCKS,))
    return 1e3 * (ended - start), 1e3 * (ended - hashed)


def _opening(directory: Path) -> dict[str, float]:
    """Seconds and memory to open: after a clean close, after a crash, and without an index."""
    found: dict[str, list[list[float]]] = {}
    # Each state is measured several times, in turn, so that a slow second of the machine does not decide.
    for state in ("clean", "crashed", "without_index") * OPENINGS:
        if state == "without_index":
            shutil.rmtree(directory / "index")
        if state == "clean":
            StorageEngine(KvStoreConfig(dir=str(directory), budget_bytes=8 << 30, compression="off")).close()
        done = subprocess.run([sys.executable, "-c", OPEN, str(directory)], capture_output=True, text=True, check=True)
        found.setdefault(state, []).append(json.loads(done.stdout))
    out: dict[str, float] = {}
    for state, rows in found.items():
        opened_s, cpu_s, peak_kib, kept_kib = map(list, zip(*rows, strict=True))
        out |= with_spread(f"open_{state}_s", opened_s) | with_spread(f"open_{state}_cpu_s", cpu_s)
        out[f"open_{state}_peak_mib"] = max(peak_kib) / 1024
        out[f"open_{state}_kept_mib"] = max(kept_kib) / 1024
    return out
