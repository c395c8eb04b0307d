"""`antefix verify --against`: a deployment's workers give equal answers, or the command names one that differs."""

from __future__ import annotations

import asyncio
import json

import pytest

from antefix_console.cli import main


async def against(capsys, *addresses):
    capsys.readouterr()
    code = await asyncio.to_thread(main, ["verify", "--seed", "3", "--json", "--against", *addresses])
    return code, capsys.readouterr()


@pytest.mark.long
async def test_workers_are_compared_through_a_router_and_straight(deploy, capsys):
    async with deploy() as deployment:
        router, decode = deployment.one("router").address, deployment.one("decode").address
        code, said = await against(capsys, router)
        report = json.loads(said.out)
        assert code == 0 and report["ok"] and report["seed"] == 3
        (row,) = report["rows"]
        assert row["strategy"] == "against"
        assert set(row["plans"]) >= {"fingerprint", "prefill, cold"}
        # The prefill worker hit blocks that the decode worker had stored, by one plan or another.
        assert len(row["plans"]) > 2 or row["plans"]["prefill, cold"]["cases"] > 3

        # A worker with another format has other names for KV and gives other answers.
        deployment.config.extra_flags["decode"] += ("--kv-format", "float32")
        other = await deployment.start_worker("decode")
        code, said = await against(capsys, decode, other.address)
        report = json.loads(said.out)
        assert code == 1 and not report["ok"]
        assert any("gives KV other names" in text and other.address in text for text in report["failures"])
        assert any("output token" in text for text in report["failures"])

        # One worker cannot be compared, and an address where nothing listens gives an error.
        code, said = await against(capsys, decode)
        assert code == 2 and "needs two workers" in said.err
        code, said = await against(capsys, decode, "127.0.0.1:1")
        assert code != 0 and "127.0.0.1:1 is neither a worker nor a router" in said.err
