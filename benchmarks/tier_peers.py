"""Other clients of the same S3 server, for `benchmarks.tier`. Each peer runs in a process with its own Python
environment. For each line on stdin the process reads all of its bytes once, and prints the seconds.

boto3    reads the ranges that our tier reads, with as many threads as our tier has reads in flight
LMCache  its S3 connector. Only the path of an object is changed: the connector puts the bucket into the host's name,
         which does not work with a server whose address is a number. The connector has put its objects into the
         bucket itself, one per chunk of 128 tokens. The benchmark reads the objects with `batched_get`, as LMCache's
         cache engine does
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

_BOTO3: Final = """
import json, sys, time
from concurrent.futures import ThreadPoolExecutor
import boto3
from botocore.config import Config
bucket, prefix, ranges, threads = json.loads(sys.stdin.readline())
client = boto3.client("s3", config=Config(max_pool_connections=threads))
def read(each):
    name, start, stop = each
    return len(client.get_object(Bucket=bucket, Key=prefix + name, Range=f"bytes={start}-{stop - 1}")["Body"].read())
pool = ThreadPoolExecutor(threads)
nbytes = sum(stop - start for _, start, stop in ranges)
print(json.dumps({"nbytes": nbytes, "version": boto3.__version__}), flush=True)
for _ in sys.stdin:
    started = time.perf_counter()
    assert sum(pool.map(read, ranges)) == nbytes
    print(time.perf_counter() - started, flush=True)
"""

_LMCACHE: Final = """
import asyncio, importlib.metadata, json, logging, os, sys, time
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
import torch
from lmcache.utils import CacheEngineKey
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.metadata import LMCacheMetadata
from lmcache.v1.storage_backend.connector.s3_connector import S3Connector
from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend
logging.disable(logging.INFO)
bucket, endpoint, num_blocks, token_bytes = json.loads(sys.stdin.readline())
config = LMCacheEngineConfig.from_defaults(chunk_size=128, local_cpu=False, max_local_cpu_size=2.0)
shape = (1, 1, 128, 1, token_bytes)
metadata = LMCacheMetadata(model_name="bench", world_size=1, local_world_size=1, worker_id=0, local_worker_id=0,
    kv_dtype=torch.uint8, kv_shape=shape, use_mla=True, chunk_size=128)

class InThePath(S3Connector):
    def _format_safe_path(self, key_str):
        return f"/{bucket}" + super()._format_safe_path(key_str)

def tell(what):
    answers.write(json.dumps(what) + "\\n")
    answers.flush()

async def main():
    loop = asyncio.get_running_loop()
    backend = LocalCPUBackend(config, metadata, dst_device="cpu")
    connector = InThePath("s3://" + endpoint, loop, backend, 16, False, "us-east-1", False, True,
        os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"])
    keys = [CacheEngineKey("bench", 1, 0, number, torch.uint8) for number in range(num_blocks)]
    chunk = backend.allocate(connector.meta_shapes, connector.meta_dtypes, connector.meta_fmt)
    memoryview(chunk.byte_array).cast("B")[:] = os.urandom(chunk.get_size())
    for key in keys:
        await connector._put(key, chunk)
    # Sizes are asked for, not remembered from the writes; the first read is the caller's warm-up.
    connector.object_size_cache.clear()
    tell({"nbytes": chunk.get_size() * num_blocks, "version": importlib.metadata.version("lmcache")})
    while await loop.run_in_executor(None, sys.stdin.readline):
        started = time.perf_counter()
        found = await connector.batched_get(keys)
        seconds = time.perf_counter() - started
        assert all(each is not None for each in found), sum(each is None for each in found)
        for each in found:
            each.ref_count_down()
        tell(seconds)
    os._exit(0)

asyncio.run(main())
"""


class Peer:
    """One peer.  problem: why the peer cannot be measured, or empty.  nbytes: the bytes that each read returns."""

    def __init__(self, name: str, python: Path, script: str, asked: Sequence[Any]) -> None:
        self.name = name
        self.nbytes = 0
        self.version = self.problem = ""
        self._process: subprocess.Popen[str] | None = None
        if not python.exists():
            self.problem = f"there is no {python}"
            return
        command = [str(python), "-c", script]
        # A file, because a full pipe that nobody reads would block the process.
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (the process writes to it)
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )
        self._tell(json.dumps(list(asked)))
        line = self._line()
        if not line:
            self.problem = self._last_words()
            return
        said = json.loads(line)
        self.nbytes, self.version = said["nbytes"], said["version"]

    async def read(self) -> float:
        self._tell("go")
        line = await asyncio.to_thread(self._line)
        if not line:
            raise RuntimeError(f"{self.name}: {self._last_words()}")
        return float(line)

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.communicate()

    def _last_words(self) -> str:
        assert self._process is not None
        self._process.wait()
        self._errors.seek(0)
        return (self._errors.read().strip().splitlines() or ["it ended at once"])[-1]

    def _tell(self, line: str) -> None:
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _line(self) -> str:
        assert self._process is not None and self._process.stdout is not None
        return self._process.stdout.readline().strip()


def boto3_peer(home: Path, url: str, ranges: Sequence[tuple[str, int, int]], num_in_flight: int) -> Peer:
    """home: the environment that has boto3.  ranges: (name below the URL, first byte, end byte), end not included."""
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    asked = [bucket, f"{prefix}/" if prefix else "", list(ranges), num_in_flight]
    return Peer("boto3", home / "bin" / "python", _BOTO3, asked)


def lmcache_peer(home: Path, url: str, endpoint: str, num_blocks: int, block_bytes: int) -> Peer:
    """Puts its own objects first.

    An object is a block of whole pages, because LMCache's allocator needs whole pages.
    """
    bucket, _, _ = url.removeprefix("s3://").partition("/")
    asked = [bucket, endpoint.removeprefix("http://"), num_blocks, -(-block_bytes // 4096) * 4096 // 128]
    return Peer("lmcache", home / "bin" / "python", _LMCACHE, asked)
