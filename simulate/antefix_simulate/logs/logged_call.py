"""One model call found in a log, and counts of all other entries in the log. Knows no format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedCall:
    """One model call: its prompt as text or tokens, and the facts that the log has about it.

    at_s: Unix seconds; None if the log has no times.
    text: the prompt in the order in which it is cached: tools, system prompt, messages.  tokens: given instead of text.
    num_tokens, output_tokens: from the log; None if it has none.  output_bytes: size of the answer, for an estimate.
    cached_tokens: prompt tokens that the log's own provider read from its cache; None if not logged.
    head, head_tokens: the part of the prompt before the text, which is not in the log, such as a client's system
    prompt:
        calls with equal `head` have the same one.
    """

    at_s: float | None
    text: bytes = b""
    tokens: Tokens | None = None
    num_tokens: int | None = None
    output_tokens: int | None = None
    output_bytes: int = 0
    cached_tokens: int | None = None
    head: str = ""
    head_tokens: int = 0
    session: str = ""
    user: str = ""


@dataclass(slots=True)
class Ignored:
    """Counts of log entries that were not used, by reason; reported once, at the end."""

    reasons: Counter[str] = field(default_factory=Counter)

    def count(self, reason: str, number: int = 1) -> None:
        self.reasons[reason] += number

    def lines(self) -> list[str]:
        return [f"{number} {reason}" for reason, number in self.reasons.most_common()]


# Reads a file from its beginning; called once for each pass.
LogReader = Callable[[Path, Ignored], Iterator[LoggedCall]]
