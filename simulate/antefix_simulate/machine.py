"""The cost model: the time that tokens and bytes take on a machine, the size of a model's KV, the price of tokens.

Every number here is a setting, not a measurement: use the results of `benchmarks/` on your machine.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from antefix.checked_files import read_json
from antefix.errors import InvalidRequest
from antefix.layout import BlockLayout, KVFormat, KVGeometry, LayerKind
from antefix.layout_v41 import MODEL_TYPE, V41Geometry, V41Layout
from antefix.window import Plan, Sizes


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One simulated prefill worker and its disk. The default numbers stand for eight H100 with V4-Flash and one NVMe
    disk.

    prefill_tokens_per_s: 64K tokens cold in 3.62 s (vLLM, V4.1-Flash).  context_half_tokens: the context at which a
    token takes twice as long as without context. V4's sparse attention makes it large; the value is an assumption.
    peer_*: reading another host's store over 25 Gbit/s Ethernet; an assumption.
    object_*: a cloud's object store with 16 ranges in flight; an assumption.  jitter: every duration is multiplied by a
    lognormal factor with this sigma, so that the planner cannot predict the machine exactly.
    """

    prefill_tokens_per_s: float = 18_000.0
    prefill_fixed_s: float = 0.02
    context_half_tokens: float = 1_000_000.0
    disk_bytes_per_s: float = 6e9
    disk_fixed_s: float = 0.001
    pool_bytes_per_s: float = 10e9
    pool_fixed_s: float = 0.0005
    peer_bytes_per_s: float = 3e9
    peer_fixed_s: float = 0.002
    object_bytes_per_s: float = 1e9
    object_fixed_s: float = 0.05
    jitter: float = 0.1

    def __post_init__(self) -> None:
        rates = ("disk_bytes_per_s", "pool_bytes_per_s", "peer_bytes_per_s", "object_bytes_per_s")
        for name in ("prefill_tokens_per_s", "context_half_tokens", *rates):
            if not 0 < getattr(self, name) < math.inf:
                raise InvalidRequest(f"{name} must be positive, is {getattr(self, name)}")

    def compute_s(self, tokens: int, *, context: int) -> float:
        """Seconds to compute `tokens` tokens after `context` others, without jitter. Replay counts as prefill does."""
        if not tokens:
            return 0.0
        growth = 1 + (context + tokens / 2) / self.context_half_tokens
        return self.prefill_fixed_s + tokens / self.prefill_tokens_per_s * growth

    def load_s(self, tier: str, nbytes: int) -> float:
        if not nbytes:
            return 0.0
        fixed, rate = {
            "pool": (self.pool_fixed_s, self.pool_bytes_per_s),
            "peer": (self.peer_fixed_s, self.peer_bytes_per_s),
            "object": (self.object_fixed_s, self.object_bytes_per_s),
        }.get(tier, (self.disk_fixed_s, self.disk_bytes_per_s))
        return fixed + nbytes / rate


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """The actual time of each part of a restore plan, in seconds."""

    load_blocks_s: float
    load_checkpoint_s: float
    replay_s: float
    prefill_s: float

    @property
    def total_s(self) -> float:
        return self.load_blocks_s + self.load_checkpoint_s + self.replay_s + self.prefill_s


def carry_out(
    machine: Machine, sizes: Sizes, plan: Plan, rng: random.Random, *, bytes_by_tier: Mapping[str, int] | None = None
) -> Timing:
    """Carry out a restore plan on the simulated machine: first the loads, then the computing, as the worker does.

    bytes_by_tier: bytes that each of several stores delivers; they deliver at the same time.
    """
    window_bytes = sizes.checkpoint_bytes if plan.checkpoint_tier else 0
    start = plan.replay_from_block * sizes.block_size
    parts = {"disk": plan.load_bytes - window_bytes} if bytes_by_tier is None else bytes_by_tier

    def jitter() -> float:
        return rng.lognormvariate(0.0, machine.jitter) if machine.jitter else 1.0

    return Timing(
        load_blocks_s=max((machine.load_s(tier, nbytes) for tier, nbytes in parts.items()), default=0.0) * jitter(),
        load_checkpoint_s=machine.load_s(plan.checkpoint_tier, window_bytes) * jitter(),
        replay_s=machine.compute_s(plan.replay_work_tokens, context=start) * jitter(),
        prefill_s=machine.compute_s(plan.prefill_tokens, context=start + plan.replay_tokens) * jitter(),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenPrices:
    """Dollars per million tokens: cached input, other input, output."""

    hit: float
    miss: float
    output: float = 0.0

    def dollars(self, *, hit_tokens: int, miss_tokens: int) -> float:
        return (hit_tokens * self.hit + miss_tokens * self.miss) / 1e6


# Off-peak prices of 2026 (deploy/ratecards/deepseek.toml). They have changed four times since April, so they are
# settings too.
RATE_CARDS = {
    "v4-flash": TokenPrices(hit=0.003, miss=0.15, output=0.60),
    "v4-pro": TokenPrices(hit=0.022, miss=0.66, output=1.98),
    "v4.1-flash": TokenPrices(hit=0.003, miss=0.15, output=0.60),
}


def _v4(first: LayerKind, num_layers: int) -> KVGeometry:
    rest = (LayerKind.HCA if i % 2 else LayerKind.CSA for i in range(num_layers - 2))
    return KVGeometry(
        layers=(first, first, *rest),
        head_dim=512,
        rope_dim=64,
        indexer_dim=128,
        csa_ratio=4,
        hca_ratio=128,
        window=128,
    )


# V4 report, section 4: Flash has two window-only layers, then 21 CSA and 20 HCA; Pro's first two are HCA (30, 31).
GEOMETRIES = {"v4-flash": _v4(LayerKind.WINDOW, 43), "v4-pro": _v4(LayerKind.HCA, 61)}


# V4.1's technical report: ratio 2 up to the encoder's end, ratio 1 from there on, four KV sources.
V41_FLASH = V41Geometry(
    ratios=(0, 0, *(2,) * 18, *(1,) * 20),
    kv_sources=(2, 8, 14, 20),
    index_sources=(2, 8, 14, 20, 24, 28, 32, 36),
    head_dim=512,
    rope_dim=64,
    indexer_dim=128,
    window=128,
)


def model_sizes(model: str, kv_format: KVFormat = KVFormat.FP8) -> Sizes:
    """Sizes of `v4-flash`, `v4-pro`, `v4.1-flash`, or the model whose directory (with a config.json) is named.

    Raises:  InvalidRequest: neither a known name nor such a directory, or a config.json of another architecture.
    """
    if model == "v4.1-flash":
        return Sizes.of(V41Layout(geometry=V41_FLASH))
    if model in GEOMETRIES:
        return Sizes.of(BlockLayout(geometry=GEOMETRIES[model], kv_format=kv_format))
    config = Path(model) / "config.json"
    try:
        fields = read_json(config, "model config", error=InvalidRequest, infinity=True)
        if isinstance(fields, dict) and fields.get("model_type") == MODEL_TYPE:
            return Sizes.of(V41Layout(geometry=V41Geometry.from_config(fields)))
        geometry = KVGeometry.from_config(fields)
    except (OSError, ValueError) as err:
        names = ", ".join(sorted((*GEOMETRIES, "v4.1-flash")))
        raise InvalidRequest(f"model {model!r} is neither {names} nor a directory with a config.json: {err}") from err
    return Sizes.of(BlockLayout(geometry=geometry, kv_format=kv_format))


def model_layers(model: str) -> int:
    """Number of layers of a model that `model_sizes` knows. Raises:  InvalidRequest: as `model_sizes`."""
    if model == "v4.1-flash":
        return len(V41_FLASH.ratios)
    if model in GEOMETRIES:
        return GEOMETRIES[model].num_layers
    model_sizes(model)
    fields = read_json(Path(model) / "config.json", "model config", error=InvalidRequest, infinity=True)
    return int(fields["num_hidden_layers"])
