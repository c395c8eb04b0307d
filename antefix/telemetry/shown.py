"""Shows counters that are kept in other objects as Prometheus metrics: a table says which field is shown under which
name.

A table has a row for each field, so that a test can find fields that are not shown. Names follow Prometheus'
convention: the unit comes last (`_seconds`, `_bytes`). The `_total` of counters is left out here, because the output
format adds it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric


class Kind(StrEnum):
    COUNTER = "counter"
    GAUGE = "gauge"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """The metric of one field. labels: what tells this field from other fields of the same metric. A text field counts
    as 1 if it is not empty; of a mapping, each entry is shown, with its key under the label `key`.
    """

    name: str
    help: str
    kind: Kind = Kind.COUNTER
    labels: tuple[tuple[str, str], ...] = ()
    key: str = ""


Table = Mapping[str, Shown]


def families(table: Table, values: Any, labels: Mapping[str, str] | None = None) -> Iterator[Metric]:
    """The metrics of one object, or of a mapping with these names. labels: labels that all of these metrics get."""
    common = dict(labels or {})
    made: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
    for field, shown in table.items():
        value = values[field] if isinstance(values, Mapping) else getattr(values, field)
        own = dict(shown.labels)
        names = [*common, *own, *([shown.key] if shown.key else [])]
        family = made.get(shown.name)
        if family is None:
            kind = CounterMetricFamily if shown.kind is Kind.COUNTER else GaugeMetricFamily
            family = made[shown.name] = kind(shown.name, shown.help, labels=names)
        rows = list(value.items()) if shown.key else [("", value)]
        for key, number in rows:
            where = [*common.values(), *own.values(), *([str(key)] if shown.key else [])]
            family.add_metric(where, float(bool(number)) if isinstance(number, str) else float(number))
    yield from made.values()


def gauge(name: str, help_text: str, rows: Mapping[Any, float], labels: tuple[str, ...] = ()) -> Metric:
    """One gauge metric, with a value for each combination of labels."""
    family = GaugeMetricFamily(name, help_text, labels=labels)
    for where, value in rows.items():
        family.add_metric(where, value)
    return family


def counter(name: str, help_text: str, rows: Mapping[Any, float], labels: tuple[str, ...] = ()) -> Metric:
    """One counter metric, with a value for each combination of labels."""
    family = CounterMetricFamily(name, help_text, labels=labels)
    for where, value in rows.items():
        family.add_metric(where, value)
    return family
