"""docs/SECURITY.md's list of attacks: each row names tests that there are, and each file of attacks has a row."""

import re
from pathlib import Path

HERE = Path(__file__).parent
DOCUMENT = (HERE.parents[1] / "docs" / "SECURITY.md").read_text()


def rows():
    table = DOCUMENT[DOCUMENT.index("| attacker has |") :].split("\n\n")[0]
    return [line.strip("|").split(" | ") for line in table.splitlines()[2:]]


def test_each_attack_names_tests_that_there_are():
    assert len(rows()) > 30
    for row in rows():
        assert len(row) == 4, row
        named = re.findall(r"`(test_\w+\.py)`", row[3])
        assert named, row
        assert [name for name in named if not (HERE / name).is_file()] == []


def test_each_file_of_attacks_is_in_the_list():
    files = {path.name for path in HERE.glob("test_*.py")} - {Path(__file__).name}
    assert files - set(re.findall(r"`(?:tests/security/)?(test_\w+\.py)`", DOCUMENT)) == set()


def test_what_the_document_names_is_there():
    """Metrics and flags that it tells of."""
    root = HERE.parents[1]
    rooms = ("antefix", "billing", "console", "decode", "kvstore", "prefill", "router")
    text = "".join(path.read_text() for room in rooms for path in (root / room).rglob("*.py"))
    for metric in re.findall(r"`(antefix_[a-z_]+)`", DOCUMENT):
        assert f'"{metric.removesuffix("_total")}"' in text, metric
    for flag in set(re.findall(r"`?--([a-z-]+)", DOCUMENT)) - {"port"}:
        assert flag.replace("-", "_") in text or f'"--{flag}"' in text, flag
