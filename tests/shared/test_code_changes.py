"""A record becomes old when its code does something else, and not when only its words or types change."""

from __future__ import annotations

import pytest

from benchmarks.code_changes import changed_parts

BEFORE = '''"""Job."""

from __future__ import annotations

import time
from dataclasses import dataclass

from antefix.block import Chain

LIMIT = 4


@dataclass
class Load:
    """How much."""

    size: int = 0


def waited(chain: Chain, most: float = 1.0) -> float:
    """How long."""
    total: float = 0.0  # seconds
    if most < 0:
        raise ValueError(f"{most} is below 0")
    time.sleep(min(most, LIMIT))
    return total


def asked() -> None:
    log.warning("slow: %s", waited(None))
    parser.add_argument("--most", default=1.0, help="seconds")
'''


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# seconds", "# in seconds, as the caller asked"),
        ('"""How long."""', '"""Wait, and return the time in seconds."""'),
        ('"""Job."""', '"""Waits."""'),
        ('    """How much."""\n\n', ""),
        ("min(most, LIMIT)", "min(\n        most,\n        LIMIT,\n    )"),
        ("LIMIT = 4", "\nLIMIT = 4\n"),
        ("from antefix.block import Chain", "from antefix.chains import Chain"),
        ("chain: Chain, most: float = 1.0) -> float", "chain: Chain | None, most: float = 1.0) -> int"),
        ("total: float = 0.0", "total = 0.0"),
        ('f"{most} is below 0"', '"most is below 0: give 0 or more"'),
        ('"slow: %s"', '"this took long: %s"'),
        ('help="seconds"', 'help="the longest wait in seconds"'),
        ("import time\n", "import time\nfrom typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    from a import B\n"),
        ("def asked", "def added(most):\n    return most\n\n\ndef asked"),
    ],
)
def test_words_types_and_layout_age_no_figure(old: str, new: str) -> None:
    assert BEFORE.count(old) == 1
    assert changed_parts("a.py", BEFORE, BEFORE.replace(old, new)) == []


def test_the_order_of_functions_ages_no_figure() -> None:
    head, waited, asked = BEFORE.partition("def waited")[0], *BEFORE.split("\n\n\n")[2:]
    assert changed_parts("a.py", BEFORE, f"{head}{asked}\n\n{waited}") == []


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("LIMIT = 4", "LIMIT = 5", ["module"]),
        ("most: float = 1.0", "most: float = 2.0", ["waited"]),
        ("default=1.0", "default=2.0", ["asked"]),
        ("most < 0", "most <= 0", ["waited"]),
        ("raise ValueError", "raise TypeError", ["waited"]),
        ("size: int = 0", "size: int = 1", ["Load"]),
        ("    size: int = 0", "    size: int = 0\n    count: int = 0", ["Load"]),
        ("size: int = 0", "size: float = 0", ["Load"]),
        ("@dataclass\n", "@dataclass(frozen=True)\n", ["Load"]),
        ("import time\n", "import other as time\n", ["module"]),
        ("from dataclasses import dataclass", "from attrs import dataclass", ["module"]),
        ("from antefix.block import Chain", "from antefix.block import Chain\nfrom antefix import setup", ["module"]),
        # A function that hides a name that was in use is not new code that nobody calls.
        ("LIMIT = 4", "LIMIT = 4\n\n\ndef min(a, b):\n    return b\n", ["min"]),
        ("LIMIT = 4", "LIMIT = 4\n\n\n@register\ndef added():\n    pass\n", ["added"]),
    ],
)
def test_a_change_of_what_code_does_ages_figures(old: str, new: str, told: list[str]) -> None:
    assert BEFORE.count(old) == 1
    assert changed_parts("a.py", BEFORE, BEFORE.replace(old, new)) == told


def test_a_function_that_moved_to_another_file_ages_figures() -> None:
    start, end = BEFORE.index("def waited"), BEFORE.index("def asked")
    without = BEFORE[:start] + BEFORE[end:]
    assert "waited" in changed_parts("a.py", BEFORE, without)


def test_an_annotation_that_triton_reads_ages_figures() -> None:
    kernel = "@triton.jit\ndef copy(pointer, BLOCK: tl.constexpr):\n    pass\n"
    assert changed_parts("a.py", kernel, kernel.replace(": tl.constexpr", "")) == ["copy"]


def test_a_comment_of_a_protocol_file_ages_no_figure() -> None:
    before = "// Old words.\nmessage A {\n  int32 size = 1;  // bytes\n}\n"
    assert changed_parts("a.proto", before, "message A {\n  int32 size = 1;\n}\n") == []
    assert changed_parts("a.proto", before, before.replace("= 1", "= 2")) == ["a.proto"]
