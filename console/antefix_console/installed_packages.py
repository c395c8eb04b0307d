"""Checks that Antefix's requirements are installed, and new enough, from the package's own metadata.

Pip checks versions only when it installs a package. Installing another package later may change the versions. Nobody
checks them then, and the fault shows much later as a failed import.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from antefix.extras import install_command
from antefix_console.finding import Finding

_REQUIREMENT: Final = re.compile(r"\s*([A-Za-z0-9._-]+)(?:\[[^\]]*\])?\s*\(?([^;)]*)\)?\s*(?:;(.*))?")
_EXTRA: Final = re.compile(r"extra\s*==\s*['\"]([^'\"]+)['\"]")
# Packages that a worker needs in addition to those that every process needs.
_WORKER: Final = ("torch", "safetensors")
# Not checked: users do not install these, and a file of their own pins them.
_NOT_CHECKED: Final = ("dev",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirement:
    """at_least: the lowest version, empty for any. extra: the extra that requires it; empty if every process does."""

    name: str
    at_least: str
    extra: str


def package_findings() -> list[Finding]:
    """One row per requirement of every process, of workers, and of extras that are at least partly installed."""
    try:
        lines = importlib.metadata.requires("antefix") or []
    except importlib.metadata.PackageNotFoundError:
        advice = "install it, such as with pip install -e ."
        return [Finding(check="packages", status="warn", detail="antefix itself is not installed", advice=advice)]
    return list(_findings(requirements(lines)))


def requirements(lines: Iterable[str]) -> list[Requirement]:
    """The requirements in lines of metadata, such as "lmdb>=3.0" and "torch>=2.11; extra == 'worker'"."""
    found = []
    for line in lines:
        match = _REQUIREMENT.match(line)
        if match is None or match[1].lower() == "antefix":
            continue
        extra = _EXTRA.search(match[3] or "")
        bound = next((part[2:].strip() for part in match[2].split(",") if part.strip().startswith(">=")), "")
        found.append(Requirement(name=match[1].lower(), at_least=bound, extra=extra[1] if extra else ""))
    return [each for each in found if each.extra not in _NOT_CHECKED]


def is_older(version: str, bound: str) -> bool:
    """Whether a version is below a bound, comparing numbers only: 2.13.0+cpu is 2.13.0, 3.0.0rc1 counts as 3.0.0."""
    one, other = _numbers(version), _numbers(bound)
    length = max(len(one), len(other))
    return one + (0,) * (length - len(one)) < other + (0,) * (length - len(other))


def _findings(wanted: Iterable[Requirement]) -> Iterator[Finding]:
    seen: set[str] = set()
    for each in sorted(wanted, key=lambda one: (one.extra != "", one.name not in _WORKER)):
        if each.name in seen:
            continue
        seen.add(each.name)
        try:
            version = importlib.metadata.version(each.name)
        except importlib.metadata.PackageNotFoundError:
            if each.extra == "":
                yield Finding(check=each.name, status="fail", detail="not installed", advice=install_command(""))
            elif each.name in _WORKER:
                detail = "not installed: no prefill or decode worker can run here"
                yield Finding(check=each.name, status="warn", detail=detail, advice=install_command("worker"))
            continue
        if each.at_least and is_older(version, each.at_least):
            detail = f"{version}, and {each.at_least} is the oldest that works"
            advice = f"pip install '{each.name}>={each.at_least}'"
            yield Finding(check=each.name, status="fail", detail=detail, advice=advice)
        else:
            yield Finding(check=each.name, status="ok", detail=version)


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"[0-9]+(?:\.[0-9]+)*", version.partition("!")[2] or version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()
