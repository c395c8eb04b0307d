"""Starts the installed programs, each in its own home directory, with no network except 127.0.0.1."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.waiting import AT_MOST_S

INSTALLED = Path(__file__).parents[2] / ".clients"
NODE = INSTALLED / "node_modules"
PYTHON = INSTALLED / "python" / "bin" / "python"
SCRIPTS = Path(__file__).parent / "scripts"

needs_programs = pytest.mark.skipif(
    not (NODE / ".bin").is_dir() or not PYTHON.exists(),
    reason="the programs are not installed: run tests/clients/install.sh, then `make test-clients`",
)

# A program's connection to any other host is refused at once, and the program must cope with that.
_NOWHERE = "http://127.0.0.1:9"
_OFFLINE = {
    **dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY"), _NOWHERE),
    **dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1,localhost"),
}


@dataclass(slots=True)
class Ended:
    """A program that has ended.  status: the exit status.  out, err: the program's output."""

    status: int
    out: str
    err: str

    def events(self) -> list[dict[str, Any]]:
        """The lines of JSON in the program's output."""
        return [json.loads(line) for line in self.out.splitlines() if line.startswith("{")]

    @property
    def last(self) -> str:
        return (self.out + self.err)[-3000:]


@dataclass(slots=True)
class Running:
    """A program that is running."""

    process: asyncio.subprocess.Process

    async def interrupt(self) -> Ended:
        """Send SIGINT, as Ctrl-C does."""
        self.process.send_signal(signal.SIGINT)
        return await self.ended()

    async def ended(self, timeout_s: float = AT_MOST_S) -> Ended:
        try:
            out, err = await asyncio.wait_for(self.process.communicate(), timeout_s)
        except TimeoutError:
            self.process.kill()
            raise
        return Ended(self.process.returncode or 0, out.decode(), err.decode())


@dataclass(slots=True)
class Program:
    """command: the program and what it is always given.  home: where it keeps its files.  folder: where it works."""

    command: list[str]
    home: Path
    folder: Path
    env: dict[str, str] = field(default_factory=dict)

    async def start(self, *arguments: str) -> Running:
        env = {"PATH": os.environ["PATH"], "HOME": str(self.home), "TERM": "dumb", **_OFFLINE, **self.env}
        process = await asyncio.create_subprocess_exec(
            *self.command,
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            cwd=self.folder,
            env=env,
            limit=1 << 24,
        )
        return Running(process)

    async def run(self, *arguments: str) -> Ended:
        return await (await self.start(*arguments)).ended()


def claude_code(url: str, home: Path, folder: Path) -> Program:
    env = {
        "ANTHROPIC_BASE_URL": url,
        "ANTHROPIC_AUTH_TOKEN": "k",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "DISABLE_AUTOUPDATER": "1",
    }
    shown = ["-p", "--output-format", "stream-json", "--verbose", "--allowedTools=Bash,Read,ToolSearch,Agent,Task"]
    return Program([str(NODE / ".bin" / "claude"), *shown, "--model", "claude-opus-4-8"], home, folder, env)


_CODEX = """\
model = "gpt-5.2-codex"
model_provider = "antefix"
check_for_update_on_startup = false

[model_providers.antefix]
name = "Antefix"
base_url = "{url}/v1"
wire_api = "responses"
env_key = "ANTEFIX_KEY"

[analytics]
enabled = false
"""


def codex(url: str, home: Path, folder: Path) -> Program:
    (home / ".codex").mkdir(parents=True, exist_ok=True)
    (home / ".codex" / "config.toml").write_text(_CODEX.format(url=url))
    return Program([str(NODE / ".bin" / "codex"), "exec"], home, folder, {"ANTEFIX_KEY": "k"})


def opencode(url: str, home: Path, folder: Path) -> Program:
    model = {
        "name": "A model",
        "reasoning": True,
        "attachment": True,
        "tool_call": True,
        "limit": {"context": 1_000_000, "output": 32_000},
        "modalities": {"input": ["text", "image"], "output": ["text"]},
    }
    # If a model's name contains "claude", opencode sends Anthropic's fields in OpenAI's API.
    config = {
        "autoupdate": False,
        "share": "disabled",
        "model": "antefix/claude-sonnet-4-5",
        "small_model": "antefix/claude-sonnet-4-5",
        "provider": {
            "antefix": {
                "npm": "@ai-sdk/openai-compatible",
                "name": "Antefix",
                "options": {"baseURL": f"{url}/v1", "apiKey": "k"},
                "models": {"claude-sonnet-4-5": model},
            }
        },
    }
    (home / ".config" / "opencode").mkdir(parents=True, exist_ok=True)
    (home / ".config" / "opencode" / "opencode.json").write_text(json.dumps(config))
    names = ("AUTOUPDATE", "MODELS_FETCH", "LSP_DOWNLOAD", "DEFAULT_PLUGINS")
    env = {f"OPENCODE_DISABLE_{name}": "1" for name in names}
    return Program([str(NODE / ".bin" / "opencode"), "run", "--format", "json"], home, folder, env)


def ai_sdk(url: str, home: Path, provider: str) -> Program:
    return Program(["node", str(SCRIPTS / "ai_sdk.mjs"), url, provider], home, INSTALLED)


def python_client(url: str, home: Path, name: str) -> Program:
    env = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "OPENAI_AGENTS_DISABLE_TRACING": "1", "LANGSMITH_TRACING": "false"}
    return Program([str(PYTHON), str(SCRIPTS / "python_clients.py"), name, url], home, INSTALLED, env)
