"""A real Redis server of a test's own. Fixtures `start_redis` and `redis` (tests/conftest.py) give one."""

from __future__ import annotations

import socket
import subprocess
import time
from typing import Self

# Ten times what a start takes on a busy machine.
_START_S = 60


def free_port() -> int:
    """One whose cluster bus, 10,000 above, is a port as well and free."""
    while True:
        with socket.socket() as probe, socket.socket() as bus:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
            if port + 10_000 < 1 << 16:
                try:
                    bus.bind(("127.0.0.1", port + 10_000))
                except OSError:
                    continue
                return port


class RedisServer:
    """One server process. `kill` ends it as a crash would; `start` brings an empty one up on the same port."""

    def __init__(self, binary: str, directory: str, *flags: str) -> None:
        self.binary, self.directory, self.flags = binary, directory, flags
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> Self:
        fixed = ("--bind", "127.0.0.1", "--save", "", "--dir", self.directory, "--appendonly", "no")
        self.process = subprocess.Popen(
            [self.binary, "--port", str(self.port), *fixed, *self.flags],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline:
            try:
                with socket.create_connection(("127.0.0.1", self.port), timeout=1) as sock:
                    sock.sendall(b"PING\r\n")
                    if sock.recv(16).startswith(b"+PONG"):
                        return self
            except OSError:
                time.sleep(0.05)
        raise RuntimeError("redis-server did not answer")

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None
