"""Metrics of what requests used, counted when a ledger record is written, so that they agree with the bill."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from prometheus_client import Counter
from prometheus_client.core import Metric

from antefix.telemetry.exposition import SECONDS, SHORT_SECONDS, histogram
from antefix.telemetry.top_names import TopNames
from antefix.usage import Evidence
from antefix_billing.usage_record import Status, UsageRecord

# How many tenants are shown by name. All others are summed under one name.
NUM_TENANTS_MAX: Final = 20
# A label must not be empty: Prometheus treats an empty label as absent.
NONE: Final = "none"


class RequestMeasures:
    """One router's metrics since its start. A request that a crash left open counts when it is closed, at the next
    start.
    """

    def __init__(self) -> None:
        def counter(name: str, help_text: str, *labels: str) -> Counter:
            return Counter(name, help_text, labels, registry=None)

        self._records = counter("antefix_ledger_records", "Requests that ended, by how.", "status", "plan")
        self._failed = counter(
            "antefix_failed_requests", "Requests that Antefix ended with an error, by the error's class.", "error"
        )
        self._prompt = counter("antefix_prompt_tokens", "Prompt tokens of requests that were worked on.", "plan")
        self._hit = counter("antefix_hit_tokens", "Prompt tokens that were not computed.", "tier", "plan")
        self._miss = counter(
            "antefix_miss_tokens",
            "Prompt tokens that were computed, by the reason why the first of them missed.",
            "reason",
            "plan",
        )
        self._replayed = counter(
            "antefix_replayed_tokens", "Hit tokens that were run again to rebuild window state.", "plan"
        )
        self._written = counter("antefix_written_tokens", "Tokens newly stored, of prompts and outputs.", "part")
        self._output = counter("antefix_output_tokens", "Output tokens that clients were given.")
        self._reasoning = counter("antefix_reasoning_tokens", "Output tokens of reasoning that clients were given.")
        self._charged = counter("antefix_charged_money", "What requests were charged.", "currency")
        self._saved = counter(
            "antefix_saved_money",
            "What requests would have been charged more if their hits had been misses.",
            "currency",
        )
        self._tenant_tokens = counter(
            "antefix_tenant_tokens",
            f"Tokens of the {NUM_TENANTS_MAX} largest tenants and the others.",
            "tenant",
            "part",
        )
        self._tenant_charged = counter(
            "antefix_tenant_charged_money",
            "What the largest tenants and the others were charged.",
            "tenant",
            "currency",
        )
        self._first_token_s = histogram(
            "antefix_time_to_first_token_seconds", "Time from a request to its first token.", ("plan",), buckets=SECONDS
        )
        self._request_s = histogram(
            "antefix_request_seconds", "Time from a request to its end.", ("status",), buckets=SECONDS
        )
        self._between_tokens_s = histogram(
            "antefix_between_tokens_seconds",
            "Time between two tokens of an output, as they arrive.",
            buckets=SHORT_SECONDS,
        )
        self._tenants = TopNames(NUM_TENANTS_MAX, self._drop)
        self._all = (
            *(self._records, self._failed, self._prompt, self._hit, self._miss, self._replayed, self._written),
            *(self._output, self._reasoning, self._charged, self._saved),
            *(self._tenant_tokens, self._tenant_charged),
            *(self._first_token_s, self._request_s, self._between_tokens_s),
        )

    def count(self, record: UsageRecord) -> None:
        """Count a record that was just written."""
        plan = record.restore_plan or NONE
        self._records.labels(record.status.value, plan).inc()
        if record.status is Status.FAILED:
            self._failed.labels(record.detail or NONE).inc()
        if record.prompt_tokens:
            self._prompt.labels(plan).inc(record.prompt_tokens)
            tier = "memory" if record.evidence is Evidence.PROVED else record.evidence.label
            self._hit.labels(tier, plan).inc(record.hit_memory_tokens)
            self._hit.labels("store", plan).inc(record.hit_store_tokens)
            self._miss.labels(record.miss_reason.label, plan).inc(record.cache_miss_tokens)
            self._replayed.labels(plan).inc(record.replayed_tokens)
        self._written.labels("prompt").inc(record.cache_write_tokens)
        self._written.labels("output").inc(record.output_write_tokens)
        self._output.inc(record.output_tokens)
        self._reasoning.inc(record.reasoning_tokens)
        self._request_s.labels(record.status.value).observe((record.finished_us - record.started_us) / 1e6)
        if record.ttft_us:
            self._first_token_s.labels(plan).observe(record.ttft_us / 1e6)
        currency = record.currency or NONE
        self._charged.labels(currency).inc(float(record.price))
        self._saved.labels(currency).inc(float(record.saved))
        self._count_tenant(record, currency)

    def note_pace(self, seconds: float, num_tokens: int) -> None:
        """Record that this many tokens came together, after this time of waiting."""
        for _ in range(num_tokens):
            self._between_tokens_s.observe(seconds / num_tokens)

    def metrics(self) -> Iterable[Metric]:
        for each in self._all:
            yield from each.collect()

    def _count_tenant(self, record: UsageRecord, currency: str) -> None:
        tenant = self._tenants.place(record.tenant or NONE, record.prompt_tokens + record.output_tokens)
        parts = {
            "prompt": record.prompt_tokens,
            "hit": record.cache_hit_tokens,
            "replayed": record.replayed_tokens,
            "written": record.written_tokens,
            "output": record.output_tokens,
        }
        for part, number in parts.items():
            self._tenant_tokens.labels(tenant, part).inc(number)
        self._tenant_charged.labels(tenant, currency).inc(float(record.price))

    def _drop(self, tenant: str) -> None:
        for each in (self._tenant_tokens, self._tenant_charged):
            each.remove_by_labels({"tenant": tenant})
