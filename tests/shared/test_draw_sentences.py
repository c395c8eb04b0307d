"""Sentences are drawn from what readers see, and the same seed draws the same ones."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = """# A heading that is not a sentence at all

The first sentence has more than six words. The second one does as well, see `a.b`. Short.

| a table | whose cells are no sentences of the text |

- An item of a list that is long enough.

```
code that is not drawn although it is long
```

The last sentence stands behind the code above.

    code that is indented is not drawn either

- An item with a fence and a table has this sentence: Its colon does not end it.
  ```
  code that a list's item holds and nobody draws
  ```
  | cells in | an item with words | are left out too |
"""
MODULE = '''"""A module's first line has enough words here.

    python module.py --with enough --words in a code that is a command

Second line.
"""
def f(parser, logger, name):
    "Short."
    parser.add_argument("--x", help="how many of them are read at once")
    logger.warning("the store %s does not answer in time", name)
    raise Overloaded(f"block {name} is not in the store any more")
'''


@pytest.fixture(scope="module")
def drawing() -> ModuleType:
    spec = importlib.util.spec_from_file_location("draw_sentences", ROOT / "docs" / "draw_sentences.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def found(drawing, tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "PAGE.md").write_text(DOCUMENT)
    (tmp_path / "module.py").write_text(MODULE)
    return drawing.sentences(tmp_path)


def test_sentences_carry_their_kind_and_line(found):
    told = {sentence.text: (sentence.kind, sentence.place) for sentence in found}
    assert told["The first sentence has more than six words."] == ("document", "docs/PAGE.md:3")
    assert told["The second one does as well, see `a.b`."] == ("document", "docs/PAGE.md:3")
    assert told["An item of a list that is long enough."] == ("document", "docs/PAGE.md:7")
    assert told["The last sentence stands behind the code above."] == ("document", "docs/PAGE.md:13")
    assert "An item with a fence and a table has this sentence: Its colon does not end it." in told
    assert told["A module's first line has enough words here."] == ("docstring", "module.py:1")
    assert told["how many of them are read at once"] == ("help", "module.py:9")
    assert told["the store %s does not answer in time"] == ("message", "module.py:10")
    assert told["block {name} is not in the store any more"] == ("message", "module.py:11")


def test_headings_tables_code_and_short_sentences_are_left_out(found):
    text = " ".join(sentence.text for sentence in found)
    assert all(word not in text for word in ("heading", "cells", "code that", "Short"))


def test_the_same_seed_draws_the_same_and_each_kind_alike(drawing):
    made = [drawing.Sentence(kind, str(n), "") for kind in drawing.KINDS for n in range(50)]
    drawn = drawing.draw(made, 7, 20)
    assert drawn == drawing.draw(made, 7, 20) != drawing.draw(made, 8, 20)
    assert [sum(one.kind == kind for one in drawn) for kind in drawing.KINDS] == [5, 5, 5, 5]


def test_one_kind_alone_gets_all(drawing):
    made = [drawing.Sentence("help", str(n), "") for n in range(9)]
    assert len(drawing.draw(made, 1, 6)) == 6 and len(drawing.draw(made, 1, 60)) == 9
