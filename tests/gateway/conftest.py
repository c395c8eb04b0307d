"""Fixtures that several files of this folder share."""

import httpx2
import pytest

from tests.gateway.agents_door import Door
from tests.gateway.scripted import Script, make_front, serving
from tests.waiting import AT_MOST_S


@pytest.fixture
async def door(tmp_path):
    script = Script(say=lambda prompt: "why</think>yes" if prompt.endswith("<think>") else "yes")
    ledger = tmp_path / "ledger"
    async with (
        serving(make_front(script, ledger=ledger), chat_format="deepseek-v4") as url,
        httpx2.AsyncClient(base_url=url, timeout=AT_MOST_S) as client,
    ):
        yield Door(client, script, ledger)
