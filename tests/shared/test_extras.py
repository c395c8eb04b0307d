"""A message about a missing package names a command that installs it, wherever Antefix came from."""

from __future__ import annotations

import json
import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from antefix import extras

ROOT = Path(__file__).parents[2]
PACKAGES = (
    "antefix",
    "billing",
    "console",
    "decode",
    "engines",
    "examples",
    "kvstore",
    "prefill",
    "router",
    "simulate",
)


class _Installed:
    version = "0.2.0"

    def __init__(self, noted: str | None) -> None:
        self._noted = noted

    def read_text(self, name: str) -> str | None:
        assert name == "direct_url.json"
        return self._noted


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Antefix installed outside a checkout, with this in pip's note of where it came from."""

    def install(noted: object) -> None:
        text = json.dumps(noted) if isinstance(noted, dict) else noted
        monkeypatch.setattr(extras, "_CHECKOUT", tmp_path)
        monkeypatch.setattr(metadata, "distribution", lambda _: _Installed(text))
        monkeypatch.setattr(metadata, "version", lambda _: _Installed.version)

    return install


def test_in_a_checkout_the_extra_is_installed_from_it() -> None:
    assert extras.install_command("worker") == f"pip install '.[worker]' in the checkout {ROOT}"


@pytest.mark.parametrize(
    ("noted", "command"),
    [
        (
            {"url": "file:///a%20b/antefix-0.2.0-py3-none-any.whl", "archive_info": {}},
            "pip install '/a b/antefix-0.2.0-py3-none-any.whl[otel]'",
        ),
        ({"url": "file:///x/antefix-0.2.0.tar.gz", "archive_info": {}}, "pip install '/x/antefix-0.2.0.tar.gz[otel]'"),
        ({"url": "file:///src/antefix", "dir_info": {}}, "pip install '.[otel]' in the checkout /src/antefix"),
        (
            {"url": "https://host/antefix-0.2.0-py3-none-any.whl", "archive_info": {}},
            "pip install 'antefix[otel] @ https://host/antefix-0.2.0-py3-none-any.whl'",
        ),
        (
            {"url": "https://host/antefix.git", "vcs_info": {"vcs": "git", "commit_id": "1"}},
            "pip install 'antefix[otel] @ git+https://host/antefix.git'",
        ),
        (None, "pip install 'antefix-0.2.0-py3-none-any.whl[otel]', with the path of the release's wheel"),
        ("{", "pip install 'antefix-0.2.0-py3-none-any.whl[otel]', with the path of the release's wheel"),
        ("[]", "pip install 'antefix-0.2.0-py3-none-any.whl[otel]', with the path of the release's wheel"),
    ],
)
def test_elsewhere_the_command_names_where_antefix_came_from(installed, noted: object, command: str) -> None:
    installed(noted)
    assert extras.install_command("otel") == command


def test_without_an_installed_distribution_the_command_names_the_wheel(installed, monkeypatch) -> None:
    def missing(_: str) -> None:
        raise metadata.PackageNotFoundError

    installed(None)
    monkeypatch.setattr(metadata, "distribution", missing)
    monkeypatch.setattr(metadata, "version", missing)
    assert "antefix-VERSION-py3-none-any.whl[s3]" in extras.needs("s3://bucket", "obstore", "s3")


def test_each_named_extra_exists_and_no_message_names_the_package_index() -> None:
    """`pip install 'antefix[...]'` finds nothing on PyPI, so only `antefix.extras` words such commands."""
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            text = file.read_text()
            if file != ROOT / "antefix" / "extras.py":
                assert not re.search(r"pip install '?antefix", text), file
            for extra in re.findall(r'(?:needs\(.*, |install_command\()"(\w+)"\)', text):
                assert extra in known, (file, extra)
