"""Progress of a command: one line on standard error, which is overwritten and is removed at the end."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

# At this rate, updating the terminal takes no noticeable time.
_UPDATES_A_SECOND = 10


class ProgressLine:
    """`with ProgressLine("reading") as progress:`; silent where standard error is not a terminal.

    The line is animated, so the user sees that a long step is still running.
    lines: without a terminal, print a line per step with the seconds so far instead: for logs of long runs.
    """

    def __init__(self, label: str, *, lines: bool = False) -> None:
        self._label = label
        self._is_terminal = sys.stderr.isatty()
        self._lines = lines and not self._is_terminal
        self._started = time.monotonic()
        self._shown: RichProgress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        if self._is_terminal:
            # Imported only where there is a terminal, because importing rich takes time.
            from rich.console import Console
            from rich.progress import Progress as RichProgress
            from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

            self._shown = RichProgress(
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                TimeElapsedColumn(),
                console=Console(file=sys.stderr),
                refresh_per_second=_UPDATES_A_SECOND,
                transient=True,
            )
            self._shown.start()
            self._task = self._shown.add_task(self._label, total=None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shown is not None:
            self._shown.stop()
            self._shown = None

    def step(self, text: str) -> None:
        """Set the text that says what the command is doing."""
        if self._shown is not None and self._task is not None:
            self._shown.update(self._task, description=f"{self._label}: {text}")
        elif self._lines:
            print(f"{time.monotonic() - self._started:7.1f} s  {text}", file=sys.stderr, flush=True)

    def count(self, done: int, total: int) -> None:
        """Set the progress. The call is cheap enough to be made for each of millions of items."""
        if self._shown is not None and self._task is not None:
            self._shown.update(self._task, description=f"{self._label}: {done:,} of {total:,}")
