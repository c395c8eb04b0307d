"""A fleet in network namespaces, one host per process, found only by DNS names. Roles join, leave, die and are
upgraded.

Every host has its own name and its role's name, which all hosts of that role share (`prefill.fleet.test`). Names are in
/etc/netns/HOST/hosts. That file is changed in place, so that running processes see the change as with a name server.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.upgrade.versions import MODEL, ROOT, SOURCE_ROOTS

PREFIX = "afr-"
NETWORK = "10.78.0"
PORTS = {"kvstore": 7001, "prefill": 7002, "decode": 7002, "router": 7000}
HTTP_PORT = 8000
START_S = 300.0
GRACE_S = 60


def make(*command: object) -> None:
    subprocess.run(list(map(str, command)), check=True, capture_output=True)


def environment_of(tree: Path) -> dict[str, str]:
    path = os.pathsep.join([str(tree), *(str(tree / each) for each in SOURCE_ROOTS)])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


@dataclass(slots=True)
class Host:
    """One namespace with one process of a role.  name: for example prefill-2."""

    name: str
    number: int
    tree: Path
    process: subprocess.Popen[bytes] | None = None
    log: Path = Path()

    @property
    def role(self) -> str:
        return self.name.partition("-")[0]

    @property
    def address(self) -> str:
        return f"{NETWORK}.{self.number}"

    @property
    def namespace(self) -> str:
        return f"{PREFIX}{self.name}"


@dataclass(slots=True)
class RollingFleet:
    directory: Path
    hosts: dict[str, Host] = field(default_factory=dict)
    num_hosts: int = 0
    num_started: int = 0

    # --- the network ---------------------------------------------------------------------------------------------

    def lay(self) -> None:
        """Make the switch, the client's host, and the deployment's secrets."""
        make("ip", "netns", "add", f"{PREFIX}switch")
        self._on_switch("ip", "link", "add", "br0", "type", "bridge")
        self._on_switch("ip", "link", "set", "br0", "up")
        self._plug("client", 250)
        self._antefix("certs", "init", self.directory / "ca")
        self._antefix("secret", "create", self.directory / "secret")
        keys = self.directory / "api-keys.json"
        self._antefix("keys", "create", "acme", "--file", keys, "--output", self.directory / "api.key")

    def close(self) -> None:
        for host in self.hosts.values():
            if host.process is not None and host.process.poll() is None:
                host.process.kill()
                host.process.wait(60)
        for name in (*self.hosts, "client", "switch"):
            subprocess.run(["ip", "netns", "delete", f"{PREFIX}{name}"], capture_output=True, check=False)
            for file in Path(f"/etc/netns/{PREFIX}{name}").glob("*"):
                file.unlink()
            with contextlib.suppress(OSError):
                Path(f"/etc/netns/{PREFIX}{name}").rmdir()

    def _plug(self, name: str, number: int) -> None:
        namespace = f"{PREFIX}{name}"
        make("ip", "netns", "add", namespace)
        names = Path(f"/etc/netns/{namespace}")
        names.mkdir(parents=True, exist_ok=True)
        (names / "hosts").write_text("127.0.0.1 localhost\n")
        port = f"p{number}"
        self._on_switch("ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        self._on_switch("ip", "link", "set", port, "master", "br0", "up")
        inside = ("ip", "netns", "exec", namespace, "ip")
        make(*inside, "address", "add", f"{NETWORK}.{number}/24", "dev", "eth0")
        make(*inside, "link", "set", "eth0", "up")
        make(*inside, "link", "set", "lo", "up")

    def _on_switch(self, *command: object) -> None:
        make("ip", "netns", "exec", f"{PREFIX}switch", *command)

    def _tell_names(self, *, without: str = "") -> None:
        """Tell every host the names of all hosts, and the names of their roles."""
        there = [host for host in self.hosts.values() if host.name != without]
        lines = [f"{host.address} {host.name}.fleet.test {host.role}.fleet.test\n" for host in there]
        for name in (*self.hosts, "client"):
            Path(f"/etc/netns/{PREFIX}{name}/hosts").write_text("127.0.0.1 localhost\n" + "".join(lines))

    # --- roles ---------------------------------------------------------------------------------------------------

    @property
    def doors(self) -> list[str]:
        return [f"{host.name}.fleet.test:{HTTP_PORT}" for host in self.hosts.values() if host.role == "router"]

    def add(self, name: str, tree: Path) -> Host:
        """Add a host with a role. Its name is published only when it serves."""
        self.num_hosts += 1
        host = self.hosts[name] = Host(name=name, number=self.num_hosts, tree=tree)
        self._plug(name, host.number)
        certificate = self.directory / "credentials" / name
        issue = ("certs", "issue", host.role, name, "--ca", self.directory / "ca", "--out", certificate)
        self._antefix(*issue, "--host", f"{name}.fleet.test", "--host", host.address)
        self._tell_names(without=name)
        self.start(name)
        self._tell_names()
        return host

    def start(self, name: str, tree: Path | None = None) -> None:
        """Start the host's process with this version, and wait until it serves."""
        host = self.hosts[name]
        host.tree = tree or host.tree
        self.num_started += 1
        host.log = self.directory / f"{self.num_started:02}-{name}-{host.tree.name}.log"
        inside = ("ip", "netns", "exec", host.namespace)
        command = [*inside, sys.executable, "-m", "antefix_console", "serve", host.role, *self._flags(host)]
        with host.log.open("wb") as out:
            host.process = subprocess.Popen(
                command,
                cwd=self.directory,
                env=environment_of(host.tree),
                stdout=subprocess.PIPE,
                stderr=out,
                stdin=subprocess.DEVNULL,
            )
        assert host.process.stdout is not None
        if not host.process.stdout.readline():
            raise AssertionError(f"{name} did not start: {host.log.read_text(errors='replace')[-3000:]}")

    def stop(self, name: str, *, kill: bool = False) -> None:
        """Stop the process as a supervisor does: signal it, and wait until it has drained."""
        host = self.hosts[name]
        assert host.process is not None
        host.process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
        status = host.process.wait(GRACE_S + 60)
        assert kill or status == 0, f"{name} ended with {status}: {host.log.read_text(errors='replace')[-3000:]}"

    def replace(self, name: str, tree: Path) -> None:
        """Replace a process by another version. A worker's successor serves on a new host before the old worker stops.

        Stores and routers keep their data on their host, so the old process stops first.
        """
        if name.startswith(("prefill", "decode")):
            self.add(f"{name}-next", tree)
            self.remove(name)
        else:
            self.stop(name)
            self.start(name, tree)

    def remove(self, name: str) -> None:
        """Remove a host: first its name, as a name server does, then its process."""
        self._tell_names(without=name)
        self.stop(name)
        host = self.hosts.pop(name)
        make("ip", "netns", "delete", host.namespace)

    def drain_store(self, name: str, *to: str) -> None:
        """Move a store's useful records to the stores that stay, as an operator does before removing a store."""
        certificate = self.directory / "credentials" / "operator"
        if not certificate.exists():
            self._antefix("certs", "issue", "operator", "me", "--ca", self.directory / "ca", "--out", certificate)
        stays = [f"{each}.fleet.test:{PORTS['kvstore']}" for each in to]
        inside = ["ip", "netns", "exec", f"{PREFIX}client", sys.executable, "-m", "antefix_console", "drain"]
        secret = ["--secret-file", str(self.directory / "secret")]
        variables = environment_of(ROOT) | {"ANTEFIX_CREDENTIALS": str(certificate)}
        where = f"{name}.fleet.test:{PORTS['kvstore']}"
        done = subprocess.run(
            [*inside, where, "--to", *stays, *secret], env=variables, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def ledgers(self) -> list[str]:
        return sorted(str(path) for path in self.directory.glob("ledger-*"))

    def _flags(self, host: Host) -> list[str]:
        flags = ["--address", f"0.0.0.0:{PORTS[host.role]}", "--grace-s", GRACE_S]
        flags += ["--credentials", self.directory / "credentials" / host.name]
        flags += ["--secret-file", self.directory / "secret"]
        if host.role == "kvstore":
            flags += ["--dir", self.directory / f"store-{host.name}", "--budget-bytes", "1G"]
            return list(map(str, flags))
        flags += ["--model", MODEL, "--stores", f"dns:kvstore.fleet.test:{PORTS['kvstore']}"]
        if host.role == "router":
            for role in ("prefill", "decode"):
                flags += [f"--{role}", f"dns:{role}.fleet.test:{PORTS[role]}"]
            flags += ["--http-address", f"0.0.0.0:{HTTP_PORT}", "--ledger-dir", self.directory / f"ledger-{host.name}"]
            flags += ["--api-keys-file", self.directory / "api-keys.json"]
        else:
            flags += ["--advertise", host.address, "--pool-bytes", "64M", "--threads", 1]
            flags += ["--arithmetic-cache", self.directory / f"arithmetic-{host.tree.name}"]
        return list(map(str, flags))

    def _antefix(self, *command: object) -> None:
        run = [sys.executable, "-m", "antefix_console", *map(str, command)]
        done = subprocess.run(run, env=environment_of(ROOT), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    # --- the client ----------------------------------------------------------------------------------------------

    def client(self) -> Client:
        authority = self.directory / "credentials" / next(iter(self.hosts)) / "ca.crt"
        inside = ["ip", "netns", "exec", f"{PREFIX}client", sys.executable, "-m", "tests.hosts.talking"]
        command = [*inside, "--ca", str(authority), "--key", str(self.directory / "api.key"), *self.doors]
        return Client(subprocess.Popen(command, cwd=ROOT, env=environment_of(ROOT), stdin=-1, stdout=-1, text=True))


@dataclass(slots=True)
class Client:
    """Continuing conversations, which run on their own host (`tests/hosts/talking.py`)."""

    process: subprocess.Popen[str]

    def tell(self, **command: object) -> dict[str, Any]:
        """Send a command. Returns the client's state: rounds, failed, wrong, cached, sent."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "the client has ended"
        return dict(json.loads(line))

    def until(self, holds: Callable[[dict[str, Any]], bool], what: str, *, within_s: float = START_S) -> dict[str, Any]:
        """Wait until the condition holds. Raises if a request fails or the time runs out."""
        end = time.monotonic() + within_s
        while True:
            said = self.tell()
            assert not said["failed"], (what, said["failed"])
            assert not said["wrong"], (what, said["wrong"])
            if holds(said):
                return said
            assert time.monotonic() < end, (what, said["cached"])
            time.sleep(0.2)

    def close(self) -> None:
        self.process.kill()
        self.process.wait(60)
