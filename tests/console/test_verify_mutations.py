"""The short form of `antefix verify` finds every planted fault, and says where.

Without a planted fault it finds nothing: test_verification.py runs the whole short form with the same seed.
"""

from __future__ import annotations

import asyncio
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from antefix.layout import KVFormat
from antefix_console import shipped
from antefix_console.commands import verify as command
from antefix_console.verify import setups
from antefix_console.verify.models import PLANS, random_subject
from antefix_console.verify.selection import Selection
from antefix_console.verify.setups import ProcessSetup, SetupSaid, check_setups
from antefix_console.verify.stores import MemoryStore
from antefix_console.verify.suite import Backend, Suite
from antefix_console.verify.verdict import Report
from tests.console.mutations import MUTATIONS, SET_UPS, Mutation
from tests.model.planted import skip_if_harmless

pytestmark = [pytest.mark.services, pytest.mark.slow]
SEED = 1
OTHER_PATH = ProcessSetup(threads=(1,), variables=(("MKL_CBWR", "COMPATIBLE"),))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def answers() -> list[list[SetupSaid]]:
    """The answers of a process that uses another path of the math library. The process is asked once."""
    return asyncio.run(setups._ask(OTHER_PATH))


def run_as(mutation: Mutation, scratch: Path, report: Report) -> None:
    """Run the part of the short form that reveals the mutation."""
    if mutation.plan == SET_UPS:
        asyncio.run(check_setups((OTHER_PATH,), report))
        return

    async def verify() -> None:
        # Everything is made after the fault is planted, as in a process that has the fault from its start.
        chosen = Selection(model=None, is_long=False, device="cpu", plans=tuple(PLANS), seed=SEED, num_drawn=0)
        subjects = dict(zip(PLANS, chosen.subjects(), strict=True))
        for plan in (mutation.plan, *mutation.other_plans):
            subject, coverage = subjects[plan]
            suite = (subject, coverage, report, lambda _: None, Backend())
            if mutation.real_store:
                async with command._stores(scratch, 1, "") as store:
                    await Suite(suite[0], store, *suite[1:]).run(mutation.strategies, mutation.parts)
            else:
                await Suite(suite[0], MemoryStore(), *suite[1:]).run(mutation.strategies, mutation.parts)

    asyncio.run(verify())


def skip_where_it_cannot_show(mutation: Mutation) -> None:
    if mutation.in_products:
        skip_if_harmless(mutation.plant, random_subject(mutation.plan, KVFormat.FLOAT32).model)


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_short_form_finds_a_planted_fault(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answers: list[list[SetupSaid]]
) -> None:
    mutation, report = MUTATIONS[name], Report()
    skip_where_it_cannot_show(mutation)

    async def ask(_: ProcessSetup) -> list[list[SetupSaid]]:
        return answers

    monkeypatch.setattr(setups, "_ask", ask)
    mutation.plant(monkeypatch)
    run_as(mutation, tmp_path, report)
    assert not report.ok
    assert report.total.failed > 0
    said = [text for text in report.failures if re.search(mutation.place, text)]
    assert said, report.failures[:5]
    assert mutation.plan == SET_UPS or any(plan in said[0] for plan in (mutation.plan, *mutation.other_plans))


def test_the_document_lists_every_planted_fault() -> None:
    text = (Path(__file__).parents[2] / "docs" / "VERIFY.md").read_text()
    rows = re.findall(r"^\| (.+?) \| (?:window|model|names|store|workers) \|", text, flags=re.MULTILINE)
    assert len(rows) == len(MUTATIONS) == 19
    assert all(any(row.startswith(name) for row in rows) for name in MUTATIONS)


@pytest.mark.long
def test_the_same_parts_find_nothing_where_nothing_is_planted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answers: list[list[SetupSaid]]
) -> None:
    async def ask(_: ProcessSetup) -> list[list[SetupSaid]]:
        return answers

    monkeypatch.setattr(setups, "_ask", ask)
    report = Report()
    alike: dict[tuple[str, bool], Mutation] = {}
    for mutation in MUTATIONS.values():
        known = alike.get(key := (mutation.plan, mutation.real_store), mutation)
        parts = tuple(dict.fromkeys((*known.parts, *mutation.parts)))
        strategies = tuple(dict.fromkeys((*known.strategies, *mutation.strategies)))
        others = tuple(dict.fromkeys((*known.other_plans, *mutation.other_plans)))
        alike[key] = Mutation(mutation.plant, mutation.plan, parts, "", strategies, mutation.real_store, others)
    for number, mutation in enumerate(alike.values()):
        scratch = tmp_path / str(number)
        scratch.mkdir()
        run_as(mutation, scratch, report)
    assert report.ok, report.failures
    assert report.total.cases > 50


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", MUTATIONS)
def test_the_whole_short_form_finds_a_planted_fault(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mutation = MUTATIONS[name]
    skip_where_it_cannot_show(mutation)
    mutation.plant(monkeypatch)
    selection = Selection(
        model=shipped.MODEL, is_long=False, device="cpu", plans=tuple(PLANS), seed=SEED, num_drawn=None
    )
    where = functools.partial(command._stores, tmp_path, 1, "")
    report, _ = asyncio.run(command._verify(selection, Backend(), where, lambda _: None))
    assert not report.ok
    assert any(re.search(mutation.place, text) for text in report.failures), report.failures[:5]
