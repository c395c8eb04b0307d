"""`import antefix` offers the public names, is cheap, and is typed."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import antefix
import antefix.errors
from tests.child_environment import child_environment

_CHECKOUT = Path(__file__).parents[2]
_SOURCE = Path(antefix.__file__)


def test_every_public_name_is_there_and_documented() -> None:
    for name in antefix.__all__:
        value = getattr(antefix, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert (value.__doc__ or "").strip(), name
    assert set(antefix.__all__) <= set(dir(antefix))
    with pytest.raises(AttributeError, match="has no attribute 'RooterClient'"):
        antefix.RooterClient  # noqa: B018 - asking is what raises


def test_type_checkers_see_the_names_that_run_time_gives() -> None:
    seen = {
        alias.asname
        for node in ast.walk(ast.parse(_SOURCE.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("antefix.")
        for alias in node.names
    }
    assert seen == set(antefix.__all__)


def test_all_errors_are_public() -> None:
    errors = {name for name, kind in vars(antefix.errors).items() if inspect.isclass(kind)}
    assert errors <= set(antefix.__all__)


@pytest.mark.services
def test_importing_the_package_loads_neither_grpc_nor_torch() -> None:
    program = "import sys, antefix; print([m for m in ('grpc', 'torch', 'numpy', 'lmdb') if m in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, env=child_environment()
        ).stdout.strip()
        == "[]"
    )


@pytest.mark.services
def test_clients_and_stores_need_no_torch() -> None:
    program = (
        "import sys, antefix, antefix_kvstore; [getattr(antefix, name) for name in antefix.__all__];"
        "import antefix_kvstore.embedded_store; print('torch' in sys.modules)"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, env=child_environment()
        ).stdout.strip()
        == "False"
    )


def test_every_installed_package_says_that_it_is_typed() -> None:
    settings = tomllib.loads((_CHECKOUT / "pyproject.toml").read_text())
    packages = settings["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert len(packages) > 8
    assert [path for path in packages if not (_CHECKOUT / path / "py.typed").is_file()] == []
