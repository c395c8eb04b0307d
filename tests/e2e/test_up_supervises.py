"""`antefix up` as operators run it: dead roles are restarted, SIGHUP changes nothing, and a stop stops everything."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import httpx2
import pytest

from tests.waiting import AT_MOST_S, until

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
    async with asyncio.timeout(AT_MOST_S):
        while line := (await stream.readline()).decode():
            if text in line:
                return line
    pytest.fail(f"it never said {text!r}")


async def test_roles_that_die_come_back_and_hang_ups_change_nothing(tmp_path):
    async with up(*command(tmp_path / "data")) as process, asyncio.timeout(2 * AT_MOST_S):
        ready = json.loads(await line_with(process.stdout, '"ready"'))
        pids = {each["role"]: each["pid"] for each in ready["processes"]}
        for pid in (*pids.values(), process.pid):
            os.kill(pid, signal.SIGHUP)
        async with httpx2.AsyncClient(base_url=f"http://{ready['http_address']}", timeout=AT_MOST_S) as client:
            assert (await client.get("/readyz")).status_code == 200
            assert (await client.post("/v1/chat/completions", json=BODY)).status_code == 200
            os.kill(pids["decode"], signal.SIGKILL)
            assert "ended with -9" in await line_with(process.stderr, "decode ended")
            serves_again = asyncio.create_task(line_with(process.stderr, "decode serves again"))

            # A look that comes after the new start sees nothing of the old worker's end.
            async def unready_or_back():
                answer = await client.get("/readyz")
                return answer if answer.status_code != 200 or serves_again.done() else None

            unready = await until(unready_or_back)
            if unready.status_code != 200:
                assert unready.json()["reason"] == "no decode worker answers"
            assert (await client.get("/livez")).status_code == 200
            await serves_again

            async def is_ready():
                return (await client.get("/readyz")).status_code == 200

            await until(is_ready)
            assert (await client.post("/v1/chat/completions", json=BODY)).status_code == 200
            os.kill(pids["router"], signal.SIGKILL)
            await line_with(process.stderr, "router serves again")
            await until(is_ready, despite=httpx2.TransportError)
            answer = await client.post("/v1/chat/completions", json=BODY)
            assert answer.status_code == 200, "at the same address"
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0


async def test_a_stop_while_starting_is_a_stop(tmp_path):
    async with up(*command(tmp_path / "data")) as process:
        await line_with(process.stderr, "starting services")
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(AT_MOST_S):
            assert await process.wait() == 0
        # If all roles had started, this would be printed.
        assert b"ready" not in await process.stdout.read()


@needs_pid_namespace
async def test_as_pid_1_an_early_stop_counts(tmp_path):
    async with up(*IN_A_PID_NAMESPACE, *command(tmp_path / "data")) as process, asyncio.timeout(AT_MOST_S):
        # Send the signal as soon as the process handles signals, which is while it still imports.
        pid_1 = await until(lambda: next((each for each in children(process.pid) if hears_sigterm(each)), None))
        os.kill(pid_1, signal.SIGTERM)
        # The exit code that shells use for SIGTERM; 0 if the program's own loop is already running.
        assert await process.wait() in (0, 128 + signal.SIGTERM)
        assert b"ready" not in await process.stdout.read()


@needs_pid_namespace
async def test_as_pid_1_orphans_are_reaped_and_a_stop_is_a_clean_end(tmp_path):
    async with up(*IN_A_PID_NAMESPACE, *command(tmp_path / "data")) as process, asyncio.timeout(2 * AT_MOST_S):
        await line_with(process.stdout, '"ready"')
        (pid_1,) = children(process.pid)
        # Make an orphan: its parent, in the namespace, ends first.
        orphan = await asyncio.create_subprocess_exec(
            *("nsenter", "--target", str(pid_1), "--pid", "sh", "-c", "(sleep 0.3 &) ; exit 0")
        )
        await orphan.wait()
        await until(lambda: not any(each in states(pid_1) for each in ("(zombie)", "Name:\tsleep\n")))
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
