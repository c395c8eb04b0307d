"""Speeds of machines, from files that benchmarks write; prices of machines, from a file that people write.

No speed is a constant in the code: without files of measured speeds there is no plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from antefix.checked_files import read_json, read_toml
from antefix.checked_table import Table, finite
from antefix.errors import InvalidRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeStep:
    """One measured decode step of a batch: number of sequences, seconds."""

    sequences: int
    step_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRates:
    """One worker's speeds, for the whole model.

    cards: per worker, enough for its weights.  fixed_s: time of a prefill with hardly any tokens to compute.
    """

    prefill_tokens_per_s: float
    fixed_s: float
    steps: tuple[DecodeStep, ...]
    weights_bytes: float
    cards: int
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreRates:
    """Speeds of one disk, and of a store service over the network; bytes per second."""

    read_bytes_per_s: float
    write_bytes_per_s: float
    remote_bytes_per_s: float
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """The machines to buy and their prices, from a file of `deploy/sites`. Dollars; bytes; months of 730 hours."""

    card: str
    card_bytes: float
    card_dollars_per_hour: float
    disk_bytes: float
    disk_dollars_per_month: float
    disks_per_host_max: int
    host_dollars_per_month: float
    host_memory_bytes: float
    link_bytes_per_s: float
    object_dollars_per_tb_month: float
    source: str


def worker_rates(path: Path, *, num_layers: int, card_bytes: float) -> WorkerRates:
    """Speeds measured by `python -m benchmarks.weights_on_card`, for a model with `num_layers` layers.

    The speeds in a file with fewer layers are scaled by the number of layers. Raises: InvalidRequest: the file lacks
    these measurements.
    """
    data = read_json(path, "measured rates", error=InvalidRequest)
    try:
        model, where = data["model"], f"{path.name} ({data['machine']}, {data['date']}, commit {data['commit']})"
        scale = num_layers / _positive(model["layers"])
        steps = tuple(
            DecodeStep(sequences=int(_positive(row["sequences"])), step_s=_positive(row["step_s"]) * scale)
            for row in model["decode"]
        )
        weights = _positive(model["weights_gib"]) * 2**30 * scale
        prefill = _positive(model["prefill"]["tokens_per_s"]) / scale
    except (KeyError, TypeError, ValueError) as err:
        raise InvalidRequest(f"{path} has no measured prefill and decode of a whole model: {err!r}") from err
    # A tenth of a GPU is left for KV, activations and libraries.
    cards = max(1, -(-int(weights) // int(card_bytes * 0.9)))
    return WorkerRates(
        prefill_tokens_per_s=prefill,
        fixed_s=min(step.step_s for step in steps),
        steps=tuple(sorted(steps, key=lambda step: step.sequences)),
        weights_bytes=weights,
        cards=cards,
        source=where,
    )


def store_rates(path: Path, model: str = "flash") -> StoreRates:
    """Speeds measured by `antefix bench store --json`. Raises:  InvalidRequest: the file lacks these measurements."""
    data = read_json(path, "measured rates of a store", error=InvalidRequest)
    try:
        row = data.get(model, data)
        values = [_positive(row[name]) * 1e9 for name in ("restore_gb_per_s", "raw_write_gb_per_s", "remote_gb_per_s")]
    except (KeyError, TypeError, ValueError, AttributeError) as err:
        raise InvalidRequest(f"{path} has no measured restore, write and remote restore: {err!r}") from err
    read, write, remote = values
    return StoreRates(read_bytes_per_s=read, write_bytes_per_s=write, remote_bytes_per_s=remote, source=path.name)


def load_site(path: Path) -> Site:
    """Raises:  ConfigError: a field is missing, unknown or out of range."""
    table = Table(read_toml(path, "site"), f"site {path}")
    site = Site(
        card=table.text("card"),
        card_bytes=_number(table, "card_gib") * 2**30,
        card_dollars_per_hour=_number(table, "card_dollars_per_hour"),
        disk_bytes=_number(table, "disk_tb") * 1e12,
        disk_dollars_per_month=_number(table, "disk_dollars_per_month"),
        disks_per_host_max=int(_number(table, "disks_per_host")),
        host_dollars_per_month=_number(table, "host_dollars_per_month"),
        host_memory_bytes=_number(table, "host_memory_gib") * 2**30,
        link_bytes_per_s=_number(table, "link_gbit_per_s") * 1e9 / 8,
        object_dollars_per_tb_month=_number(table, "object_dollars_per_tb_month"),
        source=table.text("source"),
    )
    table.close()
    return site


def best_step(steps: Sequence[DecodeStep], tpot_s: float | None) -> DecodeStep:
    """The measured decode step with most tokens per second whose time per token is within `tpot_s`.

    Raises:  InvalidRequest: the fastest measured step takes longer; the message says how long.
    """
    fitting = [step for step in steps if tpot_s is None or step.step_s <= tpot_s]
    if not fitting:
        fastest = min(step.step_s for step in steps)
        raise InvalidRequest(
            f"no measured decode step is within --tpot {tpot_s:g} s: the fastest takes {fastest:.3g} s"
        )
    return max(fitting, key=lambda step: step.sequences / step.step_s)


def _positive(value: Any) -> float:
    number = float(value)
    if not 0 < number < 1e18:
        raise ValueError(f"{value!r} must be above 0")
    return number


def _number(table: Table, name: str) -> float:
    value = table.take(name)
    if not finite(value) or not 0 < value < 1e9:
        raise table.wrong(name, "a number above 0 and below 1e9", value)
    return float(value)
