"""One call of a model as some log tells of it, and a count of what a log had besides such calls. Knows no format."""

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
    """One call: its prompt as text or as tokens, and what the log says of it.

    at_s: Unix seconds; None where the log has no times.
    text: the prompt in the order in which it is cached: tools, system prompt, messages.  tokens: instead of text.
    num_tokens, output_tokens: as the log says; None where it does not.  output_bytes: of the answer, to guess it by.
    cached_tokens: how many of the prompt the log's own provider took from its cache; None where it does not say.
    head, head_tokens: what stood before the text and is not in the log, such as a client's system prompt: calls with
        one `head` have the same there.
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
    """What was not taken over, by reason: said once, at the end."""

    reasons: Counter[str] = field(default_factory=Counter)

    def count(self, reason: str, number: int = 1) -> None:
        self.reasons[reason] += number

    def lines(self) -> list[str]:
        return [f"{number} {reason}" for reason, number in self.reasons.most_common()]


# Reads a file from its beginning, once for each pass.
LogReader = Callable[[Path, Ignored], Iterator[LoggedCall]]
