"""Tables of plain text for terminals and files, by rich: wide characters keep their columns, nothing is cut off."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

# Wider than any table: a table that is piped into a file keeps its lines whole.
_WIDTH = 10_000


def text_table(head: Sequence[str], rows: Iterable[Sequence[str]], *, num_left: int = 1) -> str:
    """One line a row below the head; the first `num_left` columns to the left, the others, numbers, to the right."""
    # Only who prints a table waits for rich.
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="")
    for index, name in enumerate(head):
        table.add_column(Text(visible(name)), justify="left" if index < num_left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(visible(cell)) for cell in row))
    out = io.StringIO()
    Console(file=out, width=_WIDTH, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def visible(text: str) -> str:
    """The text with what a terminal would not show, or would obey, spelled out: U+001F becomes \\x1f."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
