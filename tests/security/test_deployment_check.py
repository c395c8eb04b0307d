"""`antefix doctor --deployment` asks each service, and compares the settings that must be equal."""

import dataclasses
import time

import pytest

from antefix.clients.about import About
from antefix.security.identity import Role
from antefix_console.deployment_check import Asked, findings_of

NAME, MARK = b"n" * 32, b"m" * 8


def about(**changed):
    fields = {
        "role": "prefill",
        "version": "1.0",
        "ahead_s": 0.01,
        "round_trip_s": 0.002,
        "certificate_ends_s": time.time() + 60 * 86_400,
        "secret_marks": (MARK,),
        "calls": (),
    }
    return About(**fields | changed)


def asked(role=Role.PREFILL, **changed):
    fields = {"role": role, "address": f"{role.value}:1", "about": about(), "fingerprint": NAME}
    return Asked(**fields | changed)


ROUTER = asked(Role.ROUTER)
STORE = asked(Role.KVSTORE, fingerprint=b"")


def statuses(*others):
    return {finding.check: finding.status for finding in findings_of([ROUTER, STORE, *others])}


def test_a_whole_deployment_is_fine():
    found = statuses(asked(), asked(Role.DECODE))
    assert set(found.values()) == {"ok"}
    assert set(found) == {"router router:1", "kvstore kvstore:1", "prefill prefill:1", "decode decode:1"} | {
        "same names",
        "same secret",
        "version",
    }


@pytest.mark.parametrize(
    ("changed", "check", "status"),
    [
        ({"about": None, "error": "nobody there"}, "prefill prefill:1", "fail"),
        ({"about": about(ahead_s=-40.0)}, "prefill prefill:1", "fail"),
        ({"about": about(ahead_s=12.0)}, "prefill prefill:1", "warn"),
        # A clock difference that a slow network explains counts as right.
        ({"about": about(ahead_s=12.0, round_trip_s=12.0)}, "prefill prefill:1", "ok"),
        ({"about": about(certificate_ends_s=time.time() + 3 * 86_400)}, "prefill prefill:1", "warn"),
        ({"about": about(certificate_ends_s=0.0)}, "prefill prefill:1", "ok"),
        ({"fingerprint": b"x" * 32}, "same names", "fail"),
        ({"about": about(secret_marks=(b"z" * 8,))}, "same secret", "fail"),
        ({"about": about(secret_marks=())}, "same secret", "fail"),
        # The secrets are being replaced, and both services know one of them.
        ({"about": about(secret_marks=(b"z" * 8, MARK))}, "same secret", "ok"),
        ({"about": about(version="1.1")}, "version", "warn"),
        # A worker that answers, but whose lease at the router has expired.
        ({"lost_s_ago": 30.0}, "prefill prefill:1", "fail"),
    ],
)
def test_what_is_wrong_is_seen_and_nothing_else(changed, check, status):
    found = statuses(asked(**changed))
    assert found.pop(check) == status
    assert set(found.values()) == {"ok"}


def test_a_store_without_a_secret_is_fine():
    store = dataclasses.replace(STORE, about=about(secret_marks=()))
    assert {finding.status for finding in findings_of([ROUTER, store])} == {"ok"}


def test_a_worker_that_is_gone_is_named_after_its_lease_ran_out():
    gone = asked(Role.DECODE, about=None, error="nobody there", lost_s_ago=30.0)
    (finding,) = [each for each in findings_of([ROUTER, STORE, gone]) if each.check == "decode decode:1"]
    assert finding.status == "fail" and finding.detail == "the router lost this service 30 s ago; nobody there"


def test_a_router_that_is_not_there_is_all_that_is_said():
    (finding,) = findings_of([asked(Role.ROUTER, about=None, error="no route")])
    assert finding.status == "fail" and finding.detail == "no route" and "ANTEFIX_CREDENTIALS" in finding.advice
