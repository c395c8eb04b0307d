"""Settings of workers that other programs need too: `antefix up` passes them on, and routers name KV by some of them.

Each is defined once, here. `add_flags` adds its flag to a command's parser, and `flags_of` makes the flag for a process
to be started. Knows no tensors, so that a host without torch can start a router.
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

# One host has 8 or 16 cards, so a larger number of ranks is a mistake.
RANKS_MAX: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """What a worker's KV is, what computes it, and how its window state is treated (docs/WINDOW_STATE.md).

    Raises:  ConfigError: a setting is invalid, or two settings contradict each other.
    """

    kv_format: str = setting("fp8", "precision of KV in the pool and on disk", choices=("fp8", "float32"))
    namespace: str = setting("default", "requests share KV within a namespace only")
    strategy: str = setting(
        "auto",
        "which checkpoints to leave: auto, auto(budget=SIZE, ends=disk|pool), boundary, periodic(TOKENS), full, zero; "
        "or by namespace: 'agents=periodic(8192); batch=zero; auto'. auto's ends go to the window pool if there is one",
    )
    window_pool: str = setting(
        DISK,
        "memory for checkpoints that are used within minutes or never: disk (none), memory (the store service's), or a"
        " redis://, rediss://, unix:// or redis+cluster:// URL (docs/SECURITY.md)",
    )
    window_pool_bytes: int = setting(
        0, "of Redis' memory; what is above goes to disk; 0: 4 GiB, where there is a Redis", unit="bytes"
    )
    redis_password_file: str = redis_password_setting()
    redis_ca_file: str = redis_ca_setting()
    bounded_windows: int = setting(
        0, "allow approximate replays of so many windows; the namespace's KV then has names of its own; 0: exact only"
    )
    reproducible: bool = setting(
        False,
        "hits equal cold runs to the bit on a GPU too; on a CPU they do anyway: attention in one order whatever the"
        " batch; where no kernels run, resume only at multiples of prefill_chunk",
    )
    device: str = setting("cpu", "torch device of the workers")
    tensor_parallel_size: int = setting(
        1,
        "processes that run one model together, a card each: heads and experts are divided among them, KV is read once",
    )
    cpu_offload_bytes: int = setting(
        0, "of a card's experts, to hold in pinned host memory and fetch layer by layer; of each rank", unit="bytes"
    )
    dtype: str = setting("float32", "precision of weights and activations", choices=("float32", "bfloat16"))
    kernels: str = setting(
        "auto", "cache path; auto: triton where it can run (CUDA and fp8)", choices=("auto", "triton", "torch")
    )
    decode_steps: str = setting(
        "graphs",
        "where triton runs: graphs (a batch shares its launches, which are recorded once and replayed), together (the"
        " same, launched each time), alone (sequence by sequence). Over several ranks graphs is alone;"
        " graphs-over-ranks records there too, which no cards have run yet",
        choices=("graphs", "graphs-over-ranks", "together", "alone"),
    )
    short_prefills: str = setting(
        "together",
        "where decode steps share launches: together (up to 512 new tokens of up to 64 sequences, such as the rest"
        " after a hit and drafted tokens, share them too), alone (sequence by sequence)",
        choices=("together", "alone"),
    )
    speculate: str = setting(
        "off",
        "mtp: draft a token ahead with the checkpoint's own layer, and keep it where it is what would be chosen anyway",
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
            "cpu_offload_bytes moves experts from a card to the host: it needs --device cuda",
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
        """The namespace's strategy, adapted to the window pool in use."""
        return in_force(Strategies.parse(self.strategy).of(self.namespace), has_pool=self.window_pool != DISK)
