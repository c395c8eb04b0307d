"""Each row of docs/ARCHITECTURE.md's table of folders has an import-linter contract, and each contract has a row."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "ARCHITECTURE.md").read_text()
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())


def rows():
    """The modules of each row of the table, as import-linter names them."""
    table = DOCUMENT.partition("| room | job | must never know |\n")[2].partition("\n\n")[0]
    return [frozenset(re.findall(r"`(antefix[\w.]*)`", line.split("|")[1])) for line in table.splitlines()[1:]]


def contracts(kind):
    return [each for each in SETTINGS["tool"]["importlinter"]["contracts"] if each["type"] == kind]


def test_each_row_of_the_rooms_has_a_contract_and_each_contract_a_row():
    assert len(rows()) > 10
    assert set(rows()) == {frozenset(each["source_modules"]) for each in contracts("forbidden")}


def test_the_document_shows_the_layers_that_are_checked():
    (layers,) = contracts("layers")
    assert "```\n" + "\n".join(layers["layers"]) + "\n```" in DOCUMENT


def test_what_is_packaged_is_what_is_checked():
    packages = {Path(path).name for path in SETTINGS["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]}
    assert (
        packages == set(SETTINGS["tool"]["importlinter"]["root_packages"]) == set(SETTINGS["tool"]["mypy"]["packages"])
    )


def test_files_that_the_paths_name_exist():
    """`prefill/.../restore.py` and plain names in the two numbered paths."""
    named = set(re.findall(r"`([\w./]+\.py)`", DOCUMENT))
    # .venv and .engines are left out, because they hold tens of thousands of files.
    rooms = [room for room in ROOT.iterdir() if room.is_dir() and not room.name.startswith(".")]
    files = {str(path.relative_to(ROOT)) for room in rooms for path in room.rglob("*.py")}
    missing = [
        name
        for name in named
        if not any(
            re.fullmatch((".*/" if "/" not in name else "") + re.escape(name).replace(r"\.\.\.", ".*?"), file)
            for file in files
        )
    ]
    assert len(named) > 20 and not missing
