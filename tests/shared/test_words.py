"""The check of words that `make lint` runs: which words it refuses, and which files it reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from docs import check_words


@pytest.mark.parametrize(
    ("text", "is_refused"),
    [
        ("It lies beside the index.", True),
        ("Besides, it is sealed.", False),
        ("8 bytes a token", True),
        ("8 bytes per token", False),
        ("1,300 requests a second", True),
        ("how many bytes a token takes", False),
        ("so many blocks a request may hit", False),
        ("The index is made anew.", True),
        ("Whoever reads it checks it.", True),
        ("4 GiB a card", True),
        ("The caller hands on its id.", True),
        ("It is refused for want of room.", True),
        ("It passes on its id.", False),
    ],
)
def test_a_stumbling_word_is_refused_and_others_are_not(text: str, is_refused: bool) -> None:
    assert bool(list(check_words.complaints(text))) is is_refused


def test_of_code_only_comments_and_strings_are_read(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text('beside = 1  # made anew\nname = f"8 bytes a token{1}"\n')
    words = [complaint for _, text in check_words.texts(file) for complaint in check_words.complaints(text)]
    assert words[0].startswith('"anew"') and words[1].startswith('"bytes a token"') and len(words) == 2
