"""The whole audit: its cost in requests and tokens, the probes in order, and their findings."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from antefix.errors import InvalidRequest, Unavailable
from antefix_console.audit import granularity, isolation, lifetime, retries, sameness, timing, trace_ideal
from antefix_console.audit.finding import Finding, unknown
from antefix_console.audit.probing import Probing
from antefix_console.audit.sender import BudgetSpent
from antefix_console.load.prompt_text import measure_token_rate

Probe = Callable[[Probing, "Plan"], Awaitable[list[Finding]]]

# In the order in which they run: the cheapest first; last the lifetime probe, which waits.
PROBES: dict[str, Probe] = {
    granularity.PROBE: lambda probing, plan: granularity.find_granularity(probing),
    timing.PROBE: lambda probing, plan: timing.find_timing(probing),
    sameness.PROBE: lambda probing, plan: sameness.find_sameness(probing),
    isolation.PROBE: lambda probing, plan: isolation.find_isolation(probing),
    retries.PROBE: lambda probing, plan: retries.find_retries(probing),
    trace_ideal.PROBE: lambda probing, plan: trace_ideal.find_ideal(probing),
    lifetime.PROBE: lambda probing, plan: lifetime.find_lifetime(probing, plan.waits_s),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Which probes to run, and how large they are.

    waits_s: waits of the lifetime probe; if there are none, that probe is left out.
    """

    prompt_tokens: int = 2048
    samples: int = 250
    waits_s: tuple[float, ...] = ()
    probes: tuple[str, ...] = tuple(PROBES)

    def __post_init__(self) -> None:
        if self.prompt_tokens < 256 or self.samples < 2:
            raise InvalidRequest("an audit needs prompts of at least 256 tokens, and at least 2 samples per test")
        if unknown_probes := set(self.probes) - set(PROBES):
            raise InvalidRequest(f"unknown probes {sorted(unknown_probes)}: use some of {', '.join(PROBES)}")

    def requests(self) -> dict[str, int]:
        """The largest number of requests of each probe, retries not counted."""
        found = {
            granularity.PROBE: granularity.NUM_REQUESTS,
            timing.PROBE: timing.num_requests(self.samples),
            sameness.PROBE: sameness.num_requests(self.samples),
            isolation.PROBE: isolation.num_requests(self.samples),
            retries.PROBE: retries.NUM_REQUESTS,
            trace_ideal.PROBE: trace_ideal.NUM_REQUESTS,
            lifetime.PROBE: lifetime.num_requests(self.waits_s) if self.waits_s else 0,
        }
        return {name: number for name, number in found.items() if name in self.probes and number}

    @property
    def num_requests(self) -> int:
        return sum(self.requests().values()) + 2

    @property
    def num_tokens(self) -> int:
        """About how many tokens the whole audit takes. Prompts of the trace grow to twice the usual length."""
        return int(1.1 * self.prompt_tokens * self.num_requests)


async def run_audit(probing: Probing, plan: Plan, on_probe: Callable[[str], None]) -> list[Finding]:
    """All findings. A probe that ran out of budget, or that the endpoint stopped, reports this; the other probes still
    run.

    Raises:  Unavailable: the endpoint does not answer a first request.
    """
    sender = probing.sender
    sender.rate = await measure_token_rate(lambda question: sender.send(probing.scope, question), 0)
    probing.prompt_words = sender.rate.num_words(plan.prompt_tokens)
    findings: list[Finding] = []
    for name in plan.requests():
        on_probe(name)
        try:
            findings += await PROBES[name](probing, plan)
        except (BudgetSpent, Unavailable) as err:
            findings.append(unknown(name, f"not finished: {err}"))
    return [*sender.findings(), *findings]
