"""vLLM's side of the tier, without vLLM: the classes that the tier uses, and an engine that moves rows as vLLM's
offloading scheduler does. `test_vllm_interface.py` compares the classes with two wheels' interfaces.

    with stand_in() as vllm: ...     `antefix_engines.vllm.tier` and `.spec`, imported on top of the stand-in
    Engine(...)                      host memory, a manager and a tier; `store` and `restore` prompts of random rows
"""

import contextlib
import enum
import hashlib
import importlib
import sys
import time
import types
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np

from antefix_engines.vllm.shape import Group, Shape

# --- vllm.v1.kv_offload.base -----------------------------------------------------------------------------------------


class LookupResult(enum.Enum):
    MISS = 1
    HIT = 2
    HIT_PENDING = 3
    RETRY = 4


class Medium(enum.Enum):
    CPU = "CPU"
    STORAGE = "STORAGE"


class Locality(enum.Enum):
    LOCAL = "LOCAL"
    REMOTE = "REMOTE"


@dataclass
class ReqContext:
    req_id: str
    _state: dict = field(default_factory=dict)
    _offload_key_positions: dict = field(default_factory=dict)

    def set_state(self, val):
        self._state[type(val)] = val

    def get_state(self, cls):
        return self._state.get(cls)

    def set_offload_key_position(self, key, end_token):
        self._offload_key_positions[key] = end_token

    def get_offload_key_position(self, key):
        return self._offload_key_positions.get(key)


@dataclass
class RequestOffloadingContext:
    policy: str = "chunk_level"


@dataclass
class OffloadingEvent:
    keys: list
    medium: Medium
    removed: bool
    locality: Locality | None = None


@dataclass(frozen=True)
class OffloadingCounterMetadata:
    documentation: str
    labelnames: tuple = ()


# --- vllm.v1.kv_offload.tiering.base ---------------------------------------------------------------------------------


@dataclass
class TransferJob:
    job_id: int
    keys: list
    chunk_ids: np.ndarray
    is_promotion: bool
    req_context: ReqContext
    submit_time: float = field(default_factory=time.monotonic)


@dataclass
class JobResult:
    job_id: int
    success: bool
    successful_keys: list | None = None
    transfer_time: float | None = None
    transfer_bytes: int | None = None


class SecondaryTierManager:
    medium = None

    def __init__(self, offloading_spec, primary_kv_view, tier_type, backpressure_detector=None):
        self.tier_type = tier_type
        self.locality = None


class OffloadingConnectorStats:
    def __init__(self):
        self.counters = {}

    def increase_counter(self, counter_name, counter_increase_value=1, labelvalues=()):
        self.counters[counter_name] = self.counters.get(counter_name, 0) + counter_increase_value

    def is_empty(self):
        return not self.counters


# --- vllm.v1.kv_offload.tiering.manager, spec ------------------------------------------------------------------------


class Manager:
    """The primary tier as a dict, with one secondary tier."""

    def __init__(self, tier, view):
        self.tier = tier
        self.view = view
        self.primary = {}

    def shutdown(self):
        """Raises BufferError if a part of the memory is still held, as in vLLM."""
        self.tier.shutdown()
        self.view.release()

    def lookup(self, key, req_context, *, exclude_tier_idx=None):
        return LookupResult.HIT if key in self.primary else self.tier.lookup(key, req_context)


class TieringOffloadingSpec:
    def __init__(self, config):
        self.config = config
        self.extra_config = config.extra_config
        self.replicated_layout = config.replicated_layout
        self.kv_events_config = SimpleNamespace(enable_kv_cache_events=config.enable_kv_cache_events)
        copies = 1 if self.replicated_layout else config.parallel.world_size
        self.kv_bytes_per_chunk = -(-config.worker_kv_bytes_per_block * copies // 4096) * 4096
        self.memory = np.zeros((config.num_chunks, self.kv_bytes_per_chunk), np.int8)
        self._manager = None

    def get_manager(self):
        if self._manager is None:
            settings = dict(self.extra_config["secondary_tiers"][0])
            tier_class = settings.pop("tier_class")
            view = memoryview(self.memory)
            tier = tier_class(offloading_spec=self, primary_kv_view=view, tier_type="AntefixTier", **settings)
            self._manager = Manager(tier, view)
        return self._manager


def _modules():
    base = {
        each.__name__: each
        for each in (LookupResult, Medium, Locality, ReqContext, RequestOffloadingContext, OffloadingEvent)
    } | {"OffloadingCounterMetadata": OffloadingCounterMetadata}
    return {
        "vllm": {},
        "vllm.platforms": {
            "current_platform": SimpleNamespace(device_type="card", get_device_name=lambda: "Test Card")
        },
        "vllm.distributed": {},
        "vllm.distributed.kv_transfer": {},
        "vllm.distributed.kv_transfer.kv_connector": {},
        "vllm.distributed.kv_transfer.kv_connector.v1": {},
        "vllm.distributed.kv_transfer.kv_connector.v1.offloading": {},
        "vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics": {
            "OffloadingConnectorStats": OffloadingConnectorStats
        },
        "vllm.v1": {},
        "vllm.v1.kv_offload": {},
        "vllm.v1.kv_offload.base": base,
        "vllm.v1.kv_offload.tiering": {},
        "vllm.v1.kv_offload.tiering.base": {"JobResult": JobResult, "SecondaryTierManager": SecondaryTierManager},
        "vllm.v1.kv_offload.tiering.spec": {"TieringOffloadingSpec": TieringOffloadingSpec},
    }


@contextlib.contextmanager
def stand_in():
    """Our modules that import vLLM, imported on top of the stand-in. Afterwards all imports are restored."""
    ours = ("antefix_engines.vllm.tier", "antefix_engines.vllm.spec")
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name in ours or name.split(".")[0] == "vllm"}
    for name, contents in _modules().items():
        module = types.ModuleType(name)
        module.__dict__.update(contents)
        module.__path__ = []
        sys.modules[name] = module
    try:
        yield SimpleNamespace(**{name.rsplit(".", 1)[1]: importlib.import_module(name) for name in ours})
    finally:
        for name in [*_modules(), *ours]:
            sys.modules.pop(name, None)
        sys.modules.update(before)


# --- an engine -------------------------------------------------------------------------------------------------------

TINY_V4 = (
    Group(id=0, num_tokens=64, layers=("model.layers.0.attn.swa_cache", "model.layers.3.attn.swa_cache")),
    Group(id=1, num_tokens=64, layers=("model.layers.1.attn.swa_cache", "model.layers.4.attn.swa_cache")),
    Group(id=2, num_tokens=64, layers=("model.layers.2.attn.swa_cache",)),
    Group(
        id=3,
        num_tokens=256,
        layers=(
            "model.layers.2.attn.indexer.k_cache",
            "model.layers.2.attn",
            "model.layers.3.attn",
            "model.layers.4.attn.indexer.k_cache",
            "model.layers.4.attn",
        ),
    ),
    Group(
        id=4,
        num_tokens=4,
        layers=(
            "model.layers.2.attn.indexer.compressor.state_cache",
            "model.layers.2.attn.compressor.state_cache",
            "model.layers.4.attn.indexer.compressor.state_cache",
            "model.layers.4.attn.compressor.state_cache",
        ),
    ),
    Group(id=5, num_tokens=8, layers=("model.layers.3.attn.compressor.state_cache",)),
)
TINY_V4_ROW = 93888
# The number of rows before its end that a hit needs, by group; 0 means all rows.
V4_WINDOWS = {0: 2, 1: 2, 2: 2, 3: 0, 4: 2, 5: 16}


def config_of(groups=TINY_V4, *, row_bytes=TINY_V4_ROW, num_chunks=256, tells_windows=False, events=False, **other):
    """An `OffloadingConfig`.  other: values of fields of its parts, by name."""
    parallel = {
        "rank": 0,
        "world_size": 1,
        "tp_size": 1,
        "pp_size": 1,
        "pcp_size": 1,
        "dcp_size": 1,
        "is_parallelism_agnostic": False,
    }
    rows = [
        SimpleNamespace(
            group_id=group.id,
            tokens_per_block=group.num_tokens,
            layer_names=group.layers,
            **({"sliding_window_size_in_chunks": group.num_window_rows or None} if tells_windows else {}),
        )
        for group in groups
    ]
    return SimpleNamespace(
        groups=tuple(rows),
        worker_kv_bytes_per_block=row_bytes,
        enable_kv_cache_events=events,
        extra_config={},
        model=SimpleNamespace(name=other.get("model", "hub/model"), dtype=other.get("dtype", "fp8_ds_mla")),
        cache=SimpleNamespace(
            tokens_per_hash=min(group.num_tokens for group in groups), blocks_per_chunk=other.get("blocks_per_chunk", 1)
        ),
        parallel=SimpleNamespace(**parallel | {name: other[name] for name in parallel if name in other}),
        replicated_layout=other.get("replicated_layout", False),
        kv_cache_layout=other.get("kv_cache_layout", "BLHNC"),
        num_chunks=num_chunks,
    )


class Engine:
    """Does what vLLM does around a tier. A prompt is a list of tokens, and a row's bytes follow from its prompt, group
    and position.
    """

    def __init__(self, modules, settings, config=None, *, is_aligned=True, windows=None):
        self.config = config if config is not None else config_of()
        self.windows = windows if windows is not None else V4_WINDOWS
        self.config.extra_config["secondary_tiers"] = [{"tier_class": modules.tier.AntefixTier, **settings}]
        spec_class = modules.spec.AntefixSpec if is_aligned else TieringOffloadingSpec
        self.spec = spec_class(self.config)
        self.manager = self.spec.get_manager()
        self.tier = self.manager.tier
        self.memory = self.spec.memory.view(np.uint8)
        self.results = {}
        self._num_jobs = self._num_requests = self._next_chunk = 0

    def close(self):
        self.manager.shutdown()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def request(self, tokens):
        """A request's context that knows the ends of all its keys, as in vLLM."""
        self._num_requests += 1
        context = ReqContext(f"request-{self._num_requests}")
        for group in self.config.groups:
            step = group.tokens_per_block * self.config.cache.blocks_per_chunk
            for end in range(step, len(tokens) + 1, step):
                context.set_offload_key_position(key_of(tokens, group.group_id, end), end)
        self.tier.on_new_request(context)
        return context

    def rows_of(self, tokens, *, ends=None):
        """(group, end) of all rows that vLLM stores. Of windows, only rows that a hit at one of `ends` needs."""
        full = next(group for group in self.config.groups if not self.windows[group.group_id])
        boundaries = ends if ends is not None else range(full.tokens_per_block, len(tokens) + 1, full.tokens_per_block)
        rows = []
        for group in self.config.groups:
            step, window = group.tokens_per_block, self.windows[group.group_id]
            if not window:
                rows += [(group.group_id, end) for end in range(step, len(tokens) + 1, step)]
            else:
                rows += [(group.group_id, end - step * back) for end in boundaries for back in reversed(range(window))]
        return sorted(set(rows), key=lambda row: (row[1], row[0]))

    def fill(self, tokens, rows, *, ranks=None):
        """Put rows into host memory. Returns their keys and chunks."""
        chunks = [self._chunk() for _ in rows]
        for (group, end), chunk in zip(rows, chunks, strict=True):
            self.memory[chunk] = 0
            width = self.config.worker_kv_bytes_per_block
            for rank in range(1 if self.config.replicated_layout else self.config.parallel.world_size):
                seed = rank if ranks == "differ" else 0
                self.memory[chunk, rank * width : (rank + 1) * width] = row_bytes(tokens, group, end, width, seed)
        return [key_of(tokens, *row) for row in rows], np.array(chunks)

    def submit_store(self, context, tokens, rows, **how):
        keys, chunks = self.fill(tokens, rows, **how)
        self._num_jobs += 1
        self.tier.submit_store(TransferJob(self._num_jobs, keys, chunks, False, context))
        return self._num_jobs

    def store(self, tokens, *, ends=None, num_jobs=1, **how):
        """Store all rows of a prompt, in jobs as vLLM's steps make them. Returns the results."""
        context, rows = self.request(tokens), self.rows_of(tokens, ends=ends)
        size = -(-len(rows) // num_jobs)
        jobs = [self.submit_store(context, tokens, rows[at : at + size], **how) for at in range(0, len(rows), size)]
        self.tier.drain_jobs()
        self.tier.on_request_finished(context)
        return [self.result(job) for job in jobs]

    def result(self, job_id):
        self.results |= {result.job_id: result for result in self.tier.get_finished_jobs()}
        return self.results.pop(job_id)

    def ask(self, context, key):
        """Ask for a key, and run steps until there is an answer."""
        for _ in range(2000):
            found = self.manager.lookup(key, context)
            self.tier.on_schedule_end(None)
            if found is not LookupResult.RETRY:
                return found
            time.sleep(0.005)
        raise AssertionError("no verdict")

    def num_hit(self, tokens, context=None):
        """The number of tokens that vLLM would load by its rules: a prefix of full rows, then runs of window rows from
        the end.
        """
        context = context or self.request(tokens)
        for key in context._offload_key_positions:
            # As in vLLM, the first step asks for all keys.
            self.manager.lookup(key, context)
        most = len(tokens) - 1
        full = [group for group in self.config.groups if not self.windows[group.group_id]]
        others = [group for group in self.config.groups if self.windows[group.group_id]]
        while True:
            before = most
            for group in full:
                step, number = group.tokens_per_block, 0
                for end in range(step, min(-(-most // step) * step, len(tokens)) + 1, step):
                    if self.ask(context, key_of(tokens, group.group_id, end)) is not LookupResult.HIT:
                        break
                    number += 1
                most = min(most, number * step)
            for group in others:
                most = min(most, self._end_of_run(context, tokens, group, most))
            if most == before or most <= 0:
                return max(most, 0)

    def _end_of_run(self, context, tokens, group, most):
        step, window, run = group.tokens_per_block, self.windows[group.group_id], 0
        last = min(-(-most // step), len(tokens) // step)
        for number in range(last, 0, -1):
            is_hit = self.ask(context, key_of(tokens, group.group_id, number * step)) is LookupResult.HIT
            run = run + 1 if is_hit else 0
            if run == window:
                return (number + window - 1) * step
        return 0

    def restore(self, tokens, end, context=None):
        """Load the rows that a hit at `end` needs over rows with other bytes. Returns ({(group, end): row}, result)."""
        context = context or self.request(tokens)
        rows = self.rows_of(tokens[:end], ends=[end])
        keys = [key_of(tokens, *row) for row in rows]
        for key in keys:
            self.ask(context, key)
        chunks = [self._chunk() for _ in rows]
        for chunk in chunks:
            self.memory[chunk] = 0xEE
        self._num_jobs += 1
        self.tier.submit_load(TransferJob(self._num_jobs, keys, np.array(chunks), True, context))
        self.tier.drain_jobs()
        result = self.result(self._num_jobs)
        filled = {row: self.memory[chunk].copy() for row, chunk in zip(rows, chunks, strict=True)}
        return filled, result

    def _chunk(self):
        self._next_chunk = (self._next_chunk + 1) % self.config.num_chunks
        return self._next_chunk


def key_of(tokens, group, end):
    """A row's key as in vLLM: a hash of all tokens up to the row's end, and the group."""
    return hashlib.sha256(np.array(tokens[:end], "<u4").tobytes()).digest() + group.to_bytes(4, "big")


def row_bytes(tokens, group, end, width, seed=0):
    """A row's bytes, which are random and differ from row to row."""
    name = hashlib.sha256(key_of(tokens, group, end) + bytes([seed])).digest()
    return np.random.default_rng(list(name[:8])).integers(0, 256, width, np.uint8)


def shape_of(plan, **other):
    """The `Shape` of a plan that vLLM's planner made (`vllm_cpu/plan_flash.py`)."""
    groups = tuple(
        Group(
            id=row["id"],
            num_tokens=row["num_tokens"],
            layers=tuple(row["layers"]),
            num_window_rows=row["num_window_rows"],
        )
        for row in plan["groups"]
    )
    fields = {
        "groups": groups,
        "cell_bytes": plan["row_bytes"],
        "num_cells": 1,
        "row_stride": -(-plan["row_bytes"] // 4096) * 4096,
        "blocks_per_row": 1,
        "dtype": "fp8_ds_mla",
        "layout": "BLHNC",
        "model": "flash",
        "tokens_per_hash": 4,
        "tp_size": 1,
        "is_cut_otherwise": False,
        "is_replicated": False,
        "is_one_whole": False,
    }
    return Shape(**fields | other)
