"""Measures how much uploads slow down restores, for `benchmarks.tier`. A store's process uploads while this process
reads the store's files, as a worker on the store's host does.

Turns with uploads alternate with turns without. A pair of neighbouring turns gives one ratio, so that a slowdown of the
whole machine does not count. The figure is the median of all pairs, with the interval that contains the true median in
95 of 100 runs. A turn without uploads begins when the upload before has ended. The process uploads the same blocks
repeatedly, at a service's default rate, even if the tier already has them.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from antefix.record import RecordKind, RecordName
from antefix.store_files.segment_reader import StoreReader
from antefix_kvstore.kvstore_config import KvStoreConfig
from antefix_kvstore.object_upload import ObjectUploader, _parts
from antefix_kvstore.storage_engine import StorageEngine
from antefix_kvstore.upload_choice import choose

FINGERPRINT: Final = b"F" * 32
# Bytes of a block's FP8 global KV in V4-Flash.
BLOCK_BYTES: Final = 449_824
# The number of blocks per restore: 32K tokens.
NUM_RESTORED: Final = 256


def store_config(directory: Path, num_blocks: int, url: str) -> KvStoreConfig:
    return KvStoreConfig(
        dir=str(directory / "store"),
        budget_bytes=3 * num_blocks * BLOCK_BYTES,
        compression="off",
        durable=False,
        scrub_bytes_per_s=0,
        object_store=f"{url}-uploads",
        object_upload=("all",),
        object_wait_s=0.0,
    )


def upload_cost(
    args: argparse.Namespace,
    config: KvStoreConfig,
    hashes: Sequence[bytes],
    into: Sequence[memoryview],
    servers: Sequence[int],
) -> dict[str, Any]:
    """Restore a prefix in turns with and without uploads. The store must not be open anywhere else.

    servers: ids of the S3 server's processes on this machine, which receive the uploads.
    """
    reader, child = StoreReader(Path(config.dir)), _Child(config, hashes[-1])
    hashes, into = hashes[:NUM_RESTORED], into[:NUM_RESTORED]

    def restores() -> float:
        """Seconds per restore, over one turn."""
        started, count = time.perf_counter(), 0
        while time.perf_counter() - started < args.turn:
            assert reader.read_blocks(hashes, into, fingerprint=FINGERPRINT).num_good == len(hashes)
            count += 1
        return (time.perf_counter() - started) / count

    try:
        restores()
        with_server = _in_turns(restores, child, max(1, args.pairs // 6))
        for pid in servers:
            _give_way(pid)
        alone = _in_turns(restores, child, args.pairs)
        return {
            "cost": round(statistics.median(alone.costs), 3),
            "interval": [round(each, 3) for each in median_interval(alone.costs)],
            "costs": [round(each, 3) for each in alone.costs],
            "cost_with_server": round(statistics.median(with_server.costs), 3),
            "restore_mb_per_s": round(NUM_RESTORED * BLOCK_BYTES / alone.restore_s / 1e6, 1),
            "uploaded_mb_per_s": round(alone.uploaded / alone.upload_s / 1e6, 1),
            # Processor time hardly depends on other load. The S3 server's own time is not included.
            "cpu_s_per_gb": round(1e9 * alone.cpu_s / max(alone.uploaded, 1), 2),
            "limit_mb_per_s": round(config.object_upload_bytes_per_s / 1e6, 1),
        }
    finally:
        child.close()
        reader.close()


@dataclass
class _Turns:
    """costs: how much longer restores took with uploads, for each pair of turns.

    uploaded: bytes uploaded in `upload_s` seconds, with `cpu_s` seconds of processor time.
    restore_s: seconds per restore in the last turn without uploads.
    """

    costs: list[float]
    uploaded: int = 0
    upload_s: float = 0.0
    cpu_s: float = 0.0
    restore_s: float = 0.0


def _in_turns(restores: Callable[[], float], child: _Child, num_pairs: int) -> _Turns:
    turns = _Turns([])
    for number in range(num_pairs):
        found = {}
        # The turn with uploads comes first in every second pair.
        for uploads in (number % 2 == 0, number % 2 == 1):
            before, cpu_before_s = child.uploaded(uploads)
            started = time.perf_counter()
            found[uploads] = restores()
            # An upload that has begun is waited for, so that it is not part of the next turn.
            after, cpu_after_s = child.uploaded(False)
            turns.upload_s += (time.perf_counter() - started) * uploads
            turns.uploaded += after - before
            turns.cpu_s += (cpu_after_s - cpu_before_s) * uploads
        turns.costs.append(found[True] / found[False] - 1)
        turns.restore_s = found[False]
    return turns


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95% confidence interval of the median, from the order of the values alone (binomial). All values, if they
    are too few.
    """
    order, count = sorted(values), len(values)
    below = 0.0
    for number in range(count // 2):
        below += math.comb(count, number) / 2**count
        if below > 0.025:
            return order[max(0, number - 1)], order[count - max(1, number)]
    return order[0], order[-1]


def _give_way(pid: int) -> None:
    """Let all threads of a process run only while nothing else does."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setscheduler(int(thread.name), os.SCHED_IDLE, os.sched_param(0))


class _Child:
    def __init__(self, config: KvStoreConfig, last: bytes) -> None:
        command = [sys.executable, "-m", "benchmarks.tier_upload"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._ask(json.dumps([asdict(config), last.hex()]))

    def uploaded(self, goes_on: bool) -> tuple[int, float]:
        """Bytes uploaded so far, and seconds of processor time.  goes_on: whether the process uploads from now on."""
        nbytes, cpu_s = self._ask("on" if goes_on else "off").split()
        return int(nbytes), float(cpu_s)

    def close(self) -> None:
        self._process.communicate()

    def _ask(self, line: str) -> str:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline()


def main() -> None:
    """The process that uploads. The process answers each line with its uploaded bytes and its processor time so far."""
    settings, last = json.loads(sys.stdin.readline())
    lists = {name: tuple(value) for name, value in settings.items() if isinstance(value, list)}
    engine = StorageEngine(KvStoreConfig(**{**settings, **lists}))
    # All turns use one uploader, so that the cost of its start is not measured.
    uploader, turns = ObjectUploader(engine, step_s=0.0), _UploadTurns()
    turns.follow(uploader, [(RecordKind.BLOCK, bytes.fromhex(last))])
    uploader.start()
    counters = uploader.writer.counters
    print("ready", flush=True)
    for line in sys.stdin:
        if line.strip() == "on":
            turns.goes_on.set()
        else:
            turns.goes_on.clear()
            turns.rests.wait(60)
        print(counters.bytes_written, time.process_time(), flush=True)
    turns.goes_on.set()
    uploader.stop()
    engine.close()


class _UploadTurns:
    """goes_on: whether uploads may begin.  rests: set while none runs."""

    def __init__(self) -> None:
        self.goes_on, self.rests = threading.Event(), threading.Event()

    def follow(self, uploader: ObjectUploader, names: Sequence[RecordName]) -> None:
        """Have the uploader upload these records and the records that they depend on, one object per step."""
        # The catalog finds no block, so there is always something to upload.
        uploader.writer.catalog.find = lambda kind, names, alive_ms=None: [None] * len(names)  # type: ignore[method-assign]
        chosen = choose(uploader._engine, uploader.catalog, names, alive_ms=dict.fromkeys(RecordKind, 0))
        parts = itertools.cycle(_parts(chosen, uploader.writer.settings.segment_bytes))

        async def step(*, flush: bool = False) -> None:
            self.rests.set()
            await asyncio.to_thread(self.goes_on.wait)
            self.rests.clear()
            # Its rate counts from the beginning of each object.
            await uploader._upload(next(parts))

        uploader.step = step  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
