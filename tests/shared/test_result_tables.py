"""Documents show the figures of benchmarks/results, and old figures are listed."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from benchmarks import record_age, run_record, tables

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def results() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_results", ROOT / "docs" / "generate_results.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def one_record(results, tmp_path, monkeypatch):
    """A folder with one record, `a.json`, and its table `speeds`."""

    def write(**record):
        (tmp_path / "a.json").write_text(json.dumps(record))

    def speeds(record):
        yield "case", "GB/s"
        yield "cold", f"{record['cold']:.1f}"

    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(tables, "NAMED", {})
    monkeypatch.setattr(tables, "TABLES", {("a.json", "speeds"): tables.Table(speeds, ("code/",))})
    return write


def test_documents_show_what_the_records_say(results):
    differ = [str(path) for path in results.documents() if results.filled(path.read_text()) != path.read_text()]
    assert not differ, "run: python docs/generate_results.py"


def test_each_table_is_in_a_document_and_names_code_that_is_there(results):
    text = "".join(path.read_text() for path in results.documents())
    for (file, name), table in tables.TABLES.items():
        assert f"<!-- figures: {file} {name} -->" in text
        assert table.measures and all((ROOT / path).exists() for path in table.measures)


def test_a_table_carries_its_run(results, one_record):
    one_record(cold=1.25, commit="0123456789", date="2026-11-29T10:00:00", machine="two cores", command="python a.py")
    before = "Text.\n\n<!-- figures: a.json speeds -->\nan old table\n<!-- end of figures -->\n\nMore.\n"
    after = results.filled(before)
    assert "| case | GB/s |\n| --- | ---: |\n| cold | 1.2 |\n" in after
    assert "commit 01234567; 2026-11-29; two cores; `python a.py`" in after
    assert after.startswith("Text.\n") and after.endswith("\nMore.\n") and "old table" not in after
    assert results.filled(after) == after


def test_a_document_that_asks_for_an_unknown_table_is_refused(results, one_record):
    one_record(cold=1.0)
    with pytest.raises(KeyError):
        results.filled("<!-- figures: a.json other -->\n<!-- end of figures -->\n")


BEFORE = "def f():\n    '''One.'''\n    log.info('said %s', 1)\n    return 1  # why\n"


@pytest.mark.parametrize(
    ("record", "now", "told"),
    [
        ({"commit": "abcdef0123"}, BEFORE.replace("One", "Said otherwise").replace("why", "because"), []),
        ({"commit": "abcdef0123"}, BEFORE.replace("said", "told"), []),
        ({"commit": "abcdef0123"}, BEFORE.replace("return 1", "return 2"), ["since abcdef01 changed: code/a.py (f)"]),
        ({"commit": "abcdef0123"}, "", ["since abcdef01 changed: code/a.py"]),
        ({"commit": "abcdef0123"}, None, ["names commit abcdef01, which is not in this repository's history"]),
        (
            {"recorded": {"commit": "abcdef0123", "date": ""}},
            BEFORE.replace("return 1", "return 2"),
            ["since abcdef01 changed: code/a.py (f)"],
        ),
        ({}, "", ["names no commit"]),
    ],
)
def test_figures_older_than_their_code_are_listed(results, one_record, record, now, told):
    def git(*arguments):
        if now is None or (not now and arguments == ("show", "HEAD:code/a.py")):
            raise subprocess.CalledProcessError(128, "git")
        if arguments[0] == "diff":
            assert arguments == ("diff", "--name-only", "abcdef0123", "HEAD", "--", "code/")
            return "code/a.py\n"
        return {"abcdef0123:code/a.py": BEFORE, "HEAD:code/a.py": now}[arguments[1]]

    one_record(cold=1.0, **record)
    assert [text for _, text in record_age.stale(results.RESULTS, git)] == told


def test_a_record_that_names_its_code_is_aged_by_that_code_and_by_data_only(results, one_record):
    """The run loaded c.py, which no table names. It did not load a.py, and it may have read d.json."""
    one_record(cold=1.0, commit="abcdef0123", code=["other/c.py"])

    def git(*arguments):
        if arguments[0] == "diff":
            return {"code/": "code/a.py\ncode/d.json\ncode/e.md\n", "other/c.py": "other/c.py\n"}[arguments[-1]]
        return f"a = {len(arguments[1].partition(':')[0])}"

    told = "since abcdef01 changed: code/d.json, other/c.py (module)"
    assert list(record_age.stale(results.RESULTS, git)) == [("a.json", told)]


def test_all_tables_of_a_record_say_what_it_measures(results, one_record, monkeypatch):
    one_record(cold=1.0, commit="abcdef0123")
    first = tables.TABLES["a.json", "speeds"]
    monkeypatch.setitem(tables.TABLES, ("a.json", "others"), tables.Table(first.rows, ("more/",)))
    asked = []
    list(record_age.stale(results.RESULTS, lambda *arguments: asked.append(arguments) or ""))
    assert [arguments[-2:] for arguments in asked] == [("code/", "more/")]


def test_a_run_names_the_files_that_it_loaded_unless_it_may_start_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(run_record, "ROOT", tmp_path)
    modules: dict[str, ModuleType] = {}
    monkeypatch.setattr(run_record, "sys", SimpleNamespace(modules=modules))
    texts = {
        "antefix/block.py": "import os",
        "antefix/v1/usage_pb2.py": "",
        "benchmarks/speed.py": "",
        ".venv/lib/torch.py": "import subprocess",
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        module = ModuleType(name)
        module.__file__ = str(tmp_path / name)
        modules[name] = module
    assert run_record.loaded_code() == ["antefix/block.py", "proto/antefix/v1/usage.proto"]
    (tmp_path / "benchmarks/speed.py").write_text("    import subprocess\n")
    assert run_record.loaded_code() == []


def test_a_file_that_only_draws_makes_no_record_old(results, one_record):
    one_record(cold=1.0, commit="abcdef0123")
    assert (
        list(record_age.stale(results.RESULTS, lambda *arguments: "code/plot.py\n" if arguments[0] == "diff" else ""))
        == []
    )


def test_records_without_a_table_say_what_they_measure():
    assert all((ROOT / path).exists() for paths in tables.NAMED.values() for path in paths)


def test_a_record_of_earlier_code_is_not_listed_and_says_so(results, one_record, monkeypatch):
    one_record(cold=1.0, commit="abcdef0123")
    monkeypatch.setattr(tables, "HISTORY", frozenset({"a.json"}))
    assert list(record_age.stale(results.RESULTS, lambda *arguments: "")) == []
    after = results.filled("<!-- figures: a.json speeds -->\n<!-- end of figures -->\n")
    assert "of earlier code, kept for comparison.*" in after


def test_a_repeated_part_confirms_a_record(results, one_record):
    repeated = {"commit": "fedcba9876", "date": "2026-11-30T10:00:00", "part": "one scene"}
    one_record(cold=1.0, commit="abcdef0123", repeated=repeated)
    asked = []
    assert list(record_age.stale(results.RESULTS, lambda *arguments: asked.append(arguments) or "")) == []
    assert [arguments[2] for arguments in asked] == ["fedcba9876"]
    after = results.filled("<!-- figures: a.json speeds -->\n<!-- end of figures -->\n")
    assert "one scene run again at fedcba98, 2026-11-30: the same figures" in after


def test_a_run_that_named_no_commit_is_said_to_be_one(results, one_record):
    one_record(cold=1.0, recorded={"commit": "0123abcd", "date": "2026-11-22"})
    after = results.filled("<!-- figures: a.json speeds -->\n<!-- end of figures -->\n")
    assert "the run named no commit; recorded in 0123abcd, 2026-11-22" in after


def test_a_record_of_several_runs_says_so(results):
    run = {"commit": "c" * 40, "date": "2026-01-01", "command": "python benchmarks/faults.py --add"}
    assert "earlier run" not in results.provenance("faults_recovery.json", run)
    assert "added to 1 earlier run, which" in results.provenance("faults_recovery.json", {**run, "runs": [run]})
    assert "added to 2 earlier runs, which" in results.provenance("faults_recovery.json", {**run, "runs": [run, run]})
