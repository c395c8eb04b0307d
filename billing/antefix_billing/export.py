"""Exports records to billing systems as CloudEvents batches, JSON Lines, CSV or Parquet. The export holds only one
batch in memory at a time.

CloudEvents 1.0 in JSON: (source, id) is unique, so a receiver that gets an event twice may drop the second (OpenMeter
does). `subject` is the tenant. Exported usage has one event type; meters group events by model, status and other
fields.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import IO, Any

from antefix.errors import ConfigError
from antefix.extras import needs
from antefix_billing.adjustment import Adjusted
from antefix_billing.ledger_files import Settled
from antefix_billing.usage_record import FIELD_TYPES

EVENT_TYPE = "antefix.usage"
ADJUSTMENT_TYPE = "antefix.adjustment"
# OpenMeter's documented limit is on the bytes of a request body; 1,000 events are under 1 MiB.
EVENTS_A_BATCH = 1000
_ROWS_A_GROUP = 16384
_MONEY = ("price", "paid_before", "saved")


class ExportFormat(StrEnum):
    CLOUDEVENTS = "cloudevents"
    JSONL = "jsonl"
    CSV = "csv"
    PARQUET = "parquet"


def cloud_event(item: Settled | Adjusted) -> dict[str, Any]:
    """One CloudEvent. Money is a decimal string, because a receiver would read a JSON number as a float."""
    if isinstance(item, Adjusted):
        made = item.adjustment
        data = {**made.to_dict(), "sequence": item.sequence, "entry_hash": item.hash.hex()}
        id = f"adjustment:{made.adjustment_id}"
        return _cloud_event(id, made.source, ADJUSTMENT_TYPE, made.tenant, made.created_us, data)
    settled = item
    record = settled.record
    data = record.to_dict()
    data["sequence"], data["entry_hash"] = settled.sequence, settled.hash.hex()
    data["total_tokens"] = record.prompt_tokens + record.output_tokens
    return _cloud_event(record.event_id, record.source, EVENT_TYPE, record.tenant, record.finished_us, data)


def _cloud_event(id: str, source: str, kind: str, tenant: str, time_us: int, data: dict[str, Any]) -> dict[str, Any]:
    return {
        "specversion": "1.0",
        "id": id,
        "source": source,
        "type": kind,
        # OpenMeter refuses events without a subject. In a deployment without API keys, the tenant's name is empty.
        "subject": tenant or "default",
        "time": _rfc3339(time_us),
        "datacontenttype": "application/json",
        "data": data,
    }


def cloud_event_batches(settled: Iterable[Settled | Adjusted]) -> Iterator[list[dict[str, Any]]]:
    """Bodies for application/cloudevents-batch+json."""
    events = (cloud_event(item) for item in settled)
    while batch := list(islice(events, EVENTS_A_BATCH)):
        yield batch


def write_export(settled: Iterable[Settled | Adjusted], kind: ExportFormat, path: Path) -> int:
    """Write all records of a ledger to a file. Returns how many there were. CloudEvents: one batch (a JSON array) per
    line, adjustments among the records.

    The file is replaced only after everything was written. If writing fails, the old file stays unchanged.

    Raises:  ConfigError: Parquet was asked for and pyarrow is not installed.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        if kind is ExportFormat.PARQUET:
            num_records = _write_parquet(records_of(settled), part)
        else:
            with part.open("w", newline="") as file:
                num_records = write_text(settled, kind, file)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return num_records


def records_of(items: Iterable[Settled | Adjusted]) -> Iterator[Settled]:
    """The records without the adjustments, whose columns differ."""
    return (item for item in items if isinstance(item, Settled))


def write_text(settled: Iterable[Settled | Adjusted], kind: ExportFormat, file: IO[str]) -> int:
    """Write one of the text formats to an open file. Returns the number of records."""
    num_records = 0
    if kind is ExportFormat.CLOUDEVENTS:
        for batch in cloud_event_batches(settled):
            file.write(json.dumps(batch, separators=(",", ":")) + "\n")
            num_records += len(batch)
        return num_records
    writer = csv.DictWriter(file, fieldnames=columns()) if kind is ExportFormat.CSV else None
    if writer is not None:
        writer.writeheader()
    for item in records_of(settled):
        row = row_of(item)
        if writer is not None:
            writer.writerow({name: _no_formula(value) for name, value in row.items()})
        else:
            file.write(json.dumps(row, separators=(",", ":")) + "\n")
        num_records += 1
    return num_records


def columns() -> list[str]:
    return ["sequence", "entry_hash", *FIELD_TYPES]


def row_of(settled: Settled) -> dict[str, Any]:
    return {"sequence": settled.sequence, "entry_hash": settled.hash.hex(), **settled.record.to_dict()}


def _no_formula(value: Any) -> Any:
    # Ids and tenants come from callers, and spreadsheet programs run text that begins like a formula.
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return "'" + value
    return value


def _write_parquet(settled: Iterable[Settled], path: Path) -> int:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as err:
        raise ConfigError(needs("export to Parquet", "pyarrow", "parquet")) from err
    money = pa.decimal128(38, 12)
    kinds = {"int": pa.int64(), "bool": pa.bool_(), "Decimal": money}
    types = {name: kinds.get(kind, pa.string()) for name, kind in FIELD_TYPES.items()}
    types |= {"sequence": pa.int64(), "entry_hash": pa.string()}
    schema = pa.schema([(name, types[name]) for name in columns()])
    rows, num_records = iter(settled), 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        while group := [row_of(item) for item in islice(rows, _ROWS_A_GROUP)]:
            for row in group:
                row.update({name: Decimal(row[name]) for name in _MONEY})
            writer.write_table(pa.Table.from_pylist(group, schema=schema))
            num_records += len(group)
    return num_records


def _rfc3339(time_us: int) -> str:
    moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=time_us)
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")
