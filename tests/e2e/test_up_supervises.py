"""`antefix up` as operators run it: dead roles are restarted, SIGHUP changes nothing, and a stop stops everything."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import httpx2
import pytest

pytestmark = pytest.mark.services

needs_pid_namespace = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("unshare"), reason="needs root, for a namespace of PIDs"
)
IN_A_PID_NAMESPACE = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")

BODY = {"model": "antefix-tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "seed": 1}


def command(directory):
    flags = ("--json", "--data-dir", str(directory))
    return [sys.executable, "-m", "antefix_console", "up", *flags]


@contextlib.asynccontextmanager
async def up(*argv):
    process = await asyncio.create_subprocess_exec(
        *argv, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def line_with(stream, text):
    async with asyncio.timeout(300):
        while line := (await stream.readline()).decode():
            if text in line:
                return line
    pytest.fail(f"it never said {text!r}")


async def test_roles_that_die_come_back_and_hang_ups_change_nothing(tmp_path):
    async with up(*command(tmp_path / "data")) as process, asyncio.timeout(600):
        ready = json.loads(await line_with(process.stdout, '"ready"'))
        pids = {each["role"]: each["pid"] for each in ready["processes"]}
        for pid in (*pids.values(), process.pid):
            os.kill(pid, signal.SIGHUP)
        async with httpx2.AsyncClient(base_url=f"http://{ready['http_address']}", timeout=100) as client:
            assert (await client.get("/readyz")).status_code == 200
            assert (await client.post("/v1/chat/completions", json=BODY)).status_code == 200
            os.kill(pids["decode"], signal.SIGKILL)
            assert "ended with -9" in await line_with(process.stderr, "decode ended")
            serves_again = asyncio.create_task(line_with(process.stderr, "decode serves again"))
            # A look that comes after the new start sees nothing of the old worker's end.
            while (unready := await client.get("/readyz")).status_code == 200 and not serves_again.done():  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            if unready.status_code != 200:
                assert unready.json()["reason"] == "no decode worker answers"
            assert (await client.get("/livez")).status_code == 200
            await serves_again
            while (await client.get("/readyz")).status_code != 200:  # noqa: ASYNC110 - of another process
                await asyncio.sleep(0.1)
            assert (await client.post("/v1/chat/completions", json=BODY)).status_code == 200
            os.kill(pids["router"], signal.SIGKILL)
            await line_with(process.stderr, "router serves again")
            answer = await client.post("/v1/chat/completions", json=BODY)
            assert answer.status_code == 200, "at the same address"
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0


async def test_a_stop_while_starting_is_a_stop(tmp_path):
    async with up(*command(tmp_path / "data")) as process:
        await line_with(process.stderr, "starting services")
        begun = time.monotonic()
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(200):
            assert await process.wait() == 0
        # Ten times the usual time. Starting all roles would take longer on a busy machine, and would print "ready".
        assert time.monotonic() - begun < 50
        assert b"ready" not in await process.stdout.read()


@needs_pid_namespace
async def test_as_pid_1_an_early_stop_counts(tmp_path):
    async with up(*IN_A_PID_NAMESPACE, *command(tmp_path / "data")) as process, asyncio.timeout(300):
        # Send the signal as soon as the process handles signals, which is while it still imports.
        while not (found := children(process.pid)) or not hears_sigterm(found[0]):  # noqa: ASYNC110 - of another process
            await asyncio.sleep(0.005)
        os.kill(found[0], signal.SIGTERM)
        # The exit code that shells use for SIGTERM; 0 if the program's own loop is already running.
        assert await process.wait() in (0, 128 + signal.SIGTERM)
        assert b"ready" not in await process.stdout.read()


@needs_pid_namespace
async def test_as_pid_1_orphans_are_reaped_and_a_stop_is_a_clean_end(tmp_path):
    async with up(*IN_A_PID_NAMESPACE, *command(tmp_path / "data")) as process, asyncio.timeout(600):
        await line_with(process.stdout, '"ready"')
        (pid_1,) = children(process.pid)
        # Make an orphan: its parent, in the namespace, ends first.
        orphan = await asyncio.create_subprocess_exec(
            *("nsenter", "--target", str(pid_1), "--pid", "sh", "-c", "(sleep 0.3 &) ; exit 0")
        )
        await orphan.wait()
        while "(zombie)" in states(pid_1) or "Name:\tsleep\n" in states(pid_1):  # noqa: ASYNC110 - of other processes
            await asyncio.sleep(0.2)
        os.kill(pid_1, signal.SIGTERM)
        # `unshare` ends with PID 1's exit code.
        assert await process.wait() == 0


def hears_sigterm(pid):
    """Whether the process handles SIGTERM. Without a handler, the kernel drops signals to PID 1."""
    caught = Path(f"/proc/{pid}/status").read_text().partition("SigCgt:")[2].split()[0]
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def states(pid_1):
    """Names and states of PID 1's children."""
    found = []
    for child in children(pid_1):
        with contextlib.suppress(FileNotFoundError):
            found.append(Path(f"/proc/{child}/status").read_text())
    return " ".join(found)
