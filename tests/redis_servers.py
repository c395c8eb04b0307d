"""Real Redis servers for tests, shared or of one test's own. If Redis is not installed, tests are skipped.

redis          one server for the whole run, empty at each test's start, for tests that leave it running
start_redis    starts servers of the test's own, which it may kill and start again
start_cluster  starts a cluster in the same way
"""

import contextlib
import random
import shutil
import socket
import subprocess

import pytest

from tests.waiting import AT_MOST_S, wait_until


def free_port():
    """A free port below those of outgoing connections, so that it stays free while its server is down.

    The port of its cluster bus, 10,000 higher, is free too.
    """
    while True:
        # SystemRandom, because seeded tests would draw the same port in several runs at once.
        port = random.SystemRandom().randrange(10_000, 22_000)
        with socket.socket() as probe, socket.socket() as bus, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            bus.bind(("127.0.0.1", port + 10_000))
            return port


class RedisServer:
    """One server process. `kill` ends it like a crash. `start` starts an empty one on the same port."""

    def __init__(self, directory, *flags):
        self.binary = shutil.which("redis-server")
        if self.binary is None:
            pytest.skip("redis-server is not installed")
        self.directory, self.flags = str(directory), flags
        self.port = free_port()
        self.process = None
        self._has_run = False

    @property
    def url(self):
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self):
        """Start the server. If another process takes the port before the first start, another port is used."""
        for _ in range(5):
            if self._run():
                self._has_run = True
                return self
            if not self._has_run:
                self.port = free_port()
        raise RuntimeError("redis-server ended at once, five times")

    def _run(self):
        """Start the process. False: it ended, most likely because its port was taken."""
        self.process = subprocess.Popen(
            [self.binary, "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", self.directory,
             "--appendonly", "no", *self.flags],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        # Another test's server may answer at this port.
        itself = f"process_id:{self.process.pid}\r"
        wait_until(
            lambda: self.process.poll() is not None or itself in self.ask("INFO server", timeout_s=5),
            "redis-server answers",
        )
        return self.process.poll() is None

    def ask(self, command, timeout_s=AT_MOST_S):
        """The beginning of the answer to a command, or "" while the server is down. Arguments must have no spaces."""
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout_s) as sock:
            sock.sendall(command.encode() + b"\r\n")
            return sock.recv(4096).decode(errors="replace").strip()
        return ""

    def kill(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


class RedisCluster(RedisServer):
    """A cluster of one node, which has all slots."""

    def __init__(self, directory, *flags):
        super().__init__(directory, "--cluster-enabled", "yes", *flags)

    @property
    def url(self):
        return f"redis+cluster://127.0.0.1:{self.port}"

    def start(self):
        super().start()
        self.ask("CLUSTER ADDSLOTSRANGE 0 16383")
        wait_until(lambda: "cluster_state:ok" in self.ask("CLUSTER INFO"), "the cluster is up")
        return self


def _starter(kind, directory):
    """A function that starts servers, and the list of those that it started."""
    started = []

    def start(*flags):
        started.append(kind(directory, *flags))
        return started[-1].start()

    return start, started


@pytest.fixture
def start_redis(tmp_path):
    start, started = _starter(RedisServer, tmp_path)
    yield start
    for server in started:
        server.kill()


@pytest.fixture
def start_cluster(tmp_path):
    start, started = _starter(RedisCluster, tmp_path)
    yield start
    for server in started:
        server.kill()


class SharedRedisServer:
    """A server that other tests also use, so a test can send commands to it but not end it."""

    def __init__(self, server):
        self.url, self.ask = server.url, server.ask


@pytest.fixture(scope="session")
def shared_redis(tmp_path_factory):
    server = RedisServer(tmp_path_factory.mktemp("redis")).start()
    yield SharedRedisServer(server)
    server.kill()


@pytest.fixture
def redis(shared_redis):
    assert shared_redis.ask("FLUSHALL") == "+OK"
    return shared_redis
