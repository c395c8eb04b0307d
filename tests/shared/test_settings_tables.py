"""The tables of settings in the documents have the words and defaults of the commands' own help."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_settings", ROOT / "docs" / "generate_settings.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow  # imports every role
def test_the_documents_agree_with_the_help(generator):
    differing = [path.name for path in generator.documents() if generator.filled(path.read_text()) != path.read_text()]
    assert not differing, "run `python docs/generate_settings.py`"


def test_a_setting_is_shown_with_its_unit_and_default(generator):
    asked = "<!-- settings: serve fleet --health-s --directory-blocks --plain-network -->\n<!-- end of settings -->"
    rows = generator.filled(asked).split("\n")[3:6]
    assert [row.split(" | ")[-1] for row in rows] == ["2 s |", "4,194,304 |", "false |"]
    assert rows[2].startswith("| `--plain-network true\\|false` | reach workers on other hosts")


def test_three_dots_stand_for_the_rest_of_the_command(generator):
    asked = "<!-- settings: verify --stores ... -->\n<!-- end of settings -->"
    rows = generator.filled(asked).split("\n")[3:-1]
    assert [row.split("`")[1].split()[0] for row in rows] == ["--stores", "--object-store", "--data-dir"]


def test_a_flag_that_does_not_exist_is_an_error(generator):
    with pytest.raises(KeyError, match="--no-such"):
        generator.filled("<!-- settings: verify --no-such -->\n<!-- end of settings -->")
