"""Workers of two processes each, as `antefix up --tensor-parallel-size 2` starts them."""

import asyncio
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from antefix_prefill.worker.rank_processes import EXIT_LOST
from tests.waiting import AT_MOST_S


def children_of(pid: int) -> list[int]:
    return [int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]


def is_there(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


@pytest.mark.long
async def test_a_deployment_over_ranks_hits_and_outlives_one_that_dies(deploy, ask, document, reference):
    prompt, longer = document[:700], np.concatenate((document[:700], document[:80]))
    async with deploy(tensor_parallel_size=2, log_level="info") as deployment:
        first, _ = await ask(deployment, prompt, max_tokens=12)
        second, last = await ask(deployment, longer, max_tokens=12)
        assert last.usage.cache_hit_tokens >= 640
        # If a rank dies, its worker ends at once and says why, and requests continue without the worker.
        prefill = deployment.one("prefill")
        (other,) = children_of(prefill.process.pid)
        os.kill(other, signal.SIGKILL)
        async with asyncio.timeout(AT_MOST_S):
            assert await prefill.process.wait() == EXIT_LOST
        assert f"rank 1 (pid {other}) died with status -9; this worker ends" in prefill.log_path.read_text()
        third, _ = await ask(deployment, document[100:600], max_tokens=12)
        # The decode worker is stopped normally, and its rank ends with it.
        (other,) = children_of(deployment.one("decode").process.pid)
    assert not is_there(other)
    assert first == reference.generate(prompt, 12)
    assert second == reference.generate(longer, 12)
    assert third == reference.generate(document[100:600], 12)
