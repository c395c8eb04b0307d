"""A process that uses a store and kills itself at a chosen step. test_crash runs it once, and it forks for each seed.

Steps are the file operations of kvstore.disk and both sides of every index commit, so a kill can fall between any two
of them, and inside a write. Acknowledged records go to a log before the next call, as a caller would know them.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from antefix.record import RecordKind
from antefix_kvstore.disk import Disk
from antefix_kvstore.index_writer import IndexTxn
from antefix_kvstore.kvstore_config import KvStoreConfig
from antefix_kvstore.storage_engine import StorageEngine
from tests.kvstore.small_store import BLOCK, FINGERPRINT, Prompt

PROMPTS = [
    Prompt([n if i >= 24 else 0 for i in range(BLOCK * 12)], payload_bytes=3000, version=1 + n % 2) for n in range(8)
]
NUM_LIVES = 4
BUDGET_BYTES = 1 << 20
SEGMENT_BYTES = 64 << 10


class StepCounter:
    """Kills the process at step `fatal`."""

    def __init__(self, fatal: int) -> None:
        self.fatal = fatal
        self.count = 0

    def step(self) -> None:
        self.count += 1
        if self.count == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)


class FatalDisk(Disk):
    """Each operation has a step before and a step after it. A write also has a step in its middle."""

    def __init__(self, counter: StepCounter) -> None:
        self.counter = counter

    def create(self, path: Path) -> int:
        self.counter.step()
        fd = super().create(path)
        self.counter.step()
        return fd

    def write(self, fd: int, buffers: Sequence[bytes | bytearray | memoryview], offset: int) -> None:
        whole = b"".join(bytes(buffer) for buffer in buffers)
        half = len(whole) // 2
        super().write(fd, [whole[:half]], offset)
        self.counter.step()
        super().write(fd, [whole[half:]], offset + half)
        self.counter.step()

    def allocate(self, fd: int, offset: int, nbytes: int) -> None:
        super().allocate(fd, offset, nbytes)
        self.counter.step()

    def sync_data(self, fd: int) -> None:
        super().sync_data(fd)
        self.counter.step()

    def truncate(self, fd: int, nbytes: int) -> None:
        self.counter.step()
        super().truncate(fd, nbytes)
        self.counter.step()

    def unlink(self, path: Path) -> None:
        self.counter.step()
        super().unlink(path)
        self.counter.step()

    def rename(self, source: Path, target: Path) -> None:
        self.counter.step()
        super().rename(source, target)
        self.counter.step()


def live(directory: Path, seed: int, fatal: int) -> None:
    """Open, put, evict and compact. The process dies by SIGKILL at step `fatal` at the latest."""
    rng = random.Random(seed)
    counter = StepCounter(fatal)
    commit = IndexTxn.__exit__

    def fatal_commit(self: IndexTxn, kind: object, *rest: object) -> None:
        counter.step()
        commit(self, kind, *rest)
        counter.step()

    IndexTxn.__exit__ = fatal_commit  # type: ignore[method-assign]
    log = os.open(directory / "acknowledged", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(**fact: object) -> None:
        os.write(log, json.dumps(fact).encode() + b"\n")

    config = KvStoreConfig(dir=str(directory / "store"), budget_bytes=BUDGET_BYTES, segment_bytes=SEGMENT_BYTES)
    engine = StorageEngine(config, disk=FatalDisk(counter))
    # Every second life writes every batch past the page cache.
    engine.segments.direct_bytes_min = 0 if seed % 2 else 1 << 30
    while True:
        action = rng.random()
        prompt = rng.randrange(len(PROMPTS))
        count = rng.randrange(1, 13)
        if action < 0.7:
            engine.put([*PROMPTS[prompt].blocks(count), PROMPTS[prompt].checkpoint(count - 1)])
            note(put=prompt, count=count)
        elif action < 0.85:
            note(evict=True)
            engine.space.evict(rng.randrange(1, 60_000))
        elif action < 0.95:
            engine.space.compactor.compact_one(0.0)
        else:
            engine.close()
            engine = StorageEngine(config, disk=FatalDisk(counter))


def survives(directory: Path) -> str | None:
    """Open the store that the kills left, and check it. Returns the error, or None."""
    engine = StorageEngine(
        KvStoreConfig(dir=str(directory / "store"), budget_bytes=BUDGET_BYTES, segment_bytes=SEGMENT_BYTES)
    )
    log = directory / "acknowledged"
    facts = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    # The eviction may have removed any record that was put before it.
    last_evict = max((i for i, fact in enumerate(facts) if "evict" in fact), default=-1)
    expected = dict.fromkeys(range(len(PROMPTS)), 0)
    for fact in facts[last_evict + 1 :]:
        expected[fact["put"]] = max(expected[fact["put"]], fact["count"])
    for number, prompt in enumerate(PROMPTS):
        # `check` asserts that every byte that is returned is right.
        num_good = prompt.check(engine)
        if num_good != engine.lookup(prompt.hashes, fingerprint=FINGERPRINT).num_blocks:
            return f"prompt {number}: promised more than the {num_good} blocks that can be read"
        if num_good < expected[number]:
            return f"prompt {number}: {expected[number]} blocks were acknowledged, {num_good} are left"
        for index, block_hash in enumerate(prompt.hashes):
            stored = engine.read(RecordKind.BLOCK, block_hash, fingerprint=FINGERPRINT)
            if stored is not None and index >= num_good:
                return f"prompt {number}: block {index} is stored without its ancestors"
    if engine.space.used_bytes > BUDGET_BYTES:
        return f"{engine.space.used_bytes} bytes are used of {BUDGET_BYTES}"
    engine.close()
    return None


def in_child(work: object, *args: object) -> int:
    """Run in a forked process; returns its exit status."""
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            wrong = work(*args)  # type: ignore[operator]
            if wrong:
                sys.stderr.write(f"{wrong}\n")
            status = 1 if wrong else 0
        except BaseException as err:
            sys.stderr.write(f"{type(err).__name__}: {err}\n")
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1]


def main(first_seed: int, num_seeds: int) -> int:
    """Run the seeds. Prints one JSON object with the number of kills and the seeds that failed."""
    kills, failed = 0, []
    for seed in range(first_seed, first_seed + num_seeds):
        rng = random.Random(seed)
        with tempfile.TemporaryDirectory(prefix="antefix-crash-") as name:
            for number in range(NUM_LIVES):
                status = in_child(live, Path(name), seed * 100 + number, rng.randrange(1, 60))
                if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
                    failed.append(seed)
                    break
                kills += 1
            else:
                if in_child(survives, Path(name)) != 0:
                    failed.append(seed)
    print(json.dumps({"kills": kills, "failed_seeds": failed}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
