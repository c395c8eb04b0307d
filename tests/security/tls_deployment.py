"""All roles as processes on loopback, over TLS with their own certificates, as on several hosts."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from contextlib import AsyncExitStack
from pathlib import Path

from antefix.secret import create_secret_file
from tests.waiting import AT_MOST_S


def ipv6_or_v4():
    """An IPv6 loopback address if the host has one, else IPv4. IPv6 works wherever an address does."""
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return "127.0.0.1"
    return "[::1]"


MODEL = Path(__file__).parents[2] / "models" / "antefix-tiny"


class TlsDeployment:
    """`async with`: runs one process per role.  said: the announcement of each process."""

    def __init__(self, authority, directory, *, router_flags=(), host=None):
        self.authority, self.directory, self.host = authority, directory, host or ipv6_or_v4()
        self.router_flags = router_flags
        self.secret = create_secret_file(directory / "secret")
        self.said = {}
        self._stack = AsyncExitStack()

    async def __aenter__(self):
        shared = ("--model", str(MODEL), "--secret-file", str(self.secret))
        await self.start("kvstore", "--dir", str(self.directory / "store"), "--budget-bytes", "256M")
        store = ("--store-address", self.said["kvstore"]["address"])
        await self.start("router", *shared, *store, "--leases", "true", *self.router_flags)
        router = ("--routers", self.said["router"]["address"])
        workers = (self.start(role, *shared, *store, *router, "--pool-bytes", "64M") for role in ("prefill", "decode"))
        await asyncio.gather(*workers)
        return self

    async def __aexit__(self, *_):
        await self._stack.aclose()

    async def start(self, role, *flags):
        log = self._stack.enter_context((self.directory / f"{role}.log").open("wb"))
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "antefix_console", "serve", role, "--watch-stdin"),
            *("--address", f"{self.host}:0", "--metrics-address", f"{self.host}:0", "--grace-s", "2"),
            *("--credentials", str(self.authority.files(role, f"{role}1").directory), *flags),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

        async def end():
            process.stdin.close()
            await process.wait()

        self._stack.push_async_callback(end)
        line = await asyncio.wait_for(process.stdout.readline(), AT_MOST_S)
        assert line, self.log(role)
        self.said[role] = json.loads(line)

    def log(self, role):
        return (self.directory / f"{role}.log").read_text()
