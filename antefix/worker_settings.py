"""Settings of workers that other programs need too: `antefix up` passes these settings on to workers, and routers name
KV by some of them.

Each is defined once, here. `add_flags` adds a setting's flag to a command's parser, and `flags_of` makes the flag for a
process to be started. This module knows no tensors, so that a host without torch can start a router.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from antefix.config import check_choices, require, setting
from antefix.redis_access import redis_ca_setting, redis_password_setting
from antefix.window import Strategies, Strategy, check_exactness, in_force
from antefix.window_pool import DISK, MEMORY, check_address

# Settings that enter the names of KV. A router, and any tool that looks for KV, needs the workers' values.
NAMING: Final = ("kv_format", "namespace", "bounded_windows")

# One host has 8 or 16 GPUs, so a larger number of ranks is a mistake.
RANKS_MAX: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """Settings that decide what KV a worker makes, what computes it, and how its window state is treated
    (docs/WINDOW_STATE.md).

    Raises:  ConfigError: a setting is invalid, or two settings contradict each other.
    """

    kv_format: str = setting("fp8", "precision of KV in the pool and on disk", choices=("fp8", "float32"))
    namespace: str = setting("default", "namespace of the KV; requests share KV only within one namespace")
    strategy: str = setting(
        "auto",
        "which checkpoints of window state to store: auto, auto(budget=SIZE, ends=disk|pool), boundary,"
        " periodic(TOKENS), full, zero; or by namespace: 'agents=periodic(8192); batch=zero; auto'. With a window"
        " pool, auto puts checkpoints at the ends of prompts and outputs into it",
    )
    window_pool: str = setting(
        DISK,
        "where to keep checkpoints that are reused within minutes or never: disk (no pool), memory (the store"
        " service's), or a redis://, rediss://, unix:// or redis+cluster:// URL (docs/SECURITY.md)",
    )
    window_pool_bytes: int = setting(
        0,
        "Redis memory that the window pool may take; further checkpoints go to disk; 0: 4 GiB if there is a Redis",
        unit="bytes",
    )
    redis_password_file: str = redis_password_setting()
    redis_ca_file: str = redis_ca_setting()
    bounded_windows: int = setting(
        0,
        "replay only so many windows to rebuild window state, so that hits are approximate; the namespace's KV"
        " then has names of its own; 0: hits are exact",
    )
    reproducible: bool = setting(
        False,
        "make hits equal cold runs to the bit on a GPU too, as on a CPU they always do. Attention then computes in"
        " one order whatever the batch; where no kernels run, prompts resume only at multiples of prefill_chunk",
    )
    device: str = setting("cpu", "torch device of the workers")
    tensor_parallel_size: int = setting(
        1,
        "processes that run one model together, each on a GPU of its own; they divide heads and experts, and read"
        " KV once",
    )
    cpu_offload_bytes: int = setting(
        0,
        "bytes of a GPU's experts to keep in pinned host memory and fetch layer by layer; of each rank",
        unit="bytes",
    )
    dtype: str = setting("float32", "precision of weights and activations", choices=("float32", "bfloat16"))
    kernels: str = setting(
        "auto",
        "what computes on the KV cache; auto: triton where it can run (CUDA and fp8)",
        choices=("auto", "triton", "torch"),
    )
    decode_steps: str = setting(
        "graphs",
        "how decode steps run where triton runs: graphs (the sequences of a batch share launches, which are recorded"
        " once and replayed), together (they share launches, which are not recorded), alone (each sequence has its"
        " own launches). Over several ranks, graphs means alone, and graphs-over-ranks records launches there too,"
        " which was not yet run on GPUs",
        choices=("graphs", "graphs-over-ranks", "together", "alone"),
    )
    short_prefills: str = setting(
        "together",
        "how short prefills run where decode steps share launches: together (up to 512 new tokens of up to 64 sequences"
        " share launches too, such as drafted tokens or the rest of a prompt after a hit), or alone (each sequence has"
        " its own launches)",
        choices=("together", "alone"),
    )
    speculate: str = setting(
        "off",
        "mtp: draft one token ahead with the checkpoint's own draft layer, and keep the token if the model would"
        " choose it anyway",
        choices=("off", "mtp"),
    )

    def __post_init__(self) -> None:
        check_choices(self)
        require(
            1 <= self.tensor_parallel_size <= RANKS_MAX,
            f"tensor_parallel_size must be 1 to {RANKS_MAX}, is {self.tensor_parallel_size}",
        )
        require(self.cpu_offload_bytes >= 0, f"cpu_offload_bytes must not be negative, is {self.cpu_offload_bytes}")
        require(
            not self.cpu_offload_bytes or not self.device.startswith("cpu"),
            "cpu_offload_bytes moves experts from a GPU to the host, so it needs --device cuda",
        )
        check_address(self.window_pool)
        check_exactness(bounded_windows=self.bounded_windows, reproducible=self.reproducible)
        for each in Strategies.parse(self.strategy).all():
            in_force(each, has_pool=self.window_pool != DISK)
        require(
            not self.window_pool_bytes or self.window_pool not in (DISK, MEMORY),
            f"window_pool_bytes bounds a Redis server's memory, but window_pool is {self.window_pool}",
        )

    @property
    def strategy_in_force(self) -> Strategy:
        """The window strategy of the namespace, adapted to the window pool in use."""
        return in_force(Strategies.parse(self.strategy).of(self.namespace), has_pool=self.window_pool != DISK)
