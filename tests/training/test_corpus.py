"""The training text: its sources, its split, and that decoding returns the text."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.training import corpus


@pytest.fixture
def stdlib(tmp_path: Path) -> Path:
    root = tmp_path / "lib"
    (root / "pydoc_data").mkdir(parents=True)
    (root / "site-packages").mkdir()
    (root / "pydoc_data" / "topics.py").write_text("topics = {'assert': 'The assert statement. ' * 20}\n")
    for index in range(60):
        (root / f"module_{index}.py").write_text(f"# module {index}\n" + "x = 1\n" * 50)
    (root / "site-packages" / "other.py").write_text("licensed otherwise\n" * 50)
    (root / "latin.py").write_bytes("# caf\xe9\n".encode("latin-1") * 50)
    (root / "nul.py").write_bytes(b"a\0b\n" * 100)
    return root


def test_only_readable_files_of_the_library_itself_are_taken(stdlib: Path) -> None:
    names = [name for name, _ in corpus.documents(stdlib)]
    assert len(names) == 61
    assert names[-1] == "reference/assert.txt"
    assert not {"latin.py", "nul.py", "site-packages/other.py"} & set(names)


def test_both_halves_come_back_as_tokens_with_document_starts(stdlib: Path, tmp_path: Path) -> None:
    sizes = corpus.build(stdlib, tmp_path / "out")
    halves = {half: corpus.load(tmp_path / "out" / f"{half}.xz") for half in ("train", "valid")}
    assert {half: len(tokens) for half, tokens in halves.items()} == sizes
    assert sum(int((tokens == corpus.BOS).sum()) for tokens in halves.values()) == 61
    assert halves["train"][0] == corpus.BOS
    assert halves["train"].max() == corpus.BOS


def test_the_split_depends_on_the_path_alone(stdlib: Path) -> None:
    names = [f"package/module_{index}.py" for index in range(5000)]
    held_out = [name for name in names if corpus.is_validation(name)]
    assert held_out == [name for name in names if corpus.is_validation(name)]
    assert 0.02 < len(held_out) / len(names) < 0.07
