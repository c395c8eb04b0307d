"""Whole answers of a deployment whose object store is behind the faulty proxy, compared with cold runs.

Shared by a test and by `benchmarks.object_faults`.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from antefix.errors import AntefixError, Unavailable
from antefix.objects.bucket import open_bucket
from antefix.objects.catalog import Catalog
from antefix.sampling import Sampling
from antefix.usage import tiers_of_text
from antefix_billing.ledger_files import read_settled
from antefix_console.bare_model import Reference
from antefix_console.deployment import Deployment
from tests.objects.faulty_proxy import Harm
from tests.waiting import AT_MOST_S

Prompt = npt.NDArray[np.uint32]
OUTPUT_TOKENS: Final = 8
QUESTION_TOKENS: Final = 40
_IN_FLIGHT: Final = 4


@dataclass(slots=True)
class Round:
    """Answers under one kind of harm.

    failed: requests that ended with an error.  stuck: requests without an answer within AT_MOST_S.  different: answers
    unlike the cold run's.  from_objects: answers with a hit from the object tier.  hit_tokens: tokens of these hits.
    harmed: damaged answers of the S3 server.  grown_mb: by how much the memory of the process that grew most exceeded,
    at its peak, its memory when the round began.
    """

    kind: str
    answers: int = 0
    failed: int = 0
    stuck: int = 0
    different: int = 0
    from_objects: int = 0
    hit_tokens: int = 0
    harmed: int = 0
    longest_s: float = 0.0
    grown_mb: float = 0.0
    problems: list[str] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class WholeAnswers:
    """Documents of a deployment, each of which is read once under harm.

    share: of the server's answers that are damaged.  at: sets the S3 endpoint of processes that start from now on.
    """

    deployment: Deployment
    reference: Reference
    harm: Harm
    url: str
    at: Callable[[str], None]
    num_documents: int
    num_tokens: int
    share: float
    seed: int = 0

    async def measure(self, kinds: Sequence[str], *, server: str, proxy: str) -> list[Round]:
        """Compute all documents, upload them under harm, wipe the disks, and read some documents under each kind.

        Each of `kinds` is a kind of harm, several kinds joined by "+", or empty for none.
        """
        rng = np.random.default_rng(self.seed)
        documents = {
            kind: [drawn(rng, self.num_tokens) for _ in range(self.num_documents)] for kind in dict.fromkeys(kinds)
        }
        # 1. Everything is computed and uploaded. The uploads are damaged too.
        self.harm.share = self.share
        await _all(ask(self.deployment, each) for kind in documents for each in documents[kind])
        self.harm.share = 0.0
        self.at(server)
        await until_uploaded(self.url, len(documents) * self.num_documents * (self.num_tokens // 128))
        # 2. Disk and memory are emptied.
        self.at(proxy)
        await wipe_disks(self.deployment)
        await ask(self.deployment, drawn(rng, self.num_tokens))
        # 3. The documents are asked about.
        found = []
        for kind, each in documents.items():
            questions = [np.concatenate((document, drawn(rng, QUESTION_TOKENS))) for document in each]
            found.append(await self._round(kind, questions))
        self.harm.share = 0.0
        return found

    async def _round(self, kind: str, questions: Sequence[Prompt]) -> Round:
        cold = [await asyncio.to_thread(self.reference.generate, each, OUTPUT_TOKENS) for each in questions]
        found = Round(kind)
        num_settled = len(self._settled())
        before = {each.process.pid: memory_mb(each.process.pid) for each in self.deployment.processes}
        self.harm.done.clear()
        self.harm.kinds = kind.split("+")
        self.harm.share = self.share if kind else 0.0
        await _all(self._compare(found, *each) for each in zip(questions, cold, strict=True))
        found.harmed = sum(self.harm.done.values())
        found.grown_mb = max(memory_mb(pid, peak=True) - mb for pid, mb in before.items())
        for item in self._settled()[num_settled:]:
            tokens = tiers_of_text(item.record.hit_tiers).get("object:s3", 0)
            found.hit_tokens += tokens
            found.from_objects += tokens > 0
        return found

    async def _compare(self, found: Round, question: Prompt, cold: Sequence[int]) -> None:
        started = time.perf_counter()
        found.answers += 1
        try:
            async with asyncio.timeout(AT_MOST_S):
                found.different += await answer(self.deployment, question) != cold
        except TimeoutError:
            found.stuck += 1
        except AntefixError as err:
            found.failed += 1
            found.problems.append(str(err))
        found.longest_s = max(found.longest_s, time.perf_counter() - started)

    def _settled(self) -> list[Any]:
        return list(read_settled(self.deployment.config.ledger_dir))


async def answer(deployment: Deployment, prompt: Prompt) -> list[int]:
    output: list[int] = []
    async for message in deployment.router.generate(prompt, Sampling(max_tokens=OUTPUT_TOKENS)):
        output += [int(token) for token in message.tokens]
    return output


async def ask(deployment: Deployment, prompt: Prompt) -> list[int]:
    """The output of a request, which is repeated until the router has found the restarted workers."""
    async with asyncio.timeout(AT_MOST_S):
        while True:
            try:
                return await answer(deployment, prompt)
            except Unavailable:
                await asyncio.sleep(0.5)


def drawn(rng: np.random.Generator, num_tokens: int) -> Prompt:
    """Random printable characters."""
    return rng.integers(32, 127, num_tokens).astype(np.uint32)


async def until_uploaded(url: str, num_blocks: int) -> None:
    catalog = Catalog(open_bucket(url))
    async with asyncio.timeout(AT_MOST_S):
        while catalog.num_records < num_blocks:
            await asyncio.sleep(0.2)
            await catalog.refresh()
    await catalog.bucket.close()


async def wipe_disks(deployment: Deployment) -> None:
    """Wipe the store's disk, and restart everything except the router, so that nothing is in memory either."""
    for path in deployment.config.store_dir.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for process in [each for each in deployment.processes if each.role != "router"]:
        await deployment.kill(process)
        await deployment.restart(process)


async def _all(calls: Any) -> None:
    turns = asyncio.Semaphore(_IN_FLIGHT)

    async def one(call: Any) -> None:
        async with turns:
            await call

    await asyncio.gather(*(one(call) for call in calls))


def memory_mb(pid: int | str, *, peak: bool = False) -> float:
    """Resident memory. Without `peak`, this resets the process's peak."""
    if not peak:
        Path(f"/proc/{pid}/clear_refs").write_text("5")
    name = "VmHWM:" if peak else "VmRSS:"
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith(name)).split()[1]) / 1024
