"""What the clients of a replay saw, as figures and as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from antefix.text_table import text_table
from antefix_console.load.replay import Sent

_PERCENTILES = (50, 90, 99)
# Only so many errors are printed; of the rest, only the number.
_ERRORS_SHOWN = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Percentiles and mean of times in seconds; all are zero if there are no times."""

    p50: float
    p90: float
    p99: float
    mean: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if not values:
            return cls(p50=0.0, p90=0.0, p99=0.0, mean=0.0)
        p50, p90, p99 = (float(each) for each in np.percentile(values, _PERCENTILES))
        return cls(p50=p50, p90=p90, p99=p99, mean=float(np.mean(values)))


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """seconds: from the first request to the end of the last answer.

    hit_rate: reported hit tokens over reported prompt tokens; None where the endpoint reports no hits.
    ideal_hit_rate: hit rate of an unlimited cache that has each prompt as soon as it was sent, in the trace's tokens.
    late: how much later than planned the requests were sent.  Requests are not retried: a refusal counts as an error.
    """

    num_requests: int
    num_ok: int
    seconds: float
    ttft: Spread
    inter_token: Spread
    total: Spread
    late: Spread
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    hit_rate: float | None
    ideal_hit_rate: float
    errors: dict[str, int]

    @property
    def requests_per_s(self) -> float:
        return self.num_ok / self.seconds if self.seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"requests_per_s": self.requests_per_s}


def summarise(sent: Sequence[Sent]) -> LoadReport:
    good = [each for each in sent if each.reply.ok]
    usages = [each.reply.usage for each in good]
    prompt_tokens = sum(usage.prompt_tokens for usage in usages)
    cached_tokens = sum(usage.cached_tokens for usage in usages)
    reports = any(usage.reports_hits for usage in usages)
    trace_tokens = sum(each.planned.trace_tokens for each in sent)
    return LoadReport(
        num_requests=len(sent),
        num_ok=len(good),
        seconds=max((each.at_s + each.reply.total_s for each in sent), default=0.0),
        ttft=Spread.of([each.reply.ttft_s for each in good if each.reply.ttft_s]),
        inter_token=Spread.of([gap for each in good for gap in each.reply.gaps_s]),
        total=Spread.of([each.reply.total_s for each in good]),
        late=Spread.of([each.late_s for each in sent]),
        prompt_tokens=prompt_tokens,
        cached_tokens=cached_tokens,
        output_tokens=sum(usage.output_tokens for usage in usages),
        hit_rate=cached_tokens / prompt_tokens if reports and prompt_tokens else None,
        ideal_hit_rate=sum(each.planned.ideal_tokens for each in sent) / trace_tokens if trace_tokens else 0.0,
        errors=dict(Counter(each.reply.error for each in sent if not each.reply.ok).most_common(_ERRORS_SHOWN)),
    )


def as_text(report: LoadReport) -> str:
    times = text_table(
        ("milliseconds, lower is better", "p50", "p90", "p99", "mean"),
        [
            (name, *(f"{1e3 * value:.1f}" for value in (spread.p50, spread.p90, spread.p99, spread.mean)))
            for name, spread in (
                ("time to first token", report.ttft),
                ("between tokens", report.inter_token),
                ("whole answer", report.total),
                ("sent late by", report.late),
            )
        ],
    )
    hit_rate = "not reported" if report.hit_rate is None else f"{100 * report.hit_rate:.1f}%"
    lines = [
        f"{report.num_ok} of {report.num_requests} requests answered in {report.seconds:.1f} s "
        f"({report.requests_per_s:.2f} per second)",
        f"{report.prompt_tokens:,} prompt tokens, {report.cached_tokens:,} of them hits; "
        f"{report.output_tokens:,} output tokens",
        f"hit rate {hit_rate}; an endless cache would have {100 * report.ideal_hit_rate:.1f}%",
        "",
        times,
    ]
    if report.errors:
        rows = [(error, str(number)) for error, number in report.errors.items()]
        lines += ["", text_table(("errors", "requests"), rows)]
    return "\n".join(lines)
