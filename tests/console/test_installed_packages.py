"""Doctor reports a package that is too old to work, no matter who installed it."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest

from antefix_console import installed_packages
from antefix_console.installed_packages import is_older, package_findings, requirements

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())


@pytest.mark.parametrize(
    ("version", "bound", "older"),
    [
        ("2.3.0", "3.0", True),
        ("3.0.0", "3.0", False),
        ("3.0", "3.0.0", False),
        ("1.9", "1.10", True),
        ("2.13.0+cpu", "2.11", False),
        ("6.31.1", "6.31.1", False),
        ("6.31", "6.31.1", True),
        ("2026.1", "3", False),
    ],
)
def test_versions_are_compared_by_their_numbers(version: str, bound: str, older: bool) -> None:
    assert is_older(version, bound) is older


@pytest.mark.parametrize(("name", "version"), [("lmdb", "2.3.0"), ("protobuf", "5.29.0"), ("torch", "2.4.1")])
def test_a_package_that_is_too_old_fails_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, name: str, version: str
) -> None:
    lines = PROJECT["project"]["dependencies"] + [
        f"{line}; extra == '{extra}'"
        for extra, rows in PROJECT["project"]["optional-dependencies"].items()
        for line in rows
    ]
    real = importlib.metadata.version
    monkeypatch.setattr(installed_packages.importlib.metadata, "requires", lambda _: lines)
    monkeypatch.setattr(
        installed_packages.importlib.metadata, "version", lambda each: version if each == name else real(each)
    )
    found = {finding.check: finding for finding in package_findings()}
    assert found[name].status == "fail"
    assert version in found[name].detail
    assert "pip install" in found[name].advice
    assert {check for check, finding in found.items() if finding.status == "fail"} == {name}


def test_each_bound_of_the_project_is_read() -> None:
    read = {each.name: each.at_least for each in requirements(PROJECT["project"]["dependencies"])}
    assert len(read) == len(PROJECT["project"]["dependencies"])
    assert all(read.values())


def test_protos_are_compiled_for_the_oldest_runtime_that_is_allowed() -> None:
    """The compiler's output refuses an older runtime at import, so the build's compiler decides the lower bound."""
    (compiler,) = (line for line in PROJECT["build-system"]["requires"] if line.startswith("grpcio-tools"))
    pinned = compiler.partition("==")[2]
    bounds = {each.name: each.at_least for each in requirements(PROJECT["project"]["dependencies"])}
    for name in ("grpcio", "grpcio-health-checking", "grpcio-reflection"):
        assert not is_older(bounds[name], re.match(r"[0-9]+\.[0-9]+", pinned)[0])  # type: ignore[index]
