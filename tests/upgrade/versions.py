"""Roles of several versions of Antefix in one deployment, and conversations that continue meanwhile."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from antefix.blocking import BlockingRouterClient
from antefix.errors import AntefixError

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "antefix-tiny"
SOURCE_ROOTS = ("billing", "console", "decode", "engines", "kernels", "kvstore", "prefill", "router", "simulate")
START_S = 300.0
GRACE_S = 60


def checkout(revision: str, into: Path) -> Path:
    """Check out the tree of a commit or tag, and generate its own protos."""
    into.mkdir()
    packed = subprocess.run(["git", "archive", revision], cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(["tar", "x"], cwd=into, input=packed, check=True)
    subprocess.run([sys.executable, "proto/generate.py"], cwd=into, check=True)
    return into


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(slots=True)
class Running:
    """One process of a role. tree: the version that it runs."""

    name: str
    tree: Path
    process: subprocess.Popen[bytes]
    log: Path
    address: str
    http: str = ""

    def stop(self, *, kill: bool = False) -> None:
        """Stop the process as a supervisor does: signal it, and wait until it has drained.

        Raises if it does not end.
        """
        self.process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
        status = self.process.wait(GRACE_S + 60)
        assert kill or status == 0, f"{self.name} ended with {status}: {self.tail()}"

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]


@dataclass(slots=True)
class Deployment:
    """A store, workers and two routers on this host, each of any version; a role can be replaced while it runs."""

    directory: Path
    routers: list[str] = field(default_factory=lambda: [f"127.0.0.1:{free_port()}" for _ in range(2)])
    doors: list[str] = field(default_factory=lambda: [f"127.0.0.1:{free_port()}" for _ in range(2)])
    store: str = field(default_factory=lambda: f"127.0.0.1:{free_port()}")
    running: dict[str, Running] = field(default_factory=dict)
    started: int = 0

    @property
    def secret(self) -> Path:
        path = self.directory / "secret"
        if not path.exists():
            path.write_text("5a" * 32)
            path.chmod(0o600)
        return path

    def start(self, name: str, tree: Path) -> Running:
        """Start a role and wait until it serves.  name: kvstore, prefill-1, decode-1, router-0, router-1 and so on."""
        role, _, number = name.partition("-")
        common = ["--secret-file", str(self.secret), "--grace-s", str(GRACE_S)]
        http = ""
        if role == "kvstore":
            address = self.store
            flags = ["--dir", str(self.directory / "store"), "--budget-bytes", "1G"]
        elif role == "router":
            address, http = self.routers[int(number)], self.doors[int(number)]
            ledger = self.directory / f"ledger-{number}"
            flags = ["--model", str(MODEL), "--store-address", self.store, "--leases", "true", "--http-address", http]
            flags += ["--ledger-dir", str(ledger), "--store-dir", str(self.directory / "store")]
        else:
            address = f"127.0.0.1:{free_port()}"
            flags = ["--model", str(MODEL), "--store-address", self.store, "--store-dir", str(self.directory / "store")]
            flags += ["--routers", ",".join(self.routers), "--pool-bytes", "64M", "--threads", "1"]
            flags += ["--arithmetic-cache", str(self.directory / f"arithmetic-{tree.name}")]
        self.started += 1
        log = self.directory / f"{self.started:02}-{name}-{tree.name}.log"
        command = [sys.executable, "-m", "antefix_console", "serve", role, "--address", address, *flags, *common]
        path = os.pathsep.join([str(tree), *(str(tree / each) for each in SOURCE_ROOTS)])
        variables = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, cwd=self.directory, env=variables, stdout=subprocess.PIPE, stderr=out, stdin=subprocess.DEVNULL
            )
        found = Running(name=name, tree=tree, process=process, log=log, address=address, http=http)
        self.running[name] = found
        assert process.stdout is not None
        if not process.stdout.readline():
            raise AssertionError(f"{name} of {tree.name} did not start: {found.tail()}")
        return found

    def replace(self, name: str, tree: Path) -> None:
        """Replace a role. A worker's successor serves before the worker stops. A store or router has one address, so it
        stops first."""
        before = self.running[name]
        if name.startswith(("prefill", "decode")):
            self.start(name, tree)
            self.wait_for(self.running[name].address)
            before.stop()
        else:
            before.stop()
            self.start(name, tree)
        # At least one router is ready. A new one may have to wait for workers of its version.
        self._until(lambda: any(status_of(door, "/readyz") == 200 for door in self.doors), "no router is ready")

    def wait_for(self, worker: str) -> None:
        """Wait until a router has this worker.

        Routers of another version may have other names for KV, and refuse it.
        """
        self._until(lambda: any(worker in found for found in self._workers()), f"{worker} is not registered")

    def _workers(self) -> list[set[str]]:
        found = []
        for router in self.routers:
            with contextlib.suppress(AntefixError), BlockingRouterClient(router) as client:
                found.append({each.address for each in client.status().workers})
        return found or [set()]

    def wait_ready(self, door: str) -> None:
        self._until(lambda: status_of(door, "/readyz") == 200, f"{door} is not ready")

    def _until(self, holds: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + START_S
        while not holds():
            assert time.monotonic() < end, what
            time.sleep(0.1)

    def stop(self) -> None:
        for each in self.running.values():
            if each.process.poll() is None:
                each.process.kill()
        for each in self.running.values():
            each.process.wait(60)


def open_door(door: str, *, tls: ssl.SSLContext | None = None, timeout_s: float) -> http.client.HTTPConnection:
    """A client for a router's HTTP API, which is not connected yet."""
    if tls is None:
        return http.client.HTTPConnection(door, timeout=timeout_s)
    return http.client.HTTPSConnection(door, timeout=timeout_s, context=tls)


def status_of(door: str, path: str, *, tls: ssl.SSLContext | None = None) -> int:
    """The HTTP status of a path, or 0 if nothing answers."""
    connection = open_door(door, tls=tls, timeout_s=10)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()
