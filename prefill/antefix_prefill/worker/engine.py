"""A worker's parts in one place: model, pool, store, measured speeds, and its compute thread."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from antefix.block import (
    CPU_FLOAT32,
    NO_LABELS,
    Chain,
    Fingerprint,
    Labels,
    TokenArray,
    check_arithmetic,
    exactness_of,
)
from antefix.config import require, setting
from antefix.errors import AntefixError, InvalidRequest, PermissionDenied
from antefix.host_limits import memory_limit_bytes, usable_cores
from antefix.layout import BlockLayout, KVFormat, PartKind
from antefix.linear_law import Law
from antefix.model import Arithmetic, BlockPool, Model, load_model, probe
from antefix.model.backend import make_backend, uses_triton
from antefix.model.compiled.check import enable
from antefix.model.ops import Ops, TorchOps
from antefix.model_dir import ModelIdentity, identify
from antefix.secret import Keyring
from antefix.security.grants import fits_prompt
from antefix.security.guard import admitted
from antefix.store.api import Store
from antefix.store.many_stores import ManyStores
from antefix.store.patience import Patience
from antefix.store_files.seal import Seals
from antefix.window import Rates, RestorePlanner, Sizes, Strategy, check_bounded
from antefix.window_pool import WindowPool, open_window_pool
from antefix.worker_settings import WorkerSettings
from antefix_prefill.worker.checkpoint_budget import CheckpointBudget
from antefix_prefill.worker.compute_thread import STEP_DELAY_MAX_S, ComputeThread
from antefix_prefill.worker.plan_log import PlanLog
from antefix_prefill.worker.rank_processes import RankProcesses
from antefix_prefill.worker.resident_blocks import ResidentBlocks
from antefix_prefill.worker.store_counters import StoreCounters

if TYPE_CHECKING:  # this import needs the extra `fleet`, which most workers do not have
    from antefix.events.kv_publisher import KvPublisher

log = logging.getLogger("antefix_prefill.worker")

T = TypeVar("T")

# For engines that are assembled by hand, as tests do.
NOT_PROBED = Arithmetic(name=CPU_FLOAT32, setup="not probed")
# However small its KV is, a block takes memory for its name, its counts and its entries in lists.
BLOCK_BYTES_MIN = 1024
# Memory of the pool that is mapped at start: 21,000 tokens of antefix-tiny. It takes 10 ms of processor time, which the
# first restores would otherwise wait for.
TOUCHED_BYTES = 16 << 20
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# The memory assumed for a Redis, if `window_pool_bytes` is not set.
REDIS_BYTES = 4 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig(WorkerSettings):
    """Settings that prefill and decode workers share."""

    model: str = setting("", "model directory: config.json, *.safetensors, a tokenizer")
    secret_file: str = setting("", "file with the deployment's secret, which block hashes are keyed with")
    threads: int = setting(0, "torch threads; 0: as many as cores may be used here")
    arithmetic: str = setting(
        "",
        "arithmetic whose KV this worker uses as its own, by the name that `antefix doctor` prints. A worker that"
        " computes another arithmetic stores nothing. Empty: the worker's own",
    )
    arithmetic_cache: str = setting(
        "", "directory that keeps the measurements made at start, so that the next start can use them"
    )
    pool_bytes: int = setting(1 << 30, "memory for the block pool", unit="bytes")
    rank_timeout_s: float = setting(
        300.0, "longest time that one rank waits for another before the worker ends; only with several ranks", unit="s"
    )
    prefill_chunk: int = setting(
        512, "most tokens that prefill computes at once; chunks end at multiples of this", unit="tokens"
    )
    step_delay_max_ms: float = setting(
        1000 * STEP_DELAY_MAX_S,
        "how long a chunk of a prompt may keep a running decode step waiting on a GPU; longer chunks are cut, to 1,024"
        " tokens at least",
        unit="ms",
    )

    def __post_init__(self) -> None:
        # Not super().__post_init__(): a slotted dataclass is a new class, and `__class__` would be the old one.
        WorkerSettings.__post_init__(self)
        require(bool(self.model), "--model is needed: a directory with config.json and *.safetensors")
        require(bool(self.secret_file), "--secret-file is needed: block hashes are keyed with the secret in it")
        require(self.prefill_chunk > 0, f"prefill_chunk must be positive, is {self.prefill_chunk}")
        if self.arithmetic:
            check_arithmetic(self.arithmetic)
        require(self.step_delay_max_ms > 0, f"step_delay_max_ms must be positive, is {self.step_delay_max_ms}")
        require(self.rank_timeout_s > 0, f"rank_timeout_s must be positive, is {self.rank_timeout_s}")
        require(self.threads >= 0, f"threads must not be negative, is {self.threads}")


@dataclass(slots=True)
class Engine:
    """The parts that a worker consists of. The event loop owns `blocks`; the model is called only by the compute
    thread.

    strategy: may be replaced while the worker runs; the new strategy applies from the next request on. bounded_windows:
    windows of approximate replays that the namespace allows. The engine's `fingerprint` says so as
        well: every block that it reads or writes is named as approximate, whether it is or not.
    align_tokens: 1; in reproducible mode, where arithmetic depends on shapes, the prefill chunk.
    ops: the cache path's operations, of the same kind as the pool.
    arithmetic: what was measured here; its name is in the names of the KV that this worker treats as its own.
    borrows: True if this worker computes with other arithmetic than the KV that it reads was made with. Such a worker
        writes no KV under these names. labels, statement: those of the fingerprint. seals: make the seal of every
        record that is written. kv_events: tells routers of other projects which blocks enter and leave the pool, if the
        settings ask for it. ranks: the other processes that run the model, if there are any.
    """

    identity: ModelIdentity
    model: Model
    pool: BlockPool
    blocks: ResidentBlocks
    store: Store
    strategy: Strategy
    planner: RestorePlanner
    keyring: Keyring
    compute: ComputeThread
    prefill_chunk: int
    fingerprint: bytes
    counters: StoreCounters = field(default_factory=StoreCounters)
    patience: Patience = field(default_factory=Patience)
    bounded_windows: int = 0
    align_tokens: int = 1
    window_pool: WindowPool | None = None
    budget: CheckpointBudget = field(default_factory=CheckpointBudget)
    plans: PlanLog = field(default_factory=PlanLog)
    namespace: str = "default"
    ops: Ops = field(default_factory=TorchOps)
    arithmetic: Arithmetic = NOT_PROBED
    borrows: bool = False
    labels: Labels = NO_LABELS
    statement: bytes = b""
    seals: Seals = field(init=False)
    kv_events: KvPublisher | None = None
    ranks: RankProcesses | None = None
    # Number of requests that could never fit the pool.
    num_too_large: int = 0

    def __post_init__(self) -> None:
        self.seals = Seals(self.keyring)

    @property
    def device(self) -> torch.device:
        """The device of the model, its pool and its window states."""
        return self.model.device

    @property
    def layout(self) -> BlockLayout:
        return self.model.layout

    @property
    def num_stream_values(self) -> int:
        """How many values one token's streams have, M * D."""
        return self.model.config.hc_mult * self.model.config.hidden_size

    @property
    def rates(self) -> Rates:
        return self.planner.rates

    @property
    def sizes(self) -> Sizes:
        return self.planner.sizes

    @property
    def block_size(self) -> int:
        return self.layout.geometry.block_size

    @property
    def align_blocks(self) -> int:
        """Blocks between positions where a hit may resume; 1 if it may resume at every block boundary."""
        return math.lcm(self.align_tokens, self.block_size) // self.block_size

    @property
    def stores_output(self) -> bool:
        """Whether output KV is stored. Decoding computes in other shapes than prefill, so if bits depend on shapes,
        reproducible mode stores no output.
        """
        return self.align_tokens == 1 and not self.borrows

    def chain(self, tenant: str, generation: int = 0) -> Chain:
        """An empty chain for a tenant's tokens. generation: number of the secret; 0: the present secret."""
        return Chain(self.fingerprint, self.keyring.key(tenant, generation), self.block_size)

    def check_prompt(self, num_tokens: int, largest_id: int, max_new_tokens: int = 0) -> None:
        """Raises:  InvalidRequest: empty, too long for the model or this pool, or an id outside the vocabulary."""
        if num_tokens == 0:
            raise InvalidRequest("the prompt is empty")
        if num_tokens + max_new_tokens > self.identity.max_tokens:
            raise InvalidRequest(
                f"{num_tokens} prompt tokens and {max_new_tokens} new tokens exceed the model's "
                f"{self.identity.max_tokens}"
            )
        num_blocks = -(-(num_tokens + max_new_tokens) // self.block_size)
        if num_blocks > self.pool.num_blocks:
            self.num_too_large += 1
            raise InvalidRequest(
                f"the request needs {num_blocks} blocks, this worker's pool has {self.pool.num_blocks};"
                " raise pool_bytes or shorten the request"
            )
        if largest_id >= self.identity.vocab_size:
            raise InvalidRequest(f"token id {largest_id} is outside the vocabulary of {self.identity.vocab_size}")

    def check_grant(self, tenant: str, prompt: TokenArray) -> None:
        """prompt: the prompt's tokens without the output that follows them.

        Raises:  PermissionDenied: the call that is being served has no grant for this tenant and prompt.
        """
        grant = admitted().needed_grant()
        if grant is None:
            return
        if not any(self.keyring.owner(tenant, number) in grant.owners for number in self.keyring.generations):
            raise PermissionDenied("the grant (permission to use this prompt's KV) is for another tenant")
        if not fits_prompt(self.keyring, grant, prompt):
            raise PermissionDenied("the grant (permission to use a prompt's KV) is for another prompt")

    async def register(self) -> None:
        """Tell the store the layout of payloads, without which it stores them uncompressed."""
        try:
            await self.store.register(self.fingerprint, self.layout, statement=self.statement)
        except AntefixError as err:
            self.counters.note(err)

    async def copied(self, copy: Callable[[], T]) -> T:
        """The result of `copy`, which only reads rows or window states that nothing changes before it ends. On a GPU,
        copies wait for the running work, because it is in the same queue of the device.
        """
        if self.device.type == "cpu" and self.ops.step_runner is None:
            return await self.compute.run_apart(copy)
        return await self.compute.run(copy)

    async def close(self) -> None:
        self.compute.close()
        if self.ranks is not None:
            await asyncio.to_thread(self.ranks.close)
        await self.budget.close()
        if self.window_pool is not None:
            await self.window_pool.close()
        await self.store.close()


def build_engine(config: EngineConfig, store: Store, keyring: Keyring | None = None) -> Engine:
    """Load the model and set up all parts of the worker. keyring: given if the caller has read the secret file already.

    Raises:  ModelError: the model directory is not usable.  ConfigError: a setting is not.
    """
    # torch's default number of threads respects OMP_NUM_THREADS and CPU affinity, but not a CPU quota.
    torch.set_num_threads(config.threads or min(torch.get_num_threads(), usable_cores()))
    _warn_of_memory(config)
    identity = identify(config.model)
    check_bounded(config.bounded_windows, identity.geometry)
    secrets = keyring or Keyring.from_file(config.secret_file)
    if config.tensor_parallel_size == 1:
        model = load_model(device=config.device, **_load_settings(config))
        if config.kernels == "auto":
            enable(model)
        return _build_engine(config, identity, model, store, secrets)
    ranks = RankProcesses(
        config.tensor_parallel_size, device=config.device, threads=config.threads, timeout_s=config.rank_timeout_s
    )
    try:
        model = ranks.load(load_model, **_load_settings(config))
        return _build_engine(config, identity, model, store, secrets, ranks)
    except BaseException:
        ranks.close()
        raise


def _warn_of_memory(config: EngineConfig) -> None:
    """Log a warning: a worker that exceeds its control group's memory is killed in mid-request, without a message."""
    limit = memory_limit_bytes()
    if limit is not None and config.device == "cpu" and config.pool_bytes >= limit:
        log.warning(
            "pool_bytes is %d, but this process's control group has only %d bytes of memory: the system will "
            "kill the worker when it uses them up; lower pool_bytes or raise the limit",
            config.pool_bytes,
            limit,
        )


def _load_settings(config: EngineConfig) -> dict[str, Any]:
    """The arguments of `load_model` that are the same on every rank."""
    return {
        "path": config.model,
        "dtype": DTYPES[config.dtype],
        "kv_format": KVFormat(config.kv_format),
        "drafts": config.speculate == "mtp",
        "cpu_offload_bytes": config.cpu_offload_bytes,
    }


def _build_engine(
    config: EngineConfig,
    identity: ModelIdentity,
    model: Model,
    store: Store,
    keyring: Keyring,
    ranks: RankProcesses | None = None,
) -> Engine:
    # The kernels read packed records; torch also keeps decoded copies of them.
    packed = uses_triton(config.kernels, model.layout, config.device)
    block_bytes = model.layout.block_bytes if packed else pool_block_bytes(model.layout)
    num_blocks = max(1, config.pool_bytes // max(block_bytes, BLOCK_BYTES_MIN))
    pool, ops = make_backend(
        config.kernels,
        model.layout,
        num_blocks,
        model.device,
        reproducible=config.reproducible,
        lead=model.lead,
        # A chosen and a drafted token are two tokens of one sequence, which share launches only if short prefills do.
        decode_steps="alone" if model.mtp and config.short_prefills == "alone" else config.decode_steps,
        short_prefills=config.short_prefills,
    )
    if model.device.type == "cpu":
        pool.touch(TOUCHED_BYTES)
    measured = _measure(model, config, ranks, packed=packed)
    model.threads_are_free = measured.ignores_threads
    free = ignores_shapes(measured, config.device, reproducible_kernels=packed and config.reproducible)
    align_tokens = config.prefill_chunk if config.reproducible and not free else 1
    fingerprint = _fingerprint(identity, config, config.arithmetic or measured.name)
    borrows = fingerprint.arithmetic != measured.name
    if borrows:
        log.warning(
            "this worker's arithmetic is %s, but it uses KV that was computed with %s (--arithmetic), so it "
            "stores nothing",
            measured.name,
            config.arithmetic,
        )
    return Engine(
        identity=identity,
        model=model,
        pool=pool,
        blocks=ResidentBlocks(pool),
        store=store,
        strategy=config.strategy_in_force,
        planner=RestorePlanner(Sizes.of(model.layout), Rates(tiers=tier_laws(store)), align_tokens=align_tokens),
        keyring=keyring,
        compute=_compute_thread(config, model),
        prefill_chunk=config.prefill_chunk,
        fingerprint=fingerprint.digest,
        labels=fingerprint.labels,
        statement=fingerprint.statement,
        bounded_windows=config.bounded_windows,
        align_tokens=align_tokens,
        window_pool=open_window_pool(
            config.window_pool,
            store,
            bytes_max=config.window_pool_bytes or REDIS_BYTES,
            seals=Seals(keyring),
            password_file=config.redis_password_file,
            ca_file=config.redis_ca_file,
        ),
        budget=CheckpointBudget(store.stats),
        namespace=config.namespace,
        ops=ops,
        arithmetic=replace(measured, name=fingerprint.arithmetic),
        borrows=borrows,
        ranks=ranks,
    )


def _compute_thread(config: EngineConfig, model: Model) -> ComputeThread:
    # On a CPU shorter chunks cost more than they gave (docs/PERFORMANCE.md); steps run between a chunk's layers.
    is_on_card = model.device.type == "cuda"
    return ComputeThread("model", step_delay_max_s=config.step_delay_max_ms / 1000 if is_on_card else math.inf)


def tier_laws(store: Store) -> Mapping[str, Law]:
    """The measured speeds of several stores' tiers, by label; the planner uses the same figures."""
    return _TierLaws(store) if isinstance(store, ManyStores) else {}


class _TierLaws(Mapping[str, Law]):
    """The speeds of the tiers that exist now, since stores come and go."""

    def __init__(self, stores: ManyStores) -> None:
        self._stores = stores

    def __getitem__(self, label: str) -> Law:
        for tier in self._stores.tiers:
            if tier.label == label:
                return tier.speed
        raise KeyError(label)

    def __iter__(self) -> Iterator[str]:
        return (tier.label for tier in self._stores.tiers)

    def __len__(self) -> int:
        return len(self._stores.tiers)


def _fingerprint(identity: ModelIdentity, config: EngineConfig, arithmetic: str) -> Fingerprint:
    return identity.fingerprint(
        KVFormat(config.kv_format),
        namespace=config.namespace,
        exactness=exactness_of(config.bounded_windows),
        arithmetic=arithmetic,
    )


def _measure(model: Model, config: EngineConfig, ranks: RankProcesses | None, *, packed: bool) -> Arithmetic:
    """Measure the arithmetic of this process and of every rank for this model, and log it."""
    settings: dict[str, Any] = {
        "reproducible": config.reproducible,
        "kernels": "triton" if packed else "torch",
        "cache_dir": config.arithmetic_cache,
    }
    if ranks is not None:
        ranks.start_measuring(**settings)
    measured = probe(model, **settings)
    if ranks is not None:
        ranks.check_measured(measured)
    log.info("arithmetic %s on %s", measured.name, measured.setup)
    for text in measured.failed:
        log.warning(
            "some cache hits are not exact on this machine: %s (see `antefix doctor`); with --reproducible "
            "true, all hits are exact",
            text,
        )
    if measured.unproved:
        log.info("it is not proved that cache hits are exact on this machine: %s", "; ".join(measured.unproved))
    return measured


def ignores_shapes(measured: Arithmetic, device: str | torch.device, *, reproducible_kernels: bool = False) -> bool:
    """Whether a token's bits are the same however its prompt is cut into chunks. By construction the bits are the same
    on a CPU, and on a GPU with the reproducible kernels; if the probe saw a difference, the answer is no.
    """
    return measured.ignores_shapes and (reproducible_kernels or torch.device(device).type == "cpu")


def pool_block_bytes(layout: BlockLayout) -> int:
    """Memory of one pool block: its row, and on a CPU the float32 copy of an FP8 row (see `antefix.model.pool`)."""
    if layout.kv_format is not KVFormat.FP8:
        return layout.block_bytes
    geometry = layout.geometry
    width = {PartKind.INDEXER_KEYS: geometry.indexer_dim}
    return layout.block_bytes + sum(p.num_rows * width.get(p.kind, geometry.head_dim) * 4 for p in layout.parts)
