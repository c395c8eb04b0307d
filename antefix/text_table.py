"""Plain-text tables for terminals and files, made with rich: wide characters stay aligned, and no text is cut off."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

# Wider than any table, so that no line is wrapped, also in a file.
_WIDTH = 10_000


def text_table(head: Sequence[str], rows: Iterable[Sequence[str]], *, num_left: int = 1) -> str:
    """One line per row, after the line with the column heads. The first `num_left` columns are left-aligned, the others
    right-aligned.
    """
    # Imported here, so that only programs that print a table load rich.
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
    """The text with invisible and control characters escaped, so that a terminal shows them: U+001F becomes \\x1f."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
