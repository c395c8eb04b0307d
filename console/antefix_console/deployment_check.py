"""Checks that a deployment of several hosts fits together: asks its services, from any host, and compares the
answers.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

from antefix.clients import DecodeClient, PrefillClient, RouterClient, RouterStatus
from antefix.clients.about import About, ask_about
from antefix.clients.statuses import LostWorker
from antefix.errors import AntefixError
from antefix.security.grants import SKEW_S
from antefix.security.identity import Role
from antefix_console.finding import Finding

# A certificate that expires sooner should have been replaced by now; those of `antefix certs` are valid for 90 days.
DAYS_LEFT_MIN: Final = 14.0
# Share of the clock skew that grants allow. Above the allowed skew, grants are refused; close to it, they soon will be.
_SKEW_WARN: Final = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One service, with its answer or the reason why it did not answer.

    fingerprint: reported by workers and routers. lost_s_ago: for a worker that the router has lost, how long ago.
    """

    role: Role
    address: str
    about: About | None = None
    fingerprint: bytes = b""
    error: str = ""
    lost_s_ago: float = 0.0


def check_deployment(router: str) -> list[Finding]:
    """One finding per service, and one for each property that must be the same everywhere."""
    return list(findings_of(asyncio.run(_ask_all(router))))


async def _ask_all(router: str) -> list[Asked]:
    first = await _ask(Role.ROUTER, router)
    if first.about is None:
        return [first]
    try:
        async with RouterClient(router) as client:
            status: RouterStatus = await client.status()
    except AntefixError as err:
        return [Asked(role=Role.ROUTER, address=router, error=str(err))]
    others = [(Role(worker.role), worker.address) for worker in status.workers]
    others += [(Role.KVSTORE, address) for address in first.about.calls]
    asked = await asyncio.gather(*(_ask(role, address) for role, address in others))
    lost = await asyncio.gather(*(_ask_lost(worker) for worker in status.lost))
    return [Asked(role=Role.ROUTER, address=router, about=first.about, fingerprint=status.fingerprint), *asked, *lost]


async def _ask_lost(worker: LostWorker) -> Asked:
    """Ask a worker that the router has lost. The worker may answer this process although the router cannot reach it."""
    return replace(await _ask(Role(worker.role), worker.address), lost_s_ago=worker.seconds_ago)


async def _ask(role: Role, address: str) -> Asked:
    try:
        about = await ask_about(address, role=role)
        return Asked(role=role, address=address, about=about, fingerprint=await _fingerprint(role, address))
    except AntefixError as err:
        return Asked(role=role, address=address, error=str(err))


async def _fingerprint(role: Role, address: str) -> bytes:
    if role is Role.PREFILL:
        async with PrefillClient(address) as prefill:
            return (await prefill.status()).fingerprint
    if role is Role.DECODE:
        async with DecodeClient(address) as decode:
            return (await decode.status()).fingerprint
    return b""


def findings_of(asked: list[Asked]) -> Iterator[Finding]:
    """Pure. The first element of the result is the router."""
    for each in asked:
        yield _of_one(each)
    there = [each for each in asked if each.about is not None]
    if not there:
        return
    first = there[0]
    assert first.about is not None
    # 1. Names of KV depend on model, format, namespace, arithmetic and secret: a service where one differs hits
    # nothing.
    named = [each for each in there if each.fingerprint and each.fingerprint != first.fingerprint]
    advice = "the same model, --kv-format, --namespace and arithmetic everywhere; compare --print-config"
    yield _same("names", named, f"{first.fingerprint.hex()[:16]} everywhere", advice, "hits nothing of the others")
    marks = first.about.secret_marks
    other = [each for each in there if each.about and not set(each.about.secret_marks) & set(marks)]
    other = [each for each in other if each.about and (each.about.secret_marks or each.role is not Role.KVSTORE)]
    advice = 'give each role the same --secret-file; docs/SECURITY.md, "The deployment\'s secret"'
    yield _same("secret", other, "the same everywhere", advice, "has another secret: it hits nothing, and is refused")
    # 2. Versions may differ during an update.
    versions = sorted({each.about.version for each in there if each.about})
    mixed = len(versions) > 1
    advice = 'finish the upgrade; docs/OPERATIONS.md, "Upgrading"' if mixed else ""
    yield Finding(check="version", status="warn" if mixed else "ok", detail=", ".join(versions), advice=advice)


def _of_one(each: Asked) -> Finding:
    check = f"{each.role.value} {each.address}"
    about = each.about
    if about is None:
        advice = "is it running, and does this host reach it? Are ANTEFIX_CREDENTIALS those of an operator?"
        lost = f"the router lost this service {each.lost_s_ago:.0f} s ago; " if each.lost_s_ago else ""
        return Finding(check=check, status="fail", detail=f"{lost}{each.error}", advice=advice)
    said = [f"answers in {1e3 * about.round_trip_s:.0f} ms", f"clock {about.ahead_s:+.1f} s"]
    worst, advice = "ok", ""
    if about.certificate_ends_s:
        days = (about.certificate_ends_s - time.time()) / 86_400
        said.append(f"certificate valid for {days:.0f} days")
        if days < DAYS_LEFT_MIN:
            worst, advice = "warn", "replace its certificate: antefix certs issue"
    else:
        said.append("no TLS")
    # A difference below one round trip may be due to the network.
    skew_s = max(0.0, abs(about.ahead_s) - about.round_trip_s)
    if skew_s > SKEW_S:
        worst, advice = "fail", f"set its clock: grants are refused beyond {SKEW_S:.0f} s"
    elif skew_s > _SKEW_WARN * SKEW_S and worst == "ok":
        worst, advice = "warn", f"set its clock: grants are refused beyond {SKEW_S:.0f} s"
    if each.lost_s_ago:
        said.append(f"the router lost this service {each.lost_s_ago:.0f} s ago")
        worst, advice = "fail", "does its host reach the router? Its log says why it cannot register"
    return Finding(check=check, status=worst, detail=", ".join(said), advice=advice)


def _same(what: str, others: list[Asked], fine: str, advice: str, means: str) -> Finding:
    if not others:
        return Finding(check=f"same {what}", status="ok", detail=fine)
    detail = "; ".join(f"{each.role.value} {each.address} {means}" for each in others)
    return Finding(check=f"same {what}", status="fail", detail=detail, advice=advice)
