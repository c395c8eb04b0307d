"""Dashboards and alerts name existing metrics. Each row of OPERATIONS' table has an alert and a runbook."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import yaml

from tests.telemetry.test_counters_are_shown import all_names

DEPLOY = Path(__file__).parents[2] / "deploy"
OPERATIONS = (DEPLOY.parent / "docs" / "OPERATIONS.md").read_text()
RULES = yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"][0]["rules"]
# The endings that the format adds to the names of counters and histograms.
ENDINGS = ("_total", "_bucket", "_sum", "_count", "")


def generator():
    spec = importlib.util.spec_from_file_location("generate_dashboards", DEPLOY / "grafana" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def names_in(expression):
    return set(re.findall(r"\bantefix_[a-z_]+", expression))


def unknown(expression):
    known = all_names()
    return {name for name in names_in(expression) if not any(name.removesuffix(end) in known for end in ENDINGS)}


def rows():
    table = OPERATIONS[OPERATIONS.index("| what you see |") :].split("\n\n")[0]
    return [line.split(" | ") for line in table.splitlines()[2:]]


@pytest.mark.parametrize("name", ["bill", "cache", "serving", "store"])
def test_a_dashboard_names_metrics_that_there_are(name):
    board = json.loads((DEPLOY / "grafana" / f"{name}.json").read_text())
    expressions = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    assert len(expressions) > 9 and all(names_in(each) for each in expressions)
    assert not set().union(*(unknown(each) for each in expressions))
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


@pytest.mark.parametrize("name", ["bill", "cache", "serving", "store"])
def test_a_dashboard_is_as_it_is_generated(name):
    assert (DEPLOY / "grafana" / f"{name}.json").read_text() == generator().text_of(name)


def test_an_unknown_metric_name_is_found():
    assert unknown("rate(antefix_hit_tokens_total[5m]) / antefix_no_such_thing_total") == {
        "antefix_no_such_thing_total"
    }


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_names_metrics_that_there_are_and_has_a_runbook(rule):
    assert not unknown(rule["expr"])
    assert f"\n#### {rule['alert']}\n" in OPERATIONS
    assert rule["annotations"]["runbook"] == f"docs/OPERATIONS.md#{rule['alert'].lower()}"


def test_each_row_of_the_table_has_one_alert():
    # Two rows may share an alert, with different symptoms and actions.
    alerts = list(dict.fromkeys(row[4].strip(" |`") for row in rows()))
    assert alerts == [rule["alert"] for rule in RULES]
    assert re.findall(r"^#### (Antefix\w+)$", OPERATIONS, re.M) == alerts


def test_the_runbook_names_metrics_that_there_are():
    book = OPERATIONS[OPERATIONS.index("### Runbook") : OPERATIONS.index("Exit codes of every command")]
    words = re.findall(r"`([a-z]+_[a-z_]+)(?:\{[^`]*)?`", book)
    metrics = {f"antefix_{word}" for word in words} - {"antefix_impossible_write", "antefix_cache_control"}
    reasons = {f"antefix_{word}" for word in words if word.endswith(("differs", "missing", "unavailable", "seen"))}
    settings = {"antefix_max_tokens"}
    assert not set().union(*(unknown(each) for each in metrics - reasons - settings))
