"""`antefix demo`: shows and checks the main use: four processes, one document, four questions, a restart."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from antefix.clients import Generated, Tokens
from antefix.errors import InvalidRequest
from antefix.layout import KVFormat, KVGeometry
from antefix.model_dir import read_config
from antefix.record import RecordKind
from antefix.sampling import Sampling
from antefix.store.remote_store import RemoteStore
from antefix.store.store_stats import StoreTotals
from antefix.tokenizer import Tokenizer, load_tokenizer
from antefix_console.bare_model import Reference
from antefix_console.commands.up import add_deployment_arguments, deployment_config
from antefix_console.deployment import Deployment, DeploymentConfig
from antefix_console.shipped import SHIPPED

DOCUMENTS = ("docs/ARCHITECTURE.md", "docs/FORMAT.md", "docs/WINDOW_STATE.md", "LICENSE")
DOCUMENT_TOKENS_MIN = 16_000
DOCUMENT_CHARACTERS_MAX = 24_000
# Facts planted in the document. Each step asks for one; an answer computed from wrong KV would not know it.
FACTS = (
    ("access code", "silver-otter", "73914"),
    ("home town", "misty-harbor", "Lisbon"),
    ("serial number", "copper-lantern", "20583"),
    ("password", "quiet-badger", "velkor"),
)


@dataclass(slots=True)
class DemoStep:
    """One request of the demo: question, answer, and figures."""

    name: str
    prompt: Tokens
    fact: tuple[str, str, str]
    output: list[int] = field(default_factory=list)
    text: str = ""
    last: Generated | None = None

    @property
    def row(self) -> dict[str, object]:
        assert self.last is not None and self.last.usage is not None
        usage, restore = self.last.usage, self.last.restore
        return {
            "step": self.name,
            "prompt_tokens": usage.prompt_tokens,
            "hit_tokens": usage.cache_hit_tokens,
            "miss_tokens": usage.cache_miss_tokens,
            "plan": restore.plan if restore else "cold",
            "replayed_tokens": restore.replayed_tokens if restore else 0,
            "bytes_read": restore.bytes_read if restore else 0,
            "ttft_s": round(usage.ttft_s, 4),
            "answer": self.text,
            "answer_right": self.fact[2] in self.text,
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_deployment_arguments(parser)
    parser.add_argument(
        "--document", type=Path, help="document to ask questions about (default: the project's own documentation)"
    )
    parser.add_argument(
        "--max-tokens", type=int, default=48, metavar="N", help="number of tokens of each answer (default: 48)"
    )
    parser.add_argument(
        "--data-dir", type=Path, help="directory for the store and the logs (default: a temporary directory)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")


def run(args: argparse.Namespace) -> int:
    console = Console(stderr=True)
    tokenizer = load_tokenizer(args.model)
    document = _document(args, tokenizer)
    with tempfile.TemporaryDirectory(prefix="antefix-demo-") as scratch:
        config = deployment_config(args, args.data_dir or Path(scratch))
        demo = Demo(config, tokenizer, document, args.max_tokens, console)
        report = asyncio.run(demo.run())
    if args.json:
        print(json.dumps(report))
    else:
        _print(demo.steps, report)
    return 0 if report["outputs_identical"] else 1


class Demo:
    """The steps of the demo in order; `run` returns the report."""

    def __init__(
        self, config: DeploymentConfig, tokenizer: Tokenizer, document: Tokens, max_tokens: int, console: Console
    ) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._document = document
        self._max_tokens = max_tokens
        self._console = console
        self._started = time.monotonic()
        self.steps: list[DemoStep] = []

    async def run(self) -> dict[str, object]:
        # 1. Start four processes. Ask a question about the document, then another one, then a third turn.
        async with Deployment(self._config) as deployment:
            pids = [process.process.pid for process in deployment.processes]
            self._say(f"{len(pids)} processes are up")
            await self._ask(deployment, "cold", self._document, FACTS[0])
            second = await self._ask(deployment, "hit", self._document, FACTS[1])
            history = np.concatenate((second.prompt, np.array(second.output, np.uint32), self._next_turn))
            await self._ask(deployment, "third turn", history, FACTS[2])
        # 2. Start new processes on the same directory, with nothing in memory.
        async with Deployment(self._config) as deployment:
            pids += [process.process.pid for process in deployment.processes]
            self._say("all processes restarted on the same store")
            await self._ask(deployment, "after restart", self._document, FACTS[3])
            stats = await RemoteStore(deployment.one("kvstore").address).stats()
        left = [pid for pid in pids if _is_running(pid)]
        # 3. Run the same prompts without any store.
        identical = await asyncio.to_thread(self._compare)
        return self._report(stats, identical, num_processes=len(pids) // 2, num_left=len(left))

    async def _ask(self, deployment: Deployment, name: str, history: Tokens, fact: tuple[str, str, str]) -> DemoStep:
        question = self._tokenizer.encode(f"\n\nWhat is the {fact[0]} of {fact[1]}?<|end|><|assistant|>")
        step = DemoStep(name=name, prompt=np.concatenate((history, np.array(question, np.uint32))), fact=fact)
        self._say(f"{name}: {len(step.prompt)} tokens ...")
        sampling = Sampling(max_tokens=self._max_tokens)
        async for message in deployment.router.generate(step.prompt, sampling):
            step.output.extend(int(token) for token in message.tokens)
            step.text += message.text
            step.last = message
        self.steps.append(step)
        return step

    def _compare(self) -> dict[str, bool]:
        """Compare each step's output with a cold run's, token for token."""
        reference = Reference(self._config.model, KVFormat(self._config.kv_format))
        identical: dict[str, bool] = {}
        for step in self.steps:
            self._say(f"{step.name}: the same prompt without any store ...")
            identical[step.name] = reference.generate(step.prompt, self._max_tokens) == step.output
        return identical

    @property
    def _next_turn(self) -> Tokens:
        """The tokens between an answer and the next question: the answer's end token, which the output itself lacks,
        and tokens of the chat format.
        """
        return np.array(self._tokenizer.encode("<|end|><|user|>"), np.uint32)

    def _report(
        self, stats: StoreTotals, identical: dict[str, bool], *, num_processes: int, num_left: int
    ) -> dict[str, object]:
        rows = [step.row for step in self.steps]
        cold, hit, third, restarted = rows
        blocks = stats.kinds[RecordKind.BLOCK]
        block_size = KVGeometry.from_config(read_config(self._config.model)).block_size
        return {
            "prompt_tokens": cold["prompt_tokens"],
            "cold_ttft_s": cold["ttft_s"],
            "hit_ttft_s": hit["ttft_s"],
            "hit_tokens": hit["hit_tokens"],
            "turn3_hit_tokens": third["hit_tokens"],
            "restart_hit_tokens": restarted["hit_tokens"],
            "restart_ttft_s": restarted["ttft_s"],
            "outputs_identical": all(identical.values()),
            "identical": identical,
            "answers_right": all(bool(row["answer_right"]) for row in rows),
            "processes": num_processes,
            "processes_left": num_left,
            "store_bytes": stats.used_bytes,
            "global_kv_bytes_per_token": blocks.payload_bytes / max(blocks.num_records * block_size, 1),
            "stored_bytes_per_token": blocks.stored_bytes / max(blocks.num_records * block_size, 1),
            "steps": rows,
        }

    def _say(self, text: str) -> None:
        self._console.print(f"[dim]{time.monotonic() - self._started:6.1f} s[/dim]  {text}")


def _document(args: argparse.Namespace, tokenizer: Tokenizer) -> Tokens:
    paths = [args.document] if args.document else [SHIPPED / name for name in DOCUMENTS]
    try:
        text = "\n\n".join(path.read_text() for path in paths if args.document or path.is_file())
    except (OSError, UnicodeDecodeError) as err:
        raise InvalidRequest(f"the document cannot be read: {err}") from err
    tokens = tokenizer.encode(plant(text[:DOCUMENT_CHARACTERS_MAX]))
    if not args.document and len(tokens) < DOCUMENT_TOKENS_MIN:
        raise InvalidRequest(f"the shipped documents have {len(tokens)} tokens, the demo needs {DOCUMENT_TOKENS_MIN}")
    return np.array(tokens, np.uint32)


def plant(text: str) -> str:
    """The text as a user's turn, with a line for each fact inserted within its first three quarters."""
    lines = text.splitlines(keepends=True)
    for index, (attribute, key, value) in enumerate(FACTS):
        lines.insert(len(lines) * (3 * index + 1) // (4 * len(FACTS)), f"\nThe {attribute} of {key} is {value}.\n")
    return "<|bos|><|user|>" + "".join(lines)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _print(steps: list[DemoStep], report: dict[str, object]) -> None:
    console = Console()
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("step", "prompt", "hit", "miss", "plan", "read", "TTFT", "faster"):
        table.add_column(column, justify="left" if column in ("step", "plan") else "right", no_wrap=True)
    cold_s = float(str(report["cold_ttft_s"]))
    for step in steps:
        row = step.row
        ttft_s = float(str(row["ttft_s"]))
        replayed = f" of {row['replayed_tokens']}" if row["replayed_tokens"] else ""
        table.add_row(
            step.name,
            str(row["prompt_tokens"]),
            str(row["hit_tokens"]),
            str(row["miss_tokens"]),
            f"{row['plan']}{replayed}",
            f"{int(str(row['bytes_read'])) / 1e6:.2f} MB",
            f"{ttft_s:.3f} s",
            f"{cold_s / ttft_s:.1f}x",
        )
    console.print(table)
    for step in steps:
        console.print(f"{step.name}: {step.text!r}", markup=False, highlight=False)
    verdict = "equal, token for token" if report["outputs_identical"] else f"NOT equal: {report['identical']}"
    console.print(f"\nOutputs against cold runs without any store: {verdict}.")
    console.print(
        f"{report['processes']} processes ran, {report['processes_left']} are left;"
        f" the store took {int(str(report['store_bytes'])) / 1e6:.2f} MB,"
        f" {float(str(report['global_kv_bytes_per_token'])):.0f} B of global KV per token."
    )
    sys.stdout.flush()
