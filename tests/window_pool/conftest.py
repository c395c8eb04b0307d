"""A real Redis server on a free port, or a skip that says why."""

import asyncio
import shutil
import socket
import subprocess
import time

import pytest


def free_port():
    """One whose cluster bus, 10,000 above, is a port as well and free."""
    while True:
        with socket.socket() as probe, socket.socket() as bus:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
            if port + 10_000 < 1 << 16:
                try:
                    bus.bind(("127.0.0.1", port + 10_000))
                except OSError:
                    continue
                return port


class RedisServer:
    """One server process. `kill` ends it as a crash would; `start` brings an empty one up on the same port."""

    def __init__(self, binary, directory, *flags):
        self.binary, self.directory, self.flags = binary, directory, flags
        self.port = free_port()
        self.process = None

    @property
    def url(self):
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self):
        self.process = subprocess.Popen(
            [self.binary, "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", self.directory,
             "--appendonly", "no", *self.flags],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                with socket.create_connection(("127.0.0.1", self.port), timeout=1) as sock:
                    sock.sendall(b"PING\r\n")
                    if sock.recv(16).startswith(b"+PONG"):
                        return self
            except OSError:
                time.sleep(0.05)
        raise RuntimeError("redis-server did not answer")

    def kill(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@pytest.fixture
def start_redis(tmp_path):
    binary = shutil.which("redis-server")
    if binary is None:
        pytest.skip("redis-server is not installed")
    started = []

    def start(*flags):
        server = RedisServer(binary, str(tmp_path), *flags).start()
        started.append(server)
        return server

    yield start
    for server in started:
        server.kill()


@pytest.fixture
async def redis(start_redis):
    return await asyncio.to_thread(start_redis)
