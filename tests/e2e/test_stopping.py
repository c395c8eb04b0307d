"""Stopping `antefix up` while a request runs: it says what it waits for, how the wait ended, and what it killed."""

import asyncio
import contextlib
import json
import signal
import sys

import pytest

from antefix_billing.ledger_files import read_settled
from antefix_billing.usage_record import Status
from antefix_console import deployment
from antefix_console.commands import up
from antefix_console.deployment import Deployment, DeploymentConfig, RoleProcess
from tests.e2e.conftest import MODEL
from tests.waiting import AT_MOST_S

httpx2 = pytest.importorskip("httpx2")


async def test_a_stream_that_outlives_the_grace_period_ends_properly_and_its_record_says_how(tmp_path):
    process = await asyncio.create_subprocess_exec(
        *(
            sys.executable,
            "-m",
            "antefix_console",
            "up",
            "--json",
            "--grace-s",
            "2",
            "--data-dir",
            str(tmp_path / "data"),
        ),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        ready = json.loads(await asyncio.wait_for(process.stdout.readline(), AT_MOST_S))
        # The likeliest continuation of this prompt repeats it and never ends.
        body = {"model": MODEL.name, "prompt": "a b " * 50, "max_tokens": 30_000, "temperature": 0, "stream": True}
        lines = []
        url = f"http://{ready['http_address']}/v1/completions"
        async with httpx2.AsyncClient(timeout=AT_MOST_S) as client, client.stream("POST", url, json=body) as answer:
            async for line in answer.aiter_lines():
                lines += [line] if line.startswith("data: ") else []
                if len(lines) == 3:
                    process.send_signal(signal.SIGTERM)
        _, said = await asyncio.wait_for(process.communicate(), AT_MOST_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    assert process.returncode == 0, said
    assert b"waiting for 1 running requests, 2 s at most" in said and said.endswith(b"stopped\n")
    assert "grace period" in json.loads(lines[-1][6:])["error"]["message"]
    (record,) = [item.record for item in read_settled(tmp_path / "data" / "ledger")]
    assert (record.status, record.detail) == (Status.FAILED, "Draining") and record.output_tokens >= 3


async def _deaf(tmp_path):
    """A role that ignores SIGTERM, and that SIGINT ends."""
    # SIGINT gets its default handler, because a shell that runs this test in the background makes children ignore it.
    program = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "signal.signal(signal.SIGINT, signal.SIG_DFL); print(flush=True); time.sleep(600)"
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", program), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    await process.stdout.readline()
    stubborn = Deployment(DeploymentConfig(model=MODEL, data_dir=tmp_path, grace_s=0.1))
    stubborn.processes.append(RoleProcess(role="kvstore", process=process, address="", log_path=tmp_path / "log"))
    return stubborn


async def test_what_does_not_stop_is_killed_and_up_exits_with_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(deployment, "STOP_MARGIN_S", 0.2)
    assert await up._stop(await _deaf(tmp_path)) == 1
    said = capsys.readouterr().err
    assert "did not stop and was killed" in said and "1 processes had to be killed" in said


async def test_it_says_what_it_waits_for_and_a_hurry_ends_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(deployment, "_TELL_EVERY_S", 0.1)
    # If it were not in a hurry, this would be the time until the role is killed, with exit code 1.
    monkeypatch.setattr(deployment, "STOP_MARGIN_S", AT_MOST_S)
    stubborn = await _deaf(tmp_path)
    asyncio.get_running_loop().call_later(0.5, stubborn.hurry)
    assert await up._stop(stubborn) == 0
    assert "waiting for kvstore (pid" in capsys.readouterr().err
