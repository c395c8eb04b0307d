"""Every figure in a document has a record, and the check finds those that have none."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECORD = "benchmarks/results/ttft.json"


@pytest.fixture(scope="module")
def figures() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_figures", ROOT / "docs" / "check_figures.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def found(figures, tmp_path):
    """The lines of a page of docs/ or docs/results that the check reports."""

    def check(text: str, *, results: bool = False) -> list[int]:
        page = tmp_path / ("results" if results else "docs") / "PAGE.md"
        page.parent.mkdir(exist_ok=True)
        page.write_text(text)
        return [line for line, _ in figures.unbacked(page)]

    return check


def test_the_documents_are_clean(figures):
    assert not [told for path in figures.documents() for told in figures.unbacked(path)]


@pytest.mark.parametrize(
    "text",
    [
        "The store reads 1.4 GB/s.\n",
        "A look-up took 3 ms.\n",
        "A look-up took\n3 ms on one core.\n",
        "| a | b |\n| --- | --- |\n| p99, ms | took 3 ms |\n",
        "It runs at 5,890 tokens/s.\n",
    ],
)
def test_a_measured_figure_needs_a_record(found, text):
    assert found(f"# Page\n\nOther text.\n\n{text}") == [5]
    assert found(f"# Page\n\n{text.rstrip()} ({RECORD})\n") == []
    assert found(f"# Page\n\n{text.rstrip()} See docs/results/store.md.\n") == []


@pytest.mark.parametrize(
    "text",
    [
        "A request is given up after 30 s.",
        "A record has 584 bytes.",
        "`antefix bench` prints GB/s.",
        "```\n3 GB/s\n```",
    ],
)
def test_settings_sizes_and_code_are_not_measured(found, text):
    assert found(f"{text}\n") == []


def test_a_list_item_does_not_stand_for_its_neighbour(found):
    assert found(f"- It took 3 ms ({RECORD}).\n- It took 4 ms.\n") == [2]


def test_a_page_of_results_needs_a_record_per_section(found):
    generated = "<!-- figures: ttft.json x -->\n| 3 GB/s |\n<!-- end of figures -->\n"
    assert found("# Page\n\n## One\n\nIt took 3 ms.\n\n## Two\n\nIt took 4 ms.\n", results=True) == [3, 7]
    assert found(f"# Page\n\n## One\n\nIt took 3 ms.\n\n{generated}", results=True) == []
    assert found("# Page\n\n## One\n\nIt took 3 ms.\n\n*No record: measure again.*\n", results=True) == []


@pytest.mark.parametrize(
    "said", ["*Single trials: the code was not kept.*", "Published by others (<https://example.org/figures>)."]
)
def test_figures_that_cannot_be_measured_again_say_what_they_are(found, said):
    assert found(f"# Page\n\n## One\n\nIt took 3 ms.\n\n{said}\n", results=True) == []
    assert found(f"It took 3 ms. {said}\n") == [1]
    without_link = said.replace("https://", "")
    assert found(f"# Page\n\n## One\n\nIt took 3 ms. {without_link}\n", results=True) == [3] * ("Published" in said)


def test_a_record_that_is_not_there_is_told(found):
    assert found("It took 3 ms (benchmarks/results/gone.json).\n") == [1]
    assert found("`python x.py --json benchmarks/results/gone.json` measures it.\n") == []


def test_what_has_no_record_is_listed(figures, tmp_path):
    page = tmp_path / "PAGE.md"
    page.write_text("It took 3 ms.\n\n*No record: to measure\nagain: `x`.*\n")
    assert list(figures.unrecorded(page)) == ["No record: to measure again: `x`."]
