"""docs/SECURITY.md's list of attacks: the tests, metrics and flags that it names exist."""

import re
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
DOCUMENT = (ROOT / "docs" / "SECURITY.md").read_text()


def rows():
    table = DOCUMENT[DOCUMENT.index("| attacker has |") :].split("\n\n")[0]
    return [line.strip("|").split(" | ") for line in table.splitlines()[2:]]


def test_each_attack_names_tests_that_there_are():
    assert len(rows()) > 30
    for row in rows():
        assert len(row) == 4, row
        named = re.findall(r"`(tests/[\w/]+/|)(test_\w+\.py)`", row[3])
        assert named, row
        folders = [(ROOT / folder if folder else HERE, name) for folder, name in named]
        assert [name for folder, name in folders if not (folder / name).is_file()] == []


def test_what_the_document_names_is_there():
    """The metrics and flags that the document names exist."""
    rooms = ("antefix", "billing", "console", "decode", "kvstore", "prefill", "router")
    text = "".join(path.read_text() for room in rooms for path in (ROOT / room).rglob("*.py"))
    for metric in re.findall(r"`(antefix_[a-z_]+)`", DOCUMENT):
        assert f'"{metric.removesuffix("_total")}"' in text, metric
    for flag in set(re.findall(r"`?--([a-z-]+)", DOCUMENT)) - {"port"}:
        assert flag.replace("-", "_") in text or f'"--{flag}"' in text, flag
