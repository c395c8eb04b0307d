"""A worker's parts in one place: model, pool, store, what it believes about speeds, and its compute thread."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from antefix.block import Chain
from antefix.config import require, setting
from antefix.errors import AntefixError, InvalidRequest
from antefix.layout import BlockLayout, KVFormat, PartKind
from antefix.model import BlockPool, Model, load_model
from antefix.model_dir import ModelIdentity, identify
from antefix.secret import Keyring
from antefix.store.api import Store
from antefix.window import Rates, RestorePlanner, Sizes, Strategy, parse
from antefix.worker.compute import ComputeThread
from antefix.worker.report import StoreCounters
from antefix.worker.resident import ResidentBlocks


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Settings that prefill and decode workers share."""

    model: str = setting("", "model directory: config.json, *.safetensors, a tokenizer")
    kv_format: str = setting("fp8", "precision of KV in the pool and on disk: fp8 or float32")
    namespace: str = setting("default", "requests share KV within a namespace only")
    secret_file: str = setting("", "file with the deployment's secret, which block hashes are keyed with")
    device: str = setting("cpu", "torch device")
    threads: int = setting(0, "torch threads; 0 leaves torch's own choice")
    pool_bytes: int = setting(1 << 30, "memory for the block pool", unit="bytes")
    prefill_chunk: int = setting(512, "prefill runs in chunks that end at multiples of this", unit="tokens")
    strategy: str = setting("boundary", "which checkpoints to leave: boundary, zero, full, periodic(p), auto")

    def __post_init__(self) -> None:
        require(bool(self.model), "--model is needed: a directory with config.json and *.safetensors")
        require(bool(self.secret_file), "--secret-file is needed: block hashes are keyed with the secret in it")
        require(self.kv_format in ("fp8", "float32"), f"kv_format must be fp8 or float32, is {self.kv_format!r}")
        require(self.prefill_chunk > 0, f"prefill_chunk must be positive, is {self.prefill_chunk}")
        require(self.threads >= 0, f"threads must not be negative, is {self.threads}")
        parse(self.strategy)


@dataclass(slots=True)
class Engine:
    """What a worker works with. The event loop owns `blocks`; the compute thread alone calls the model."""

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

    @property
    def layout(self) -> BlockLayout:
        return self.model.layout

    @property
    def rates(self) -> Rates:
        return self.planner.rates

    @property
    def sizes(self) -> Sizes:
        return self.planner.sizes

    @property
    def block_size(self) -> int:
        return self.layout.geometry.block_size

    def chain(self, tenant: str) -> Chain:
        """An empty chain for a tenant's tokens."""
        return Chain(self.fingerprint, self.keyring.key(tenant), self.block_size)

    def check_prompt(self, num_tokens: int, largest_id: int, max_new_tokens: int = 0) -> None:
        """Raises:  InvalidRequest: empty, too long for the model or this pool, or an id outside the vocabulary."""
        if num_tokens == 0:
            raise InvalidRequest("the prompt is empty")
        if num_tokens + max_new_tokens > self.identity.max_tokens:
            raise InvalidRequest(
                f"{num_tokens} prompt tokens and {max_new_tokens} new exceed the model's {self.identity.max_tokens}"
            )
        num_blocks = -(-(num_tokens + max_new_tokens) // self.block_size)
        if num_blocks > self.pool.num_blocks:
            raise InvalidRequest(
                f"the request needs {num_blocks} blocks, this worker's pool has {self.pool.num_blocks};"
                " raise pool_bytes or shorten the request"
            )
        if largest_id >= self.identity.vocab_size:
            raise InvalidRequest(f"token id {largest_id} is outside the vocabulary of {self.identity.vocab_size}")

    async def register(self) -> None:
        """Tell the store how payloads are laid out, which lets it compress them; without that they stay as they are."""
        try:
            await self.store.register(self.fingerprint, self.layout)
        except AntefixError as err:
            self.counters.note(err)

    async def close(self) -> None:
        self.compute.close()
        await self.store.close()


def build_engine(config: EngineConfig, store: Store) -> Engine:
    """Load the model and set everything up.

    Raises:  ModelError: the model directory is not usable.  ConfigError: a setting is not.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    identity = identify(config.model)
    kv_format = KVFormat(config.kv_format)
    model = load_model(config.model, device=config.device, dtype=torch.float32, kv_format=kv_format)
    num_blocks = max(1, config.pool_bytes // pool_block_bytes(model.layout))
    pool = BlockPool(model.layout, num_blocks, config.device)
    return Engine(
        identity=identity,
        model=model,
        pool=pool,
        blocks=ResidentBlocks(pool),
        store=store,
        strategy=parse(config.strategy),
        planner=RestorePlanner(Sizes.of(model.layout), Rates()),
        keyring=Keyring.from_file(config.secret_file),
        compute=ComputeThread("model"),
        prefill_chunk=config.prefill_chunk,
        fingerprint=identity.fingerprint(kv_format, namespace=config.namespace).digest,
    )


def pool_block_bytes(layout: BlockLayout) -> int:
    """Memory a pool block takes: its row, and on a CPU the float32 mirror of an FP8 row (see `antefix.model.pool`)."""
    if layout.kv_format is not KVFormat.FP8:
        return layout.block_bytes
    geometry = layout.geometry
    width = {PartKind.INDEXER_KEYS: geometry.indexer_dim}
    return layout.block_bytes + sum(p.num_rows * width.get(p.kind, geometry.head_dim) * 4 for p in layout.parts)
