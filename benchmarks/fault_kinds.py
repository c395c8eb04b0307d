"""The faults of `faults.py`. Each fault begins, lasts for a time, and is undone. The deployment recovers by itself."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import resource
import signal
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from antefix_console.deployment import RoleProcess
from benchmarks.fault_links import LinkedDeployment
from tests.redis_servers import RedisServer

Fault = Callable[[LinkedDeployment, random.Random], contextlib.AbstractAsyncContextManager[None]]

# How long a lasting fault lasts after the first answer: longer than a hang may delay a request, so that more requests
# meet the fault.
LASTS_S = 6.0


def one_of(deployment: LinkedDeployment, role: str, rng: random.Random) -> RoleProcess:
    alive = [process for process in deployment.processes if process.role == role and process.alive]
    return rng.choice(alive) if alive else deployment.one(role)


def kill(role: str) -> Fault:
    """Kill the role's process with kill -9. The supervisor starts the killed process again."""

    @contextlib.asynccontextmanager
    async def fault(deployment: LinkedDeployment, rng: random.Random) -> AsyncIterator[None]:
        one_of(deployment, role, rng).process.kill()
        yield

    return fault


def stop(role: str) -> Fault:
    """Stop the role's process with SIGSTOP, and let it continue with SIGCONT."""

    @contextlib.asynccontextmanager
    async def fault(deployment: LinkedDeployment, rng: random.Random) -> AsyncIterator[None]:
        process = one_of(deployment, role, rng).process
        process.send_signal(signal.SIGSTOP)
        try:
            yield
            await asyncio.sleep(deployment.lasts_s)
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)

    return fault


def slow(role: str) -> Fault:
    """The process is stopped (SIGSTOP) for nine tenths of the time."""

    @contextlib.asynccontextmanager
    async def fault(deployment: LinkedDeployment, rng: random.Random) -> AsyncIterator[None]:
        process = one_of(deployment, role, rng).process

        async def throttle() -> None:
            while True:
                process.send_signal(signal.SIGSTOP)
                await asyncio.sleep(0.09)
                process.send_signal(signal.SIGCONT)
                await asyncio.sleep(0.01)

        throttling = asyncio.create_task(throttle())
        try:
            yield
            await asyncio.sleep(deployment.lasts_s)
        finally:
            throttling.cancel()
            await asyncio.gather(throttling, return_exceptions=True)
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)

    return fault


def link(role: str, what: str) -> Fault:
    """Traffic to the role is cut off or delayed by 0.3 s per piece, or its connections are reset."""

    @contextlib.asynccontextmanager
    async def fault(deployment: LinkedDeployment, rng: random.Random) -> AsyncIterator[None]:
        found = rng.choice(deployment.links_of(role))
        found.is_cut, found.delay_s = what == "cut", 0.3 if what == "delayed" else 0.0
        if what == "reset":
            found.reset()
        try:
            yield
            await asyncio.sleep(deployment.lasts_s if what != "reset" else 0)
        finally:
            found.is_cut, found.delay_s = False, 0.0

    return fault


def files(pattern: str, what: str) -> Fault:
    """Flip bytes in a file of the store, truncate it, or remove it."""

    @contextlib.asynccontextmanager
    async def fault(deployment: LinkedDeployment, rng: random.Random) -> AsyncIterator[None]:
        found = sorted(path for path in deployment.config.store_dir.rglob(pattern) if path.is_file())
        if found:
            harm(rng.choice(found), what, rng)
        yield

    return fault


def harm(path: Path, what: str, rng: random.Random) -> None:
    size = path.stat().st_size
    if what == "removed":
        path.unlink()
    elif what == "truncated":
        os.truncate(path, rng.randrange(size) if size else 0)
    else:
        with path.open("r+b") as file:
            for _ in range(32):
                file.seek(rng.randrange(max(1, size)))
                byte = file.read(1)
                file.seek(-len(byte), os.SEEK_CUR)
                file.write(bytes(value ^ 0x55 for value in byte))


@contextlib.asynccontextmanager
async def few_descriptors(deployment: LinkedDeployment, rng: random.Random) -> AsyncIterator[None]:
    """Limit the router to three more file descriptors than it uses."""
    pid = one_of(deployment, "router", rng).process.pid
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    in_use = len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208 - of /proc
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (in_use + 3, before[1]))
    try:
        yield
        await asyncio.sleep(deployment.lasts_s)
    finally:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


@contextlib.asynccontextmanager
async def full_disk(deployment: LinkedDeployment, rng: random.Random) -> AsyncIterator[None]:
    """Another process fills the data directory's file system. This fault runs only if that file system is small
    (--small-disk).
    """
    path = deployment.config.data_dir / "filler"
    with path.open("wb") as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 16))
            file.flush()
    try:
        yield
        await asyncio.sleep(deployment.lasts_s)
    finally:
        path.unlink()


def read_only(part: str) -> Fault:
    """A part of the data directory becomes a read-only mount (as root). Files that are open for writing stay writable
    during this fault.
    """

    @contextlib.asynccontextmanager
    async def fault(deployment: LinkedDeployment, rng: random.Random) -> AsyncIterator[None]:
        path = str(deployment.config.data_dir / part)
        for arguments in (("--bind", path, path), ("-o", "remount,bind,ro", path)):
            await asyncio.to_thread(subprocess.run, ["mount", *arguments], check=True)
        try:
            yield
            await asyncio.sleep(deployment.lasts_s)
        finally:
            await asyncio.to_thread(subprocess.run, ["umount", "-l", path], check=True)

    return fault


def clock(shift: str) -> Fault:
    """The store's clock jumps and later jumps back (libfaketime reads its file again within a second)."""

    @contextlib.asynccontextmanager
    async def fault(deployment: LinkedDeployment, rng: random.Random) -> AsyncIterator[None]:
        path = clock_file(deployment.config.data_dir)
        path.write_text(shift)
        try:
            yield
            await asyncio.sleep(deployment.lasts_s)
        finally:
            path.write_text("+0")

    return fault


@contextlib.asynccontextmanager
async def redis_wiped(deployment: LinkedDeployment, rng: random.Random) -> AsyncIterator[None]:
    """All that Redis held is gone, while it continues to serve."""
    await asyncio.to_thread(redis_of(deployment).ask, "FLUSHALL")
    yield


@contextlib.asynccontextmanager
async def redis_stopped(deployment: LinkedDeployment, rng: random.Random) -> AsyncIterator[None]:
    process = redis_of(deployment).process
    process.send_signal(signal.SIGSTOP)
    try:
        yield
        await asyncio.sleep(deployment.lasts_s)
    finally:
        process.send_signal(signal.SIGCONT)


@contextlib.asynccontextmanager
async def redis_killed(deployment: LinkedDeployment, rng: random.Random) -> AsyncIterator[None]:
    """Redis is killed, and later started again with nothing in it."""
    redis = redis_of(deployment)
    redis.kill()
    try:
        yield
        await asyncio.sleep(deployment.lasts_s)
    finally:
        await asyncio.to_thread(redis.start)


def redis_of(deployment: LinkedDeployment) -> RedisServer:
    assert deployment.redis is not None
    return deployment.redis


def clock_file(data_dir: Path) -> Path:
    return data_dir.parent / "clock"


FAULTS: dict[str, Fault] = {
    **{f"kill {role}": kill(role) for role in ("prefill", "decode", "kvstore", "router")},
    **{f"stop {role}": stop(role) for role in ("prefill", "decode", "kvstore")},
    **{f"slow {role}": slow(role) for role in ("prefill", "decode", "kvstore")},
    **{
        f"link to {role} {what}": link(role, what)
        for role in ("prefill", "decode", "kvstore")
        for what in ("cut", "delayed", "reset")
    },
    **{f"segment {what}": files("*.seg", what) for what in ("flipped", "truncated", "removed")},
    **{f"index {what}": files("data.mdb", what) for what in ("flipped", "truncated", "removed")},
    "few descriptors": few_descriptors,
}
# The faults that --small-disk and --faketime add.
MORE_FAULTS: dict[str, Fault] = {
    "full disk": full_disk,
    **{f"read-only {part}": read_only(part) for part in ("store", "ledger")},
}
CLOCK_FAULTS: dict[str, Fault] = {"clock +400 days": clock("+400d"), "clock -400 days": clock("-400d")}
REDIS_FAULTS: dict[str, Fault] = {
    "redis wiped": redis_wiped,
    "redis stopped": redis_stopped,
    "redis killed": redis_killed,
}
