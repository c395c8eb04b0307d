"""Starts the roles of tests' deployments as forks of processes that have imported them (tests/role_fork_server.py).

Imports take 0.5 to 2.5 s of processor time per role, and tests start some hundred deployments. A start is replaced only
if a fork equals it: `Deployment`'s command line for a role, with all streams and an environment given, where a fork
server runs that was started in that environment and under the same limits. All other processes start as always, and so
do those of tests marked `whole_starts` or `impatient`.

`subprocess` makes all its processes with `_fork_exec`. It is no public function: a call of another shape than that of
the Pythons we know starts the process as always.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SERVER = Path(__file__).with_name("role_fork_server.py")
COMMAND = [sys.executable, "-P", "-m", "antefix_console", "serve"]
ROLES = ("kvstore", "prefill", "decode", "router")
PR_SET_CHILD_SUBREAPER = 36
LIMITS = [value for name, value in vars(resource).items() if name.startswith("RLIMIT_")]
# pytest writes the test's name there. No role reads it.
OF_ONE_TEST = b"PYTEST_CURRENT_TEST="


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleStart:
    """What `subprocess` was asked to start.

    streams: stdin, stdout, stderr, and the pipe that `subprocess` reads until the process has set itself up.
    """

    args: list[str]
    environment: tuple[bytes, ...]
    streams: list[int]

    @property
    def role(self) -> str:
        return self.args[len(COMMAND)]

    @classmethod
    def of(cls, call: Sequence[Any]) -> RoleStart | None:
        """None: the call starts something else, or in a way that a fork does not equal."""
        match call:
            case (
                args, _, True, (failure,), None, list(environment), stdin, _, _, stdout, _, stderr, _, failure_too,
                True, True, -1, None, None, None, -1, None, *_,
            ) if failure == failure_too and min(stdin, stdout, stderr) >= 0:  # fmt: skip
                args = [os.fsdecode(arg) for arg in args]
            case _:
                return None
        if args[:-1][: len(COMMAND)] != COMMAND or args[len(COMMAND)] not in ROLES:
            return None
        kept = tuple(sorted(pair for pair in environment if not pair.startswith(OF_ONE_TEST)))
        return cls(args=args, environment=kept, streams=[stdin, stdout, stderr, failure])

    def surroundings(self) -> object:
        """What the role inherits from this process."""
        ignored = [each for each in signal.valid_signals() if signal.getsignal(each) == signal.SIG_IGN]
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        limits = [resource.getrlimit(limit) for limit in LIMITS]
        cores, priority = sorted(os.sched_getaffinity(0)), os.getpriority(os.PRIO_PROCESS, 0)
        return repr((self.environment, sorted(ignored), sorted(blocked), limits, cores, priority, os.getresuid()))


class ForkServer:
    """A process that starts one role by forking."""

    def __init__(self, start: RoleStart) -> None:
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", SERVER, str(theirs.fileno()), start.role],
                env=dict(pair.split(b"=", 1) for pair in start.environment),
                pass_fds=[theirs.fileno()],
                # Pipes, as a role's own: Python looks when it starts whether they can seek.
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
            )
        self._is_ready = False
        self._lock = threading.Lock()

    def start(self, start: RoleStart) -> int | None:
        """The new process's id. None: this server cannot fork."""
        os.umask(umask := os.umask(0o077))
        request = json.dumps({"args": start.args, "cwd": str(Path.cwd()), "umask": umask}).encode()
        with self._lock, contextlib.suppress(OSError):
            try:
                self._is_ready = self._is_ready or self._requests.recv(32) == b"ready"
                if self._is_ready:
                    with _adopting():
                        socket.send_fds(self._requests, [request], start.streams)
                        pid = int(self._requests.recv(32) or 0)
                    return pid if pid and _is_own(pid) else None
            except BaseException:
                # A test that was ended meanwhile: the next one must not be given this one's process.
                self._requests.close()
                raise
        return None

    def close(self) -> None:
        self._requests.close()
        self._process.communicate()


class RoleForks:
    """Starts the roles of this process's tests.  are_used: whether those of the present test may be forks."""

    def __init__(self) -> None:
        self.are_used = True
        self._start_plainly = getattr(subprocess, "_fork_exec", None)
        # By role and surroundings. None: seen once.
        self._servers: dict[tuple[str, object], ForkServer | None] = {}

    def install(self) -> None:
        # Other systems have no subreapers.
        if sys.platform == "linux" and self._start_plainly is not None:
            subprocess._fork_exec = self.fork_exec

    def close(self) -> None:
        if self._start_plainly is not None:
            subprocess._fork_exec = self._start_plainly
        for server in self._servers.values():
            if server is not None:
                server.close()
        self._servers.clear()

    def fork_exec(self, *call: Any) -> int:
        """Start a process, in place of `subprocess._fork_exec`. Returns its id."""
        if self.are_used and (start := RoleStart.of(call)) and (server := self._server_of(start)):
            if pid := server.start(start):
                return pid
            warnings.warn("roles cannot be forked here: each start imports everything", stacklevel=2)
            subprocess._fork_exec = self._start_plainly
        return self._start_plainly(*call)

    def _server_of(self, start: RoleStart) -> ForkServer | None:
        """None: the surroundings are seen for the first time, and mostly only one test has them."""
        key = start.role, start.surroundings()
        if key not in self._servers and any(role == start.role for role, _ in self._servers):
            self._servers[key] = None
        elif self._servers.get(key) is None:
            self._close_second(start.role)
            self._servers[key] = ForkServer(start)
        return self._servers[key]

    def _close_second(self, role: str) -> None:
        """A role has two servers at most, as one takes up to 250 MB. Most tests need the first."""
        of_role = [key for key, server in self._servers.items() if key[0] == role and server is not None]
        for key in of_role[1:]:
            if (server := self._servers.pop(key)) is not None:
                server.close()


@contextlib.contextmanager
def _adopting() -> Iterator[None]:
    """For this time, a process below this one becomes this one's child when its parent ends."""
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def _is_own(pid: int) -> bool:
    """Whether this process can wait for that one. If not, the other one is ended."""
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        os.kill(pid, signal.SIGKILL)
        return False
    return True
