"""An audit's result as a report that can be sent to others: in Markdown, and as text for a terminal."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from antefix.text_table import visible
from antefix_console.audit.finding import Finding, Verdict
from antefix_console.audit.promises import Promises

_TITLES = {
    Verdict.VIOLATION: "Broken promises",
    Verdict.FACT: "How the cache behaves",
    Verdict.UNKNOWN: "What could not be told",
}
_METHOD = """\
Prompts are random words that nobody has sent before, so the first request of each is cold and the second may hit.
A count that is wrong once is a violation. Times and answers vary by chance: there a violation needs a p-value (how
likely such a difference is if there is none) below the limit of its probe. Times: one-sided two-sample
Kolmogorov-Smirnov test, limit 1e-8, as in Gu et al., arXiv 2502.07776, and Fahey, arXiv 2605.30613 (both with 250
samples; fewer find less, and do not accuse more). Answers: Fisher's exact test on texts and Mann-Whitney's on log
probabilities, cold against hit, next to hit against hit; limit 1e-3. Lifetimes: Fisher's exact test, limit 1e-4."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditReport:
    """endpoint: its URL, without any key.  at: when the audit began."""

    endpoint: str
    model: str
    api: str
    at: datetime.datetime
    version: str
    promises: Promises
    requests: int
    tokens: int
    samples: int
    dollars: float | None
    findings: Sequence[Finding]

    @property
    def violations(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.verdict is Verdict.VIOLATION]

    def as_dict(self) -> dict[str, Any]:
        return {
            "endpoint": self.endpoint,
            "model": self.model,
            "api": self.api,
            "at": self.at.isoformat(timespec="seconds"),
            "version": self.version,
            "held_to": self.promises.name,
            "requests": self.requests,
            "tokens": self.tokens,
            "samples": self.samples,
            "dollars": self.dollars,
            "violations": len(self.violations),
            "findings": [finding.as_dict() for finding in self.findings],
        }

    def as_markdown(self) -> str:
        found = len(self.violations)
        verdict = f"**{found} broken promise{'s' * (found != 1)}.**" if found else "No broken promise was found."
        cost = "" if self.dollars is None else f", {self.dollars:.2f} dollars"
        lines = [
            "# Audit of a prefix cache",
            "",
            f"{verdict}",
            "",
            f"- Endpoint: {visible(self.endpoint)}, API {self.api}, model {visible(self.model)}",
            f"- When: {self.at.isoformat(timespec='seconds')}, by `antefix audit` {self.version}",
            f"- Held to: {self.promises.name} ({self.promises.source})",
            f"- Sent: {self.requests} requests, {self.tokens:,} tokens{cost}; {self.samples} samples per test",
        ]
        for verdict_kind, title in _TITLES.items():
            some = [finding for finding in self.findings if finding.verdict is verdict_kind]
            if some:
                lines += ["", f"## {title}", "", *(_line(finding) for finding in some)]
        return "\n".join([*lines, "", "## Method", "", _METHOD, "", "## Figures", "", *self._figures()]) + "\n"

    def _figures(self) -> list[str]:
        rows = [{"probe": each.probe, "says": each.says} | each.figures for each in self.findings if each.figures]
        return ["```json", *(json.dumps(row) for row in rows), "```"]


def _line(finding: Finding) -> str:
    notes = []
    if finding.p_value is not None:
        notes.append(f"p = {finding.p_value:.2g}")
    if finding.samples:
        notes.append(f"{finding.samples} samples")
    return f"- {finding.probe}: {visible(finding.says)}" + (f" ({', '.join(notes)})" if notes else "")
