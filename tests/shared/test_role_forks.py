"""A role that a test starts is a fork of a process that has its imports. Such a role is as one that starts plainly."""

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import role_forks as forks
from tests.role_forks import COMMAND, RoleForks, RoleStart
from tests.waiting import wait_until

# What a process takes over from the one that starts it.
INHERITED = r"(Umask|Uid|Gid|Groups|NoNewPrivs|Seccomp|Cpus_allowed|SigBlk|SigIgn|SigCgt|CapEff):"
pytestmark = pytest.mark.services


@pytest.fixture
def start(tmp_path, monkeypatch):
    """start(is_fork) -> a store that serves. Its environment has a fork server of its own."""
    monkeypatch.chdir(tmp_path)
    started = []
    role_forks = RoleForks()
    role_forks.install()

    def start(*, is_fork):
        role_forks.are_used = is_fork
        directory = tmp_path / f"store-{len(started)}"
        command = [*COMMAND, "kvstore", "--watch-stdin", "--dir", str(directory), "--address", "127.0.0.1:0"]
        with (tmp_path / "log").open("a") as log:
            streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
            started.append(subprocess.Popen(command, **streams, env={**os.environ}, start_new_session=True, text=True))
        assert json.loads(started[-1].stdout.readline())["address"], (tmp_path / "log").read_text()
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.__exit__(None, None, None)
    role_forks.close()


def looks(pid):
    """What the system says of a process."""
    process = Path(f"/proc/{pid}")
    environment = {each for each in (process / "environ").read_bytes().split(b"\0") if b"PYTEST_CURRENT" not in each}
    return {
        "environment": environment,
        "inherited": [each for each in (process / "status").read_text().splitlines() if re.match(INHERITED, each)],
        "limits": (process / "limits").read_text(),
        "directory": (process / "cwd").readlink(),
        "streams": [re.sub(r"\d+", "", str((process / f"fd/{fd}").readlink())) for fd in range(3)],
        "files": len(list((process / "fd").iterdir())),
        "is_leader": os.getsid(pid) == os.getpgid(pid) == pid,
        "parent": re.search(r"PPid:\s*(\d+)", (process / "status").read_text())[1],
        "name": (process / "comm").read_text(),
    }


@pytest.mark.whole_starts  # switches off the forks of the other tests
def test_a_forked_role_looks_and_ends_as_one_that_starts_plainly(start):
    fork, plain = start(is_fork=True), start(is_fork=False)
    if str(forks.SERVER) not in Path(f"/proc/{fork.pid}/cmdline").read_text():
        pytest.skip("this system cannot fork roles; a warning says so")
    # A service's background work opens and closes files of its own.
    with contextlib.suppress(AssertionError):
        wait_until(lambda: looks(fork.pid) == looks(plain.pid))
    assert looks(fork.pid) == looks(plain.pid)
    fork.stdin.close()
    plain.terminate()
    assert (fork.wait(), plain.wait()) == (0, 0)


ROLE = [*COMMAND, "decode", "--model", "x"]
PIPES = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
STARTED = {**PIPES, "env": {"A": "1"}, "start_new_session": True}


@pytest.mark.parametrize(
    ("command", "changes"),
    [
        ([*COMMAND, "fleet"], {}),
        (COMMAND, {}),
        ([sys.executable, "-m", "antefix_console", "serve", "decode"], {}),
        (ROLE, {"env": None}),
        (ROLE, {"stdin": None}),
        (ROLE, {"stderr": None}),
        (ROLE, {"start_new_session": False}),
        (ROLE, {"cwd": "/"}),
        (ROLE, {"umask": 0o22}),
        (ROLE, {"pass_fds": [0]}),
        (ROLE, {"close_fds": False}),
        (ROLE, {"restore_signals": False}),
        (ROLE, {"preexec_fn": int}),
        (ROLE, {"process_group": 0}),
        (ROLE, {"user": os.getuid()}),
    ],
)
def test_other_starts_are_left_alone(command, changes, monkeypatch):
    understood = []

    def note(*call):
        understood.append(RoleStart.of(call))
        raise ChildProcessError

    monkeypatch.setattr(subprocess, "_fork_exec", note)
    # Python 3.13 starts some processes with posix_spawn, which this file does not replace.
    monkeypatch.setattr(subprocess, "_USE_POSIX_SPAWN", False)
    for asked, more in ((ROLE, {}), (command, changes)):
        with pytest.raises(ChildProcessError):
            subprocess.Popen(asked, **STARTED | more)
    assert understood[0].role == "decode"
    assert understood[1] is None


def test_surroundings_that_only_one_test_has_get_no_server(monkeypatch):
    made, closed = [], []

    class Server:
        def __init__(self, start):
            self.environment = start.environment[0]
            made.append(self.environment)

        def close(self):
            closed.append(self.environment)

    monkeypatch.setattr(forks, "ForkServer", Server)
    role_forks = RoleForks()

    def servers(role, *environments):
        starts = [RoleStart(args=[*COMMAND, role], environment=(each,), streams=[]) for each in environments]
        return [role_forks._server_of(start) is not None for start in starts]

    assert servers("decode", b"A=1", b"A=1") == [True, True]
    assert servers("prefill", b"A=1") == [True]
    assert servers("decode", b"A=2", b"A=3", b"A=2", b"A=1") == [False, False, True, True]
    with monkeypatch.context() as limited:
        limited.setattr(forks, "LIMITS", forks.LIMITS[1:])
        assert servers("decode", b"A=1") == [False]
    assert (made, closed) == ([b"A=1", b"A=1", b"A=2"], [])
    # A second environment's server makes room for the next one's, the first stays.
    assert servers("decode", b"A=3", b"A=1", b"A=2") == [True, True, False]
    assert closed == [b"A=2"]


def test_a_server_that_cannot_fork_leaves_the_start_to_python(monkeypatch):
    monkeypatch.setattr(forks, "ForkServer", lambda start: type("", (), {"start": lambda *_: None}))
    role_forks = RoleForks()
    monkeypatch.setattr(role_forks, "_start_plainly", lambda *call: ("plain", call))
    monkeypatch.setattr(subprocess, "_fork_exec", role_forks.fork_exec)
    call = (ROLE, [], True, (9,), None, [b"A=1"], 3, -1, -1, 4, -1, 5, 8, 9, True, True, -1, *[None] * 3, -1, None)
    with pytest.warns(UserWarning, match="cannot be forked"):
        assert role_forks.fork_exec(*call)[0] == "plain"
    assert subprocess._fork_exec is role_forks._start_plainly
