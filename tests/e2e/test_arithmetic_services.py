"""Workers with different arithmetic miss each other's blocks and say why, and one deployment refuses them."""

from __future__ import annotations

import asyncio
import json
import re

import numpy as np
import pytest

from antefix.errors import ConfigError
from antefix.model import load_model, probe
from antefix.sampling import Sampling
from antefix_console.cli import main
from antefix_console.deployment import ARITHMETIC_FILE
from tests.e2e.conftest import MODEL


async def test_another_set_up_misses_and_says_why(deploy, document, ask, monkeypatch, capsys):
    prompt, stored = document[:300], 256
    async with deploy() as deployment:
        _, last = await ask(deployment, prompt)
        assert last.restore.miss_reason == "first_seen"
        data_dir = deployment.config.data_dir
        first = (data_dir / ARITHMETIC_FILE).read_text().strip()
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    async with deploy() as deployment:
        second = (data_dir / ARITHMETIC_FILE).read_text().strip()
        assert second != first
        # The stored blocks are of no use here, and neither `explain` nor the worker claims otherwise.
        tokens = data_dir / "tokens.json"
        tokens.write_text(json.dumps([int(token) for token in prompt]))
        explain = ["explain", "--data-dir", str(data_dir), "--tokens-file", str(tokens)]
        capsys.readouterr()
        assert await asyncio.to_thread(main, explain) == 0
        assert "arithmetic_differs" in capsys.readouterr().out
        _, last = await ask(deployment, prompt)
        assert (last.restore.hit_tokens, last.restore.miss_reason) == (0, "arithmetic_differs")
        assert last.usage.cache_hit_tokens == 0
        _, last = await ask(deployment, prompt)
        assert last.usage.cache_hit_tokens == stored


async def test_workers_that_cannot_share_are_never_started_together(deploy):
    with pytest.raises(ConfigError, match="arithmetic differs") as caught:
        async with deploy(extra_flags={"decode": ("--pool-bytes", "64M", "--dtype", "bfloat16")}):
            pass
    # The error names both workers, their addresses and their arithmetic.
    one = r"prefill worker .* computes cpu-float32-\w+-\w+ \(.*threads.*\)"
    assert re.search(one + r", decode worker .* computes cpu-bfloat16", str(caught.value))


async def test_a_worker_may_read_what_another_arithmetic_wrote_and_stores_nothing(deploy, document, ask, capsys):
    name = probe(load_model(MODEL)).name
    flags = ("--pool-bytes", "64M", "--dtype", "bfloat16", "--arithmetic", name)
    async with deploy(extra_flags={"decode": flags}) as deployment:
        # The prompt has four blocks and all but four tokens of a fifth, which the answer would fill.
        prompt = document[:316]
        output, last = await ask(deployment, prompt, sampling=Sampling(max_tokens=12, ignore_eos=True))
        # The prefill worker stored the prompt's blocks. The decode worker, with another arithmetic, stored none of the
        # answer.
        _, last = await ask(deployment, np.concatenate((prompt, output)), max_tokens=2)
        assert last.usage.cache_hit_tokens == 256
        capsys.readouterr()
        doctor = ["doctor", "--router", deployment.one("router").address, "--json"]
        assert await asyncio.to_thread(main, doctor) == 0
        findings = {finding["check"]: finding for finding in json.loads(capsys.readouterr().out)["findings"]}
        workers = [finding for check, finding in findings.items() if check.startswith(("prefill ", "decode "))]
        assert len(workers) == 2
        assert all(finding["detail"].startswith(name) for finding in workers)
        assert findings["sharing"]["status"] == "ok"
        assert await asyncio.to_thread(main, [*doctor, "--dtype", "bfloat16"]) == 0
        findings = {finding["check"]: finding for finding in json.loads(capsys.readouterr().out)["findings"]}
        assert findings["sharing"]["status"] == "warn"
