"""Renders the data of a router's status page for a terminal. The module reads no clock, because the data includes the
time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from antefix.text_table import visible
from antefix.whole_number import whole_number

if TYPE_CHECKING:
    from rich.console import Group, RenderableType
    from rich.table import Table

_TENANT_ORDERS: Final = ("prompt_tokens", "misses", "requests", "charged")
_REQUEST_FILTERS: Final = ("misses", "all", "failed")
_TENANTS_SHOWN, _REQUESTS_SHOWN = 10, 20
# Width of the column that names the tiers of a hit.
_TIERS_WIDTH: Final = 32
# Lines that are always there: title, totals, table heads, keys.
_FIXED_LINES: Final = 14


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """How the tables are sorted and filtered. tenant: show only its requests; empty: all requests."""

    tenants_by: str = _TENANT_ORDERS[0]
    requests: str = _REQUEST_FILTERS[0]
    tenant: int = -1

    def after(self, key: str) -> Choice:
        """The choice after a key was pressed; keys without a meaning change nothing."""
        if key == "s":
            return replace(self, tenants_by=_next(_TENANT_ORDERS, self.tenants_by))
        if key == "f":
            return replace(self, requests=_next(_REQUEST_FILTERS, self.requests))
        if (number := whole_number(key)) is not None:
            return replace(self, tenant=-1 if number - 1 == self.tenant else number - 1)
        return self


def screen(data: dict[str, Any], choice: Choice, *, height: int, problem: str = "") -> Group:
    """height: lines of the terminal; tables get the lines that remain."""
    from rich.console import Group
    from rich.text import Text

    tenants = sorted(data["tenants"], key=lambda row: -_weight(row, choice.tenants_by))[:_TENANTS_SHOWN]
    stores = (data.get("store") or {}).get("stores") or []
    room = max(3, height - _FIXED_LINES - len(data["workers"]) - len(tenants) - (len(stores) and len(stores) + 2))
    parts: list[RenderableType] = [
        Text(_title(data), style="bold"),
        Text(problem, style="bold red") if problem else Text(_totals(data)),
        Text(),
        _workers(data),
        Text(),
        *((_stores(stores), Text()) if stores else ()),
        _tenants(tenants, choice),
        Text(),
        _requests(data, tenants, choice, min(room, _REQUESTS_SHOWN)),
        Text(),
        Text("s sort tenants   f misses, all, failed   1-9 one tenant   q quit", style="dim"),
    ]
    return Group(*parts)


def _title(data: dict[str, Any]) -> str:
    return f"antefix {data['version']}  {visible(data['model'])}  up {_span(data['at'] - data['started_at'])}"


def _totals(data: dict[str, Any]) -> str:
    over, total = data["over"], data["total"]
    rates = "  ".join(
        f"{name} {_rate(over[span])}" for span, name in (("60", "1 min"), ("300", "5 min"), ("3600", "1 hour"))
    )
    number = over["300"]["num_with_ttft"]
    ttft = f"{1e3 * over['300']['ttft_s'] / number:.0f} ms" if number else "-"
    return (
        f"hit rate  {rates}  since the start {_rate(total)}\n"
        f"running {data['running']}  ended {total['requests']:,}  failed {total['failed']:,}"
        f"  refused {data['refused']:,}  first token {ttft} (mean of 5 min)  saved {total['saved']:.4g}"
    )


def _workers(data: dict[str, Any]) -> Table:
    table = _table("roles", "address", "health", "requests", "tokens queued", "served", left=3)
    for worker in data["workers"]:
        health = "drains" if worker["draining"] else "serves" if worker["serving"] else "does not answer"
        style = "" if worker["serving"] else "red"
        numbers = (worker["requests"], worker["tokens_queued"], worker["served"])
        table.add_row(worker["role"], visible(worker["address"]), health, *map(_count, numbers), style=style)
    return table


def _stores(stores: list[dict[str, Any]]) -> Table:
    """The table of stores, where there are several; a single store is shown elsewhere."""
    table = _table("stores", "health", "used", "of", "records", "evicted", "failures", left=2)
    for store in stores:
        health = "answers" if store["answers"] else "does not answer"
        health = f"stores nothing: {visible(store['stopped'])}" if store["answers"] and store["stopped"] else health
        numbers = (store[name] for name in ("used_bytes", "budget_bytes", "records", "evictions", "failures"))
        style = "" if store["answers"] and not store["stopped"] else "red"
        table.add_row(visible(store["name"]), health, *map(_count, numbers), style=style)
    return table


def _tenants(tenants: list[dict[str, Any]], choice: Choice) -> Table:
    names = ("prompt tokens", "hit rate", "requests", "charged", "saved", "most missed for")
    table = _table(f"tenants by {choice.tenants_by.replace('_', ' ')}", *names, left=1)
    for number, tenant in enumerate(tenants):
        most = next(iter(tenant["miss_tokens"]), "").replace("_", " ")
        name = f"{number + 1} {visible(tenant['tenant']) or 'without a key'}"
        cells = (_count(tenant["prompt_tokens"]), _rate(tenant), _count(tenant["requests"]))
        money = (f"{tenant['charged']:.4g}", f"{tenant['saved']:.4g}")
        table.add_row(name, *cells, *money, most, style="bold" if number == choice.tenant else "")
    return table


def _requests(data: dict[str, Any], tenants: list[dict[str, Any]], choice: Choice, room: int) -> Table:
    only = tenants[choice.tenant]["tenant"] if 0 <= choice.tenant < len(tenants) else None
    shown = [
        request
        for request in data["requests"]
        if (only is None or request["tenant"] == only)
        and (
            choice.requests == "all"
            or (choice.requests == "failed" and request["status"] in ("failed", "crashed"))
            or (choice.requests == "misses" and request["miss_tokens"] > 0 and request["miss_reason"])
        )
    ]
    whose = "" if only is None else f" of {visible(only) or 'those without a key'}"
    names = ("ended", "tenant", "prompt", "hit", "from", "plan", "why the first miss", "first token", "status")
    table = _table(f"newest requests{whose}: {choice.requests}", *names, left=1)
    for request in shown[:room]:
        hit = f"{100 * request['hit_tokens'] / request['prompt_tokens']:.1f}%" if request["prompt_tokens"] else "-"
        table.add_row(
            visible(request["id"])[:24],
            f"{_span(data['at'] - request['at'])} ago",
            visible(request["tenant"])[:16] or "-",
            _count(request["prompt_tokens"]),
            hit,
            visible("+".join(request.get("hit_tiers") or ()))[:_TIERS_WIDTH] or "-",
            request["plan"] or "-",
            request["miss_reason"].replace("_", " ") or "-",
            f"{1e3 * request['ttft_s']:.0f} ms" if request["ttft_s"] else "-",
            request["status"],
        )
    return table


def _table(*names: str, left: int) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for index, name in enumerate(names):
        table.add_column(name, justify="left" if index < left else "right", no_wrap=True)
    return table


def _weight(tenant: dict[str, Any], order: str) -> float:
    if order == "misses":
        return float(tenant["prompt_tokens"] - tenant["hit_tokens"])
    return float(tenant[order])


def _rate(totals: dict[str, Any]) -> str:
    return f"{100 * totals['hit_tokens'] / totals['prompt_tokens']:.1f}%" if totals["prompt_tokens"] else "-"


def _count(value: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.1f}{unit}"
    return f"{value:,.0f}"


def _span(seconds: float) -> str:
    seconds = max(0.0, seconds)
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def _next(values: tuple[str, ...], value: str) -> str:
    return values[(values.index(value) + 1) % len(values)]
