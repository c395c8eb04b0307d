"""docs/API.md has the docstring of every public name."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

import antefix

_DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_api", _DOCS / "generate_api.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.impatient  # the document names time limits
def test_the_document_is_what_the_docstrings_say(generator: ModuleType) -> None:
    assert generator.API_FILE.read_text() == generator.api_text(), "run `make docs-api`"


def test_every_public_name_and_method_is_in_it(generator: ModuleType) -> None:
    text = generator.api_text()
    for name in antefix.__all__:
        if name != "__version__":
            assert f"### `{name}" in text, name
    assert [line for line in text.splitlines() if line.startswith("- `") and line.endswith("`: ")] == []
    for name in ("EmbeddedStore", "antefix_kvstore.open"):
        assert f"### `{name}" in text, name
