"""What an audit found: facts, violations, and questions that it could not answer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any


class Verdict(StrEnum):
    """FACT: how the endpoint behaves.  VIOLATION: it breaks a promise.  UNKNOWN: the audit could not find out."""

    FACT = "fact"
    VIOLATION = "violation"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """probe: the name of the probe that found it. says: the finding in one sentence. figures: the numbers behind it.

    p_value: the probability of such figures by chance; None where no test is needed (a count that is wrong once is
    wrong).
    samples: the number of comparisons behind the finding.
    """

    probe: str
    verdict: Verdict
    says: str
    figures: dict[str, Any] = field(default_factory=dict)
    p_value: float | None = None
    samples: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"verdict": self.verdict.value}


def fact(probe: str, says: str, **figures: Any) -> Finding:
    return Finding(probe=probe, verdict=Verdict.FACT, says=says, figures=figures)


def unknown(probe: str, says: str, **figures: Any) -> Finding:
    return Finding(probe=probe, verdict=Verdict.UNKNOWN, says=says, figures=figures)
