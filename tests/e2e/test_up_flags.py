"""`antefix up` hands its flags for the HTTP door on to the router."""

import asyncio
import json
import sys
from pathlib import Path

import httpx2

from tests.waiting import AT_MOST_S

ALIASES = Path(__file__).parents[2] / "deploy" / "model_aliases.toml"
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


async def test_up_takes_a_chat_format_and_model_aliases(tmp_path):
    flags = ("--chat-format", "deepseek-v4", "--model-aliases", str(ALIASES))
    up = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "antefix_console", "up", "--json", "--data-dir", str(tmp_path / "up"), *flags),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        ready = json.loads(await asyncio.wait_for(up.stdout.readline(), AT_MOST_S))
        ask = [{"role": "user", "content": "hi"}]
        body = {"max_tokens": 2, "messages": ask, "tools": [TOOL], "temperature": 0}
        modes = {"deepseek-chat": "off", "deepseek-reasoner": "high", "claude-opus-4-8": "high"}
        async with httpx2.AsyncClient(base_url=f"http://{ready['http_address']}", timeout=AT_MOST_S) as client:
            for name, mode in modes.items():
                # The small model's own chat format has no tools and no thinking.
                answer = await client.post("/v1/chat/completions", json={"model": name, **body})
                assert answer.status_code == 200, answer.text
                assert answer.headers["antefix-mode"] == mode and answer.headers["antefix-model"] == "antefix-tiny"
    finally:
        up.terminate()
        await up.wait()
