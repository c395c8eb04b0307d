"""The results of verification: cases by strategy and plan, and the largest error with its place."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from antefix_console.verify.compare import IDENTICAL, Difference


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One comparison. bound: largest relative error that is allowed; 0: bits must be equal."""

    strategy: str
    plan: str
    subject: str
    kv_format: str
    hit_tokens: int
    prompt_tokens: int
    bound: float
    difference: Difference
    problem: str = ""

    @property
    def verdict(self) -> str:
        """bit_identical, within_bounds or failed."""
        if self.problem:
            return "failed"
        if self.difference.identical:
            return "bit_identical"
        return "within_bounds" if 0 < self.difference.error <= self.bound else "failed"

    @property
    def place(self) -> str:
        prompt = f"{self.subject}/{self.kv_format}, {self.plan}, {self.hit_tokens} of {self.prompt_tokens} tokens hit"
        return f"{self.problem or self.difference.where} ({prompt})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cases:
    """Adds cases of one model to a report."""

    report: Report
    subject: str
    kv_format: str

    def add(
        self,
        strategy: str,
        plan: str,
        num_tokens: int,
        difference: Difference = IDENTICAL,
        *,
        hit_tokens: int = 0,
        bound: float = 0.0,
        problem: str = "",
    ) -> None:
        self.report.add(
            Case(
                strategy=strategy,
                plan=plan,
                subject=self.subject,
                kv_format=self.kv_format,
                hit_tokens=hit_tokens,
                prompt_tokens=num_tokens,
                bound=bound,
                difference=difference,
                problem=problem,
            )
        )


@dataclass(slots=True)
class Tally:
    """Counts of some cases."""

    cases: int = 0
    bit_identical: int = 0
    within_bounds: int = 0
    failed: int = 0
    max_error: float = 0.0
    where: str = ""
    bound: float = 0.0

    def add(self, case: Case) -> None:
        self.cases += 1
        setattr(self, case.verdict, getattr(self, case.verdict) + 1)
        self.bound = max(self.bound, case.bound)
        if case.difference.error > self.max_error or (case.verdict == "failed" and not self.where):
            self.max_error = max(self.max_error, case.difference.error)
            self.where = case.place

    def as_dict(self) -> dict[str, Any]:
        return {
            "cases": self.cases,
            "bit_identical": self.bit_identical,
            "within_bounds": self.within_bounds,
            "failed": self.failed,
            "max_error": self.max_error,
            "where": self.where,
            "bound": self.bound,
        }


@dataclass(slots=True)
class Report:
    """All cases. The field `ok` decides the command's exit code."""

    total: Tally = field(default_factory=Tally)
    by_strategy: dict[str, Tally] = field(default_factory=dict)
    by_plan: dict[str, dict[str, Tally]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return self.total.cases > 0 and self.total.failed == 0

    def add(self, case: Case) -> None:
        plans = self.by_plan.setdefault(case.strategy, {})
        tallies = self.total, self.by_strategy.setdefault(case.strategy, Tally()), plans.setdefault(case.plan, Tally())
        for tally in tallies:
            tally.add(case)
        if case.verdict == "failed":
            self.failures.append(case.place)

    def as_dict(self) -> dict[str, Any]:
        rows = [
            {"strategy": strategy}
            | tally.as_dict()
            | {"plans": {plan: part.as_dict() for plan, part in self.by_plan[strategy].items()}}
            for strategy, tally in self.by_strategy.items()
        ]
        return {"ok": self.ok} | self.total.as_dict() | {"rows": rows, "failures": self.failures}
