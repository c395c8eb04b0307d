"""An audit of our own door finds each planted fault, and reports nothing if there is no fault."""

import contextlib
import dataclasses
import datetime
import hashlib
import json
import secrets

import pytest

from antefix_billing.tenants import TenantBook
from antefix_console.audit.audit import Plan, run_audit
from antefix_console.audit.audit_report import AuditReport
from antefix_console.audit.finding import Verdict
from antefix_console.audit.probing import Probing
from antefix_console.audit.promises import promises_of
from antefix_console.audit.sender import Budget, Scope, Sender
from antefix_console.endpoint.client import EndpointClient, EndpointConfig
from antefix_router.gateway.gateway import Gateway
from antefix_router.gateway.output import Ended
from tests.console.caching_door import CachingScript
from tests.gateway.scripted import make_front, serving

pytest.importorskip("scipy")
pytest.importorskip("httpx")

KEYS = ("first-account", "second-account")
TENANTS = TenantBook(keys={hashlib.sha256(key.encode()).digest(): key for key in KEYS})
WAITS_S = (60.0, 580.0)
PLAN = Plan(prompt_tokens=300, samples=8, waits_s=WAITS_S)
SMALL = Plan(prompt_tokens=300, samples=3)
PLENTY = Budget(requests=5000, tokens=10_000_000, per_s=2.0)


async def audited(tmp_path, script, *, api="chat", lifetime_s=0.0, budget=PLENTY, plan=PLAN):
    front = make_front(script, ledger=None, tenants=TENANTS)
    promises = promises_of("antefix", lifetime_s=lifetime_s)
    sender = Sender(budget, promises, clock=script.time.clock, sleep=script.time.sleep)
    async with contextlib.AsyncExitStack() as stack:
        url = await stack.enter_async_context(serving(front))
        clients = [
            await stack.enter_async_context(EndpointClient(EndpointConfig(url=f"{url}/v1", api=api, key=key)))
            for key in KEYS
        ]
        for client in clients:
            await client.choose_model()
        probing = Probing(
            sender=sender,
            scope=Scope("first", clients[0].ask),
            other_key=Scope("second", clients[1].ask),
            prompt_words=0,
            samples=plan.samples,
            seed="test",
        )
        findings = await run_audit(probing, plan, lambda name: None)
    return AuditReport(
        endpoint=url,
        model=clients[0].model,
        api=api,
        at=datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC),
        version="test",
        promises=promises,
        requests=sender.num_requests,
        tokens=sender.num_tokens,
        samples=plan.samples,
        dollars=None,
        findings=findings,
    )


def says(report, verdict):
    return [f"{finding.probe}: {finding.says}" for finding in report.findings if finding.verdict is verdict]


@pytest.mark.slow
@pytest.mark.parametrize("api", ["chat", "completions", "messages"])
async def test_a_sound_door_is_accused_of_nothing(tmp_path, api):
    report = await audited(tmp_path, CachingScript(), api=api, lifetime_s=600.0)
    assert report.violations == []
    told = "\n".join(says(report, Verdict.FACT))
    assert "are multiples of 64 tokens" in told
    assert "end users are apart: 0 of 8" in told and "accounts are apart: 0 of 8" in told
    assert "8 of 8 hits give the cold run's text" in told
    assert "most prompts still hit after 58" in told
    assert "gets the same answer and the same count" in told
    forks = next(finding for finding in report.findings if finding.probe == "forks")
    assert all(0 <= row["shared_tokens"] - row["hit_tokens"] < 128 for row in forks.figures["forks"])


FAULTS = {
    "a wrong hit": ("granularity", {"claims_tokens": 128}, {}, "hits on text that was never sent"),
    "a hit across accounts": ("isolation", {"shares": "all"}, {}, "accounts share a cache"),
    "a hit across users": ("isolation", {"shares": "users"}, {}, "end users share a cache"),
    "a lifetime that is too short": ("lifetime", {"lifetime_s": 300.0}, {"lifetime_s": 600.0}, "gone after 58"),
    "an answer that a hit changes": ("sameness", {"changes_answers": True}, {}, "a hit changes the answer"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("probe", "script", "setup", "finds"), FAULTS.values(), ids=FAULTS)
async def test_each_planted_fault_is_found(tmp_path, probe, script, setup, finds):
    plan = dataclasses.replace(PLAN, probes=(probe,))
    report = await audited(tmp_path, CachingScript(**script), plan=plan, **setup)
    found = says(report, Verdict.VIOLATION)
    assert any(finds in each for each in found), report.as_markdown()
    # The audit reports nothing else, except consequences of the fault itself.
    assert len(found) <= 2, found


@pytest.mark.slow
async def test_hits_that_are_counted_twice_are_found(tmp_path, monkeypatch):
    usage = Ended.usage

    def doubled(ended, form):
        shown = usage(ended, form)
        return shown | {"input_tokens": shown["input_tokens"] + shown["cache_read_input_tokens"]}

    monkeypatch.setattr(Ended, "usage", doubled)
    report = await audited(tmp_path, CachingScript(), api="messages", plan=SMALL)
    assert any("one prompt, two counts" in each for each in says(report, Verdict.VIOLATION))


async def test_a_retry_that_is_billed_again_is_found(tmp_path, monkeypatch):
    caller = Gateway.caller

    def forgetful(gateway, *args, **named):
        return dataclasses.replace(caller(gateway, *args, **named), request_id=secrets.token_hex(12), has_key=False)

    monkeypatch.setattr(Gateway, "caller", forgetful)
    report = await audited(tmp_path, CachingScript(), plan=dataclasses.replace(PLAN, probes=("retries",)))
    assert any("answered and counted a second" in each for each in says(report, Verdict.VIOLATION))


@pytest.mark.slow
async def test_a_budget_ends_an_audit_and_the_report_says_so(tmp_path):
    report = await audited(tmp_path, CachingScript(), budget=Budget(requests=50, tokens=10_000_000))
    assert report.requests == 50 and report.violations == []
    assert any("not finished: spent: 50 requests" in each for each in says(report, Verdict.UNKNOWN))


@pytest.mark.slow
async def test_a_report_has_no_key_and_reads_back(tmp_path):
    report = await audited(tmp_path, CachingScript(shares="all"), plan=SMALL)
    text = report.as_markdown()
    assert text.startswith("# Audit of a prefix cache\n") and "broken promise" in text
    assert not any(key in text + json.dumps(report.as_dict()) for key in KEYS)
    assert json.loads(json.dumps(report.as_dict()))["violations"] == len(report.violations)
