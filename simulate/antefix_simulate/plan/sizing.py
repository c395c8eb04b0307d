"""From demand and speeds to numbers of machines: arithmetic, with every assumption in `ASSUMPTIONS`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np

from antefix.errors import InvalidRequest
from antefix.window import Sizes
from antefix_simulate.plan.demand import DAY_S, Demand
from antefix_simulate.plan.rates import Site, StoreRates, WorkerRates, best_step

MONTH_S: Final = 730 * 3600.0
_WORKERS_MAX: Final = 10_000_000
# Wait and service each stay below this quantile for 95 of 100 requests, so both do, and their sum, for 90 of 100.
_QUANTILE: Final = 0.95

ASSUMPTIONS: Final = (
    "more load means more people like those of the trace, who share nothing with each other, so the hit rate stays"
    " the same",
    "machines are sized for the busiest part of the trace (of 24), and bought for the whole month",
    "a worker's speed grows with nothing: cards that its weights need beyond one hold memory and add no speed",
    "speeds of a file with fewer layers are divided by the layers that are missing",
    "requests arrive at random (Poisson) and wait in one queue for prefill: Allen and Cunneen's approximation",
    "every hit is read from a disk of another host; none is in a worker's memory",
    "each request leaves one checkpoint on disk and one handoff in a store's memory for ten seconds",
    "disks and links are filled to 80%",
)
_FILL: Final = 0.8
_HANDOFF_S: Final = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """ttft_p90_s: time to first token that 90 of 100 requests must keep. tpot_s: seconds per output token; None: any.
    local_s: the part of the retention time for which KV is kept on disks; afterwards it is in an object store only.
    """

    retention_s: float
    ttft_p90_s: float
    tpot_s: float | None = None
    local_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """One resource that a plan needs. number: units to buy. use: the share of them that is used. more: what one more
    unit would give.
    """

    name: str
    number: int
    use: float
    why: str
    more: str
    dollars_per_month: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The machines that a certain load needs.

    peak: the busiest part's rate over the average.  ttft_p90_s: the bound used for sizing, not a measurement.
    """

    tokens_per_day: float
    hit_rate: float
    peak: float
    ttft_p90_s: float
    needs: tuple[Need, ...]
    kept_bytes: float
    object_bytes: float
    read_bytes_per_s: float
    write_bytes_per_s: float
    binds: str

    @property
    def dollars_per_month(self) -> float:
        return sum(need.dollars_per_month for need in self.needs)

    @property
    def bound_share(self) -> float:
        """Share of the cost that the limiting resource `binds` takes."""
        bound = sum(need.dollars_per_month for need in self.needs if need.name == self.binds)
        return bound / self.dollars_per_month if self.dollars_per_month else 0.0

    @property
    def dollars_per_million_tokens(self) -> float:
        """Dollars per million tokens of prompts and answers together."""
        return self.dollars_per_month / (self.tokens_per_day / DAY_S * MONTH_S / 1e6)

    def as_dict(self) -> dict[str, Any]:
        derived = {
            "dollars_per_month": self.dollars_per_month,
            "dollars_per_million_tokens": self.dollars_per_million_tokens,
        }
        return asdict(self) | derived


def size(demand: Demand, sizes: Sizes, workers: WorkerRates, store: StoreRates, site: Site, goal: Goal) -> Plan:
    """Raises:  InvalidRequest: no number of machines reaches the goal; the message says what is too slow."""
    # 1. Bytes moved and bytes kept.
    peak = demand.peak
    hit_bytes = demand.prompt_tokens_per_s * demand.hit_rate / sizes.block_size * sizes.block_bytes
    read_s = peak * (hit_bytes + demand.requests_per_s * sizes.checkpoint_bytes)
    write_s = peak * (
        demand.new_tokens_per_s / sizes.block_size * sizes.block_bytes + demand.requests_per_s * sizes.checkpoint_bytes
    )
    kept = demand.kept_bytes(sizes, 1.0)
    local = kept * min(1.0, (goal.local_s or goal.retention_s) / goal.retention_s)
    # 2. Each kind of machine.
    prefill, ttft = _prefill(demand, sizes, workers, store, site, goal)
    decode = _decode(demand, sizes, workers, site, goal)
    disks = _disks(local, read_s, write_s, demand, store, site)
    hosts = _hosts(disks, read_s, write_s, demand, sizes, store, site)
    objects = _objects(kept - local, site)
    needs = (prefill, decode, disks, *hosts, *objects)
    return Plan(
        tokens_per_day=(demand.prompt_tokens_per_s + demand.output_tokens_per_s) * DAY_S,
        hit_rate=demand.hit_rate,
        peak=peak,
        ttft_p90_s=ttft,
        needs=needs,
        kept_bytes=kept,
        object_bytes=kept - local,
        read_bytes_per_s=read_s,
        write_bytes_per_s=write_s,
        binds=max(needs, key=lambda need: need.dollars_per_month).name,
    )


def ttft_bound(demand: Demand, service_s: np.ndarray[Any, Any], num_workers: int) -> float:
    """Seconds that 90 of 100 requests stay below: the 95% quantiles of wait and service, added; inf if overloaded."""
    rate = demand.requests_per_s * demand.peak
    mean = float(service_s.mean())
    offered = rate * mean
    if num_workers <= offered:
        return math.inf
    variation = float(service_s.var()) / (mean * mean)
    waits = _erlang_c(offered, num_workers)
    # The wait of requests that have to wait is about exponential; Poisson arrivals have a coefficient of variation of
    # 1.
    mean_wait = mean * (1 + variation) / 2 / (num_workers - offered)
    wait = mean_wait * math.log(waits / (1 - _QUANTILE)) if waits > 1 - _QUANTILE else 0.0
    return wait + float(np.quantile(service_s, _QUANTILE))


def _erlang_c(offered: float, num_servers: int) -> float:
    """The probability that a request that arrives has to wait. Source: Sources: Erlang 1917; Halfin and Whitt 1981 for
    many servers.
    """
    if num_servers > 2000:
        beta = (num_servers - offered) / math.sqrt(offered)
        density = math.exp(-beta * beta / 2) / math.sqrt(2 * math.pi)
        below = 0.5 * math.erfc(-beta / math.sqrt(2))
        return 1 / (1 + beta * below / density) if density > 0 else 0.0
    blocked = 1.0
    for servers in range(1, num_servers + 1):
        blocked = offered * blocked / (servers + offered * blocked)
    return blocked / (1 - offered / num_servers * (1 - blocked))


def _prefill(
    demand: Demand, sizes: Sizes, workers: WorkerRates, store: StoreRates, site: Site, goal: Goal
) -> tuple[Need, float]:
    load_bytes = demand.hit_tokens / sizes.block_size * sizes.block_bytes + np.where(
        demand.hit_tokens > 0, sizes.checkpoint_bytes, 0
    )
    rate = min(store.remote_bytes_per_s, site.link_bytes_per_s * _FILL)
    service = workers.fixed_s + demand.missed_tokens / workers.prefill_tokens_per_s + load_bytes / rate
    alone = float(np.quantile(service, _QUANTILE))
    if alone > goal.ttft_p90_s:
        raise InvalidRequest(
            f"no number of workers gives --ttft-p90 {goal.ttft_p90_s:g} s: an idle worker takes {alone:.2f} s for the"
            f" longest of 20 requests ({workers.prefill_tokens_per_s:,.0f} tokens/s, {workers.fixed_s:.2f} s at least)"
        )
    low = int(demand.requests_per_s * demand.peak * float(service.mean()))
    number = _least(low, lambda count: ttft_bound(demand, service, count) <= goal.ttft_p90_s)
    bound, better = (ttft_bound(demand, service, count) for count in (number, number + 1))
    need = Need(
        name="prefill workers",
        number=number,
        use=demand.requests_per_s * demand.peak * float(service.mean()) / number,
        why=f"{demand.prompt_tokens_per_s * demand.peak * (1 - demand.hit_rate):,.0f} missed tokens/s at peak",
        more=f"time to first token {bound:.3f} s to {better:.3f} s for 90 of 100",
        dollars_per_month=number * workers.cards * site.card_dollars_per_hour * 730,
    )
    return need, bound


def _decode(demand: Demand, sizes: Sizes, workers: WorkerRates, site: Site, goal: Goal) -> Need:
    step = best_step(workers.steps, goal.tpot_s)
    # The memory left on a GPU limits the number of sequences.
    left = workers.cards * site.card_bytes * 0.9 - workers.weights_bytes
    per_sequence = demand.context_tokens / sizes.block_size * sizes.block_bytes + sizes.checkpoint_bytes
    sequences = min(step.sequences, int(left / per_sequence))
    if sequences < 1:
        raise InvalidRequest(
            f"the memory of a decode worker is too small for a sequence of {demand.context_tokens:,.0f} tokens"
        )
    rate = sequences / step.step_s
    wanted = demand.output_tokens_per_s * demand.peak
    number = max(1, math.ceil(wanted / rate / _FILL))
    bound = "memory" if sequences < step.sequences else "the largest batch that was measured"
    return Need(
        name="decode workers",
        number=number,
        use=wanted / (number * rate),
        why=f"{wanted:,.0f} output tokens/s at peak, {sequences} sequences each ({bound})",
        more=f"{rate:,.0f} output tokens/s",
        dollars_per_month=number * workers.cards * site.card_dollars_per_hour * 730,
    )


def _disks(kept: float, read_s: float, write_s: float, demand: Demand, store: StoreRates, site: Site) -> Need:
    wants = {
        "bytes kept": kept / (site.disk_bytes * _FILL),
        "reads": read_s / (store.read_bytes_per_s * _FILL),
        "writes": write_s / (store.write_bytes_per_s * _FILL),
    }
    why = max(wants, key=lambda name: wants[name])
    number = max(1, math.ceil(wants[why]))
    # Each second of retention needs disk space for one second of writes, checkpoints included.
    hours = site.disk_bytes * _FILL / (write_s / demand.peak) / 3600 if write_s else 0.0
    return Need(
        name="disks",
        number=number,
        use=wants[why] * _FILL / number,
        why=f"{why}: {kept / 1e12:,.2f} TB, {read_s / 1e9:,.2f} GB/s read, {write_s / 1e9:,.2f} GB/s written",
        more=f"{hours:,.1f} h of retention",
        dollars_per_month=number * site.disk_dollars_per_month,
    )


def _hosts(
    disks: Need, read_s: float, write_s: float, demand: Demand, sizes: Sizes, store: StoreRates, site: Site
) -> tuple[Need, Need, Need]:
    """The hosts for the stores, and the use of their links and memory."""
    handoffs = demand.requests_per_s * demand.peak * _HANDOFF_S * sizes.checkpoint_bytes
    moved = read_s + write_s + 2 * demand.requests_per_s * demand.peak * sizes.checkpoint_bytes
    link = min(store.remote_bytes_per_s, site.link_bytes_per_s)
    wants = {
        "disks": disks.number / site.disks_per_host_max,
        "links": moved / (link * _FILL),
        "memory for handoffs": handoffs / (site.host_memory_bytes * 0.5),
    }
    why = max(wants, key=lambda name: wants[name])
    number = max(1, math.ceil(wants[why]))
    hosts = Need(
        name="store hosts",
        number=number,
        use=wants[why] / number,
        why=why,
        more=f"places for {site.disks_per_host_max} disks, a link, {site.host_memory_bytes / 2**30:,.0f} GiB",
        dollars_per_month=number * site.host_dollars_per_month,
    )
    links = Need(
        name="links, one per store host",
        number=number,
        use=moved / (number * link),
        why=f"{moved / 1e9:,.2f} GB/s of hits, writes and handoffs at peak",
        more=f"{link / 1e9:,.2f} GB/s"
        + ("" if link == site.link_bytes_per_s else ", as fast as one store was measured"),
        dollars_per_month=0.0,
    )
    memory = Need(
        name="memory of store hosts, GiB",
        number=math.ceil(number * site.host_memory_bytes / 2**30),
        use=handoffs / (number * site.host_memory_bytes),
        why=f"{handoffs / 1e9:,.1f} GB of handoffs at peak; the rest is page cache",
        more="page cache",
        dollars_per_month=0.0,
    )
    return hosts, links, memory


def _objects(nbytes: float, site: Site) -> tuple[Need, ...]:
    if nbytes <= 0:
        return ()
    terabytes = math.ceil(nbytes / 1e12)
    need = Need(
        name="object store, TB",
        number=terabytes,
        use=nbytes / 1e12 / terabytes,
        why="what is older than --local-retention",
        more=f"${site.object_dollars_per_tb_month:g} per month",
        dollars_per_month=terabytes * site.object_dollars_per_tb_month,
    )
    return (need,)


def _least(low: int, enough: Callable[[int], bool]) -> int:
    """The smallest number above `low` for which `enough` is true; it must also be true for all larger numbers."""
    low, high = max(low, 0), max(low, 1)
    while not enough(high):
        low, high = high, high * 2
        if high > _WORKERS_MAX:
            raise InvalidRequest(f"more than {_WORKERS_MAX:,} workers")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def at_rate(demand: Demand, tokens_per_day: float) -> Demand:
    own = (demand.prompt_tokens_per_s + demand.output_tokens_per_s) * DAY_S
    return demand.scaled(tokens_per_day / own)
