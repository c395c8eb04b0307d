"""A role that dies is restarted after a pause. A role that keeps dying is given up with an error."""

import asyncio
import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from antefix.errors import ConfigError
from antefix_console.commands.up import _say
from antefix_console.entry import hear_signals, main
from antefix_console.orphans import reap
from antefix_console.supervise import HEALTHY_S, NUM_DEATHS_MAX, PAUSE_S_MAX, Deaths, GaveUp, Supervisor
from tests.waiting import AT_MOST_S


class Clock:
    def __init__(self):
        self.now = 0.0
        self.slept = []

    def __call__(self):
        return self.now

    async def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)


class Process:
    """A process that lives for `lives_s` seconds of the test's clock."""

    def __init__(self, clock, lives_s, pid):
        self.clock, self.lives_s, self.pid = clock, lives_s, pid

    async def wait(self):
        if self.lives_s is None:
            await asyncio.Event().wait()
        self.clock.now += self.lives_s
        return -9


class Fleet:
    """A deployment of one role.  lives: seconds that each process lives; an exception is a start that fails."""

    def __init__(self, clock, *lives):
        self.clock, self.lives = clock, list(lives)
        self.processes = [self._next()]
        self.restarted = []

    def _next(self):
        life = self.lives.pop(0)
        if isinstance(life, Exception):
            raise life
        return SimpleNamespace(
            role="decode", process=Process(self.clock, life, 1), address="127.0.0.1:7", log_path=Path("decode-1.log")
        )

    async def restart(self, dead):
        self.restarted.append(dead.address)
        return self._next()


async def supervised(*lives):
    clock, told = Clock(), []
    fleet = Fleet(clock, *lives)
    supervisor = Supervisor(fleet, told.append, clock=clock, sleep=clock.sleep)
    task = asyncio.create_task(supervisor.run())
    for _ in range(400):
        await asyncio.sleep(0)
        if task.done():
            break
    return supervisor, fleet, clock, told, task


async def test_what_dies_is_started_again_at_its_address_with_growing_pauses():
    supervisor, fleet, clock, told, task = await supervised(1, 1, 1, None)
    assert not task.done() and supervisor.num_restarts == 3
    assert fleet.restarted == ["127.0.0.1:7"] * 3 and clock.slept == [0.5, 1.0, 2.0]
    assert "decode ended with -9" in told[0] and "decode-1.log" in told[0] and "serves again" in told[1]
    task.cancel()


async def test_a_start_that_fails_counts_and_is_tried_again():
    supervisor, _, clock, told, task = await supervised(1, ConfigError("port in use"), ConfigError("port in use"), None)
    assert supervisor.num_restarts == 1 and clock.slept == [0.5, 1.0, 2.0]
    assert any("decode did not start: port in use" in line for line in told)
    task.cancel()


async def test_a_start_that_was_killed_says_so_once():
    _, _, _, told, task = await supervised(1, ConfigError("decode did not start (it ended with -9): measuring"), None)
    assert any(line.startswith("decode did not start (it ended with -9): measuring; it is") for line in told)
    task.cancel()


async def test_what_lived_for_a_while_begins_anew():
    supervisor, _, clock, _, task = await supervised(*[HEALTHY_S + 1] * 20, None)
    assert not task.done() and supervisor.num_restarts == 20 and set(clock.slept) == {0.5}
    task.cancel()


async def test_what_dies_again_and_again_is_given_up():
    _, _, _, _, task = await supervised(*[1] * 20)
    with pytest.raises(GaveUp, match=r"decode died 7 times in a row.*decode-1.log"):
        await task


def test_pauses_have_an_end():
    deaths = Deaths()
    pauses = [deaths.note(0.0) for _ in range(NUM_DEATHS_MAX)]
    assert pauses[-1] is None and max(pauses[:-1]) <= PAUSE_S_MAX
    assert pauses[:-1] == sorted(pauses[:-1])


@pytest.mark.parametrize(("args", "ignored"), [(["up"], True), (["serve", "router"], True), (["fsck"], False)])
def test_a_hang_up_ends_no_service(args, ignored):
    before = signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        hear_signals(args)
        assert (signal.getsignal(signal.SIGHUP) is signal.SIG_IGN) is ignored
    finally:
        signal.signal(signal.SIGHUP, before)


def test_signals_that_were_blocked_or_ignored_before_us_are_heard():
    heard, before = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD}, signal.getsignal(signal.SIGHUP)
    mask, child = signal.pthread_sigmask(signal.SIG_BLOCK, heard), signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        hear_signals(["up"])
        assert not heard & signal.pthread_sigmask(signal.SIG_BLOCK, ())
        assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGCHLD, child)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGHUP, before)


@pytest.mark.services
def test_orphans_are_reaped_and_own_children_left_to_their_own():
    """Runs in a separate process, which adopts orphans as PID 1 does (prctl PR_SET_CHILD_SUBREAPER)."""
    script = """
import ctypes, os, time
from antefix_console.orphans import reap
ctypes.CDLL(None).prctl(36, 1)
if (child := os.fork()) == 0:
    for _ in range(3):
        if os.fork() == 0:
            time.sleep(0.2)
            os._exit(0)
    os._exit(0)
os.waitpid(child, 0)
own = os.fork()
if own == 0:
    time.sleep(0.6)
    os._exit(7)
num, until = 0, time.monotonic() + 30
while num < 3 and time.monotonic() < until:
    num += reap({own})
    time.sleep(0.05)
while time.monotonic() < until and os.waitid(os.P_PID, own, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
    num += reap({own})
    time.sleep(0.05)
num += reap({own})
print(num, os.waitpid(own, 0)[1] >> 8)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=AT_MOST_S, check=True)
    assert done.stdout.split() == ["3", "7"]


def test_without_children_there_is_nothing_to_reap(monkeypatch):
    def no_child(*_):
        raise ChildProcessError

    # The test's own process may have children that other tests wait for.
    monkeypatch.setattr(os, "waitid", no_child)
    with pytest.raises(ChildProcessError):
        reap(())


def test_a_service_in_a_directory_that_is_gone_says_so(tmp_path, monkeypatch, capsys):
    (gone := tmp_path / "gone").mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    monkeypatch.setattr(sys, "argv", ["antefix", "up"])
    before = signal.getsignal(signal.SIGHUP)
    try:
        assert main() == 2
    finally:
        signal.signal(signal.SIGHUP, before)
    assert "is gone" in capsys.readouterr().err


def test_a_full_disk_behind_the_output_stops_nobody():
    full = Path("/dev/full").open("w")  # noqa: SIM115 - its own end fails, and only that may
    _say("ready", full)
    _say("again", full)
    with pytest.raises(OSError, match="No space"):
        full.close()
    closed = io.StringIO()
    closed.close()
    _say("ready", closed)
    _say("ready", None)
