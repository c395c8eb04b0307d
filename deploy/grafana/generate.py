"""Writes the dashboards next to this file: `python deploy/grafana/generate.py`. Import them in Grafana as they are.

One row per panel of a dashboard: title, unit, and its expressions with their legends. Each panel has the job and the
interval as variables.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Panel = tuple[str, str, dict[str, str]]

R = "$__rate_interval"


def quantiles(metric: str, by: str = "") -> dict[str, str]:
    """The median and the 99th percentile of a histogram."""
    group, legend = (f", {by}", f" {{{{{by}}}}}") if by else ("", "")
    rate = f"sum by (le{group}) (rate({metric}_bucket[{R}]))"
    return {f"{name}{legend}": f"histogram_quantile({q}, {rate})" for name, q in (("median", 0.5), ("p99", 0.99))}


CACHE: list[Panel] = [
    (
        "Hit rate, of prompt tokens",
        "percentunit",
        {
            "all": f"sum(rate(antefix_hit_tokens_total[{R}])) / sum(rate(antefix_prompt_tokens_total[{R}]))",
            "{{tier}}": f"sum by (tier) (rate(antefix_hit_tokens_total[{R}]))"
            f" / ignoring(tier) group_left sum(rate(antefix_prompt_tokens_total[{R}]))",
        },
    ),
    ("Prompt tokens by plan", "short", {"{{plan}}": f"sum by (plan) (rate(antefix_prompt_tokens_total[{R}]))"}),
    ("Why tokens miss", "short", {"{{reason}}": f"sum by (reason) (rate(antefix_miss_tokens_total[{R}]))"}),
    ("Replayed tokens", "short", {"{{plan}}": f"sum by (plan) (rate(antefix_replayed_tokens_total[{R}]))"}),
    ("Newly stored tokens", "short", {"{{part}}": f"sum by (part) (rate(antefix_written_tokens_total[{R}]))"}),
    (
        "Restores: real time over predicted",
        "short",
        {
            "{{plan}}": f"sum by (plan) (rate(antefix_plan_actual_seconds_total[{R}]))"
            f" / sum by (plan) (rate(antefix_plan_predicted_seconds_total[{R}]))"
        },
    ),
    ("Error of predictions", "percentunit", quantiles("antefix_plan_error_ratio", "plan")),
    (
        "Blocks in workers' pools",
        "short",
        {
            "resident {{instance}}": "antefix_pool_resident_blocks",
            "available {{instance}}": "antefix_pool_available_blocks",
            "all {{instance}}": "antefix_pool_blocks",
        },
    ),
    (
        "What went wrong with the store, seen by workers",
        "short",
        {
            "{{error}}": f"sum by (error) (rate(antefix_worker_store_errors_by_kind_total[{R}]))",
            "not stored: {{reason}}": f"sum by (reason) (rate(antefix_worker_unstored_records_by_reason_total[{R}]))",
            "short reads": f"sum(rate(antefix_worker_short_reads_total[{R}]))",
            "broken seals": f"sum(rate(antefix_worker_broken_seals_total[{R}]))",
        },
    ),
]
SERVING: list[Panel] = [
    (
        "Requests by how they ended",
        "reqps",
        {"{{status}}": f"sum by (status) (rate(antefix_ledger_records_total[{R}]))"},
    ),
    ("Time to first token", "s", quantiles("antefix_time_to_first_token_seconds", "plan")),
    ("Between two tokens", "s", quantiles("antefix_between_tokens_seconds")),
    ("Waiting for a prefill worker's turn", "s", quantiles("antefix_prefill_wait_seconds")),
    ("Waiting for a worker's compute thread", "s", quantiles("antefix_compute_wait_seconds", by="work")),
    ("Whole requests", "s", quantiles("antefix_request_seconds", "status")),
    (
        "HTTP answers",
        "reqps",
        {"{{status}} {{path}}": f"sum by (path, status) (rate(antefix_http_requests_total[{R}]))"},
    ),
    (
        "Running",
        "short",
        {
            "router": "sum(antefix_running_requests)",
            "prefill": "sum(antefix_prefill_running_prompts)",
            "prefill, waiting": "sum(antefix_prefill_waiting_prompts)",
            "decode": "sum(antefix_decode_running_sequences)",
        },
    ),
    ("Placements", "short", {"{{role}} {{attempt}}": f"sum by (role, attempt) (rate(antefix_placements_total[{R}]))"}),
    (
        "Calls of workers",
        "short",
        {"{{role}} {{outcome}}": f"sum by (role, outcome) (rate(antefix_worker_calls_total[{R}]))"},
    ),
    ("Prompts in flight", "short", {"{{way}}": f"sum by (way) (rate(antefix_router_prefills_total[{R}]))"}),
    ("Retries", "short", {"{{way}}": f"sum by (way) (rate(antefix_router_retries_total[{R}]))"}),
    (
        "Tokens per second",
        "short",
        {
            "prompt": f"sum(rate(antefix_prompt_tokens_total[{R}]))",
            "output": f"sum(rate(antefix_output_tokens_total[{R}]))",
        },
    ),
    ("Failures by error", "short", {"{{error}}": f"sum by (error) (rate(antefix_failed_requests_total[{R}]))"}),
]
STORE: list[Panel] = [
    (
        "Space",
        "bytes",
        {
            "used": "antefix_store_used_bytes",
            "may use now": "antefix_store_limit_bytes",
            "budget": "antefix_store_budget_bytes",
            "dead": "antefix_store_dead_bytes",
            "index": "antefix_store_index_bytes",
        },
    ),
    (
        "Free on its disk",
        "bytes",
        {"free": "antefix_store_disk_free_bytes", "left to others": "antefix_store_disk_free_min_bytes"},
    ),
    ("Records", "short", {"{{kind}}": "antefix_store_records"}),
    (
        "Compression, payload over stored",
        "short",
        {"{{kind}}": "antefix_store_payload_bytes / antefix_store_stored_bytes"},
    ),
    (
        "Reads",
        "short",
        {
            "found": f"rate(antefix_store_read_records_total[{R}])",
            "missed": f"rate(antefix_store_missed_records_total[{R}])",
        },
    ),
    (
        "Bytes",
        "Bps",
        {
            "read": f"rate(antefix_store_read_bytes_total[{R}])",
            "written": f"rate(antefix_store_written_bytes_total[{R}])",
            "compacted": f"rate(antefix_store_compacted_bytes_total[{R}])",
            "scrubbed": f"rate(antefix_store_scrubbed_bytes_total[{R}])",
        },
    ),
    (
        "Puts",
        "short",
        {"records": f"rate(antefix_store_put_records_total[{R}])", "syncs": f"rate(antefix_store_syncs_total[{R}])"},
    ),
    ("Sync", "s", quantiles("antefix_store_sync_seconds")),
    ("Evictions", "short", {"{{cause}}": f"sum by (cause) (rate(antefix_store_evicted_records_total[{R}]))"}),
    (
        "Quarantined and refused",
        "short",
        {
            "{{cause}}": f"sum by (cause) (rate(antefix_store_quarantined_records_total[{R}]))",
            "refused": f"rate(antefix_store_refused_records_total[{R}])",
            "impossible": f"rate(antefix_store_impossible_writes_total[{R}])",
        },
    ),
    (
        "In memory: handoffs and pooled checkpoints",
        "bytes",
        {"{{kind}}": "antefix_store_memory_bytes", "limit": "antefix_store_memory_limit_bytes"},
    ),
    ("Waiting for the writer", "bytes", {"queued": "antefix_store_queued_bytes"}),
    ("Stopped", "bool", {"stopped": "antefix_store_stopped"}),
]
BILL: list[Panel] = [
    ("Charged an hour", "short", {"{{currency}}": "sum by (currency) (increase(antefix_charged_money_total[1h]))"}),
    ("Saved by hits an hour", "short", {"{{currency}}": "sum by (currency) (increase(antefix_saved_money_total[1h]))"}),
    (
        "Charged an hour, by tenant",
        "short",
        {"{{tenant}}": "sum by (tenant) (increase(antefix_tenant_charged_money_total[1h]))"},
    ),
    (
        "Prompt tokens by tenant",
        "short",
        {"{{tenant}}": f'sum by (tenant) (rate(antefix_tenant_tokens_total{{part="prompt"}}[{R}]))'},
    ),
    (
        "Hit rate by tenant",
        "percentunit",
        {
            "{{tenant}}": f'sum by (tenant) (rate(antefix_tenant_tokens_total{{part="hit"}}[{R}]))'
            f' / sum by (tenant) (rate(antefix_tenant_tokens_total{{part="prompt"}}[{R}]))'
        },
    ),
    (
        "Records by how requests ended",
        "short",
        {"{{status}}": f"sum by (status) (rate(antefix_ledger_records_total[{R}]))"},
    ),
    (
        "Requests a sync of the ledger",
        "short",
        {"entries": f"rate(antefix_ledger_entries_total[{R}]) / rate(antefix_ledger_batches_total[{R}])"},
    ),
    ("Sync of the ledger", "s", quantiles("antefix_ledger_sync_seconds")),
    ("The ledger's reserve", "bytes", {"{{instance}}": "antefix_ledger_reserve_bytes"}),
    (
        "Requests whose KV could not all be stored",
        "short",
        {"requests": f"sum(rate(antefix_unstored_requests_total[{R}]))"},
    ),
]
DASHBOARDS = {"cache": CACHE, "serving": SERVING, "store": STORE, "bill": BILL}

_WIDTH, _HEIGHT, _COLUMNS = 12, 8, 2


def dashboard(name: str, panels: list[Panel]) -> dict[str, Any]:
    return {
        "uid": f"antefix-{name}",
        "title": f"Antefix: {name}",
        "tags": ["antefix"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {
            "list": [{"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus"}]
        },
        "panels": [_panel(number, *panel) for number, panel in enumerate(panels)],
    }


def _panel(number: int, title: str, unit: str, expressions: dict[str, str]) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${source}"}
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": title,
        "datasource": source,
        "gridPos": {
            "x": number % _COLUMNS * _WIDTH,
            "y": number // _COLUMNS * _HEIGHT,
            "w": _WIDTH,
            "h": _HEIGHT,
        },
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + index), "datasource": source, "expr": expression, "legendFormat": legend}
            for index, (legend, expression) in enumerate(expressions.items())
        ],
    }


def text_of(name: str) -> str:
    return json.dumps(dashboard(name, DASHBOARDS[name]), indent=1) + "\n"


if __name__ == "__main__":
    for each in DASHBOARDS:
        (Path(__file__).parent / f"{each}.json").write_text(text_of(each))
