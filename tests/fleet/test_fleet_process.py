"""`antefix serve fleet` as users start it: a process with two workers serves a request, bills it, and ends cleanly."""

import asyncio
import json
import signal
import sys

import httpx
import pytest

from antefix_billing.ledger_files import read_settled
from tests.child_environment import child_environment
from tests.fleet.standin import MODEL, Standin
from tests.waiting import AT_MOST_S, until

LONG = "The quick brown fox jumps over the lazy dog. " * 20


@pytest.mark.services
async def test_a_fleet_is_served_from_the_command_line(tmp_path):
    workers = [await Standin().start() for _ in range(2)]
    command = [
        *(sys.executable, "-m", "antefix_console", "serve", "fleet", "--http-address", "127.0.0.1:0"),
        *("--workers", ",".join(worker.url for worker in workers)),
        *("--events", ",".join(worker.publisher.events for worker in workers)),
        *("--replay", ",".join(worker.publisher.replay for worker in workers)),
        *("--secret-file", str(tmp_path / "secret"), "--ledger-dir", str(tmp_path / "ledger")),
        *("--metrics-address", "127.0.0.1:0"),
    ]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, env=child_environment())
    try:
        started = json.loads(await asyncio.wait_for(process.stdout.readline(), AT_MOST_S))
        assert started["role"] == "fleet"
        async with httpx.AsyncClient(base_url=f"http://{started['http_address']}", timeout=AT_MOST_S) as client:
            body = {"model": MODEL, "messages": [{"role": "user", "content": LONG}], "max_tokens": 2, "seed": 1}
            first = await client.post("/v1/chat/completions", json=body)

            # The worker sends its events a moment later.
            async def hit():
                answer = await client.post("/v1/chat/completions", json=body)
                return answer if int(answer.headers["antefix-hit-tokens"]) > 800 else None

            second = await until(hit)
            assert second.headers["antefix-worker"] == first.headers["antefix-worker"]
            shown = (await client.get(f"http://{started['metrics_address']}/metrics")).text
            assert 'antefix_fleet_hit_tokens_total{what="reported"' in shown or 'what="reported"' in shown
        explain = [sys.executable, "-m", "antefix_console", "explain", "--fleet", started["address"], "--workers"]
        asked = await asyncio.create_subprocess_exec(*explain, stdout=asyncio.subprocess.PIPE, env=child_environment())
        told, _ = await asked.communicate()
        assert asked.returncode == 0
        assert all(worker.address in told.decode() for worker in workers)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), AT_MOST_S) == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        for worker in workers:
            await worker.stop()
    records = [item.record for item in read_settled(tmp_path / "ledger")]
    assert [record.evidence.value for record in records] == ["reported"] * 2
    assert records[0].last_hit_hash == records[1].last_hit_hash == ""
