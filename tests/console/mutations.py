"""Faults that `antefix verify` must find: each is planted in the code of model, window, store or workers.

Each mutation names the subject of the short form that reveals the fault, with which strategies and parts, and the text
that the report must have. docs/VERIFY.md lists the mutations.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from antefix.block import Chain
from antefix.layout import KVGeometry
from antefix.model import arithmetic, indexer, mhc, model_config, numerics, runner
from antefix.model.attend import advance_ring
from antefix.model.ops import TorchOps
from antefix.model.replay import _Part
from antefix.model_dir import ModelIdentity
from antefix.record import RecordKind
from antefix.rope import read_ropes
from antefix.store_files import record_header
from antefix.store_files.index import Index
from antefix.store_files.read_runs import Wanted
from antefix.store_files.segment_reader import Located, StoreReader
from antefix.window import RestorePlanner
from antefix.window.sizes import Sizes
from antefix_decode import store_output
from antefix_decode.scheduler import Scheduler
from antefix_prefill import restore, run_prompt
from antefix_prefill.leave_checkpoints import leave_checkpoint
from antefix_prefill.worker.resident_blocks import ResidentBlocks

Patch = pytest.MonkeyPatch
SET_UPS = "set-ups"


@dataclass(frozen=True, slots=True)
class Mutation:
    """plan: a fixed model, or SET_UPS for other processes.  place: a pattern that one of the failures must match.

    other_plans: further models, for a fault that a processor's kernels may hide with the first. in_products: whether
    the fault is one of products, which may change no bit with a processor's kernels.
    """

    plant: Callable[[Patch], None]
    plan: str
    parts: tuple[str, ...]
    place: str
    strategies: tuple[str, ...] = ("zero",)
    real_store: bool = False
    other_plans: tuple[str, ...] = ()
    in_products: bool = False


def reach_without_overlap(patch: Patch) -> None:
    def reach(self: KVGeometry) -> tuple[int, ...]:
        return tuple(self.window + above * (self.window - 1) for above in reversed(range(self.num_layers)))

    patch.setattr(KVGeometry, "replay_reach", property(reach))


def no_replay_with_a_window_of_one(patch: Patch) -> None:
    right = Sizes.replay_tokens.fget  # type: ignore[attr-defined]
    patch.setattr(Sizes, "replay_tokens", property(lambda self: 0 if self.window_tokens == 1 else right(self)))


def weights_padded_after_the_transpose(patch: Patch) -> None:
    patch.setattr(numerics, "COLUMN_TILE", 1)
    patch.setattr(numerics, "_pad_matrix", lambda b, rows, columns: F.pad(b, (0, columns, 0, rows)))


def rows_not_padded(patch: Patch) -> None:
    patch.setattr(numerics, "ROW_TILE", 1)


def bare_product_in_sinkhorn(patch: Patch) -> None:
    def sinkhorn(logits: torch.Tensor, num_iters: int, eps: float) -> torch.Tensor:
        num_streams = logits.shape[1]
        ones, eye = torch.ones(num_streams, num_streams), torch.eye(num_streams)
        row_sums, column_sums = torch.kron(eye, ones), torch.kron(ones, eye)
        x = torch.exp(logits - logits.amax(-1, keepdim=True)).flatten(1)
        x = x / torch.mm(x, row_sums) + eps
        x = x / (torch.mm(x, column_sums) + eps)
        for _ in range(num_iters - 1):
            x = x / (torch.mm(x, row_sums) + eps)
            x = x / (torch.mm(x, column_sums) + eps)
        return x.view(logits.shape)

    patch.setattr(mhc, "sinkhorn", sinkhorn)
    patch.setattr(arithmetic, "sinkhorn", sinkhorn)


def sigmoid_of_the_library(patch: Patch) -> None:
    patch.setattr(numerics, "sigmoid", torch.sigmoid)
    patch.setattr(mhc, "sigmoid", torch.sigmoid)


def arithmetic_left_out_of_names(patch: Patch) -> None:
    right = ModelIdentity.fingerprint

    def fingerprint(self: ModelIdentity, *args: Any, arithmetic: str = "", **kwargs: Any) -> Any:
        # Only the device and the precision stay in the name, as before the bits of results were measured.
        plain = re.sub(r"(-[0-9a-f]{10}){2}", "", arithmetic)
        return right(self, *args, arithmetic=plain, **kwargs)

    patch.setattr(ModelIdentity, "fingerprint", fingerprint)


def checkpoint_one_token_off(patch: Patch) -> None:
    async def leave(engine: Any, prompt: Any, window: Any, *rest: Any) -> None:
        late = window.clone()
        late.window = late.window.roll(1, 1)
        await leave_checkpoint(engine, prompt, late, *rest)

    patch.setattr(run_prompt, "leave_checkpoint", leave)
    patch.setattr(store_output, "leave_checkpoint", leave)


def overlap_row_lost(patch: Patch) -> None:
    right = _Part._overlap

    def overlap(self: _Part, compressor: Any, state: Any, *rest: Any) -> None:
        right(self, compressor, state, *rest)
        state.overlap[0, 0], state.overlap[1, 0] = 0.0, float("-inf")

    patch.setattr(_Part, "_overlap", overlap)


def lookup_ignores_the_fingerprint(patch: Patch) -> None:
    def present(self: Index, txn: Any, block_hash: bytes, wanted: Any) -> bool:
        entry = self.entry(txn, RecordKind.BLOCK, block_hash)
        return entry is not None and entry.live(wanted.now_ms)

    patch.setattr(Index, "_present", present)


def reader_ignores_the_fingerprint(patch: Patch) -> None:
    """The reader ignores it in the look-up and in the header's check. Either check alone would catch the fault."""

    def locate(self: StoreReader, kind: Any, hashes: Any, *, fingerprint: bytes, tenant: bytes = b"") -> Located:
        located = Located(kind, fingerprint, [], False, tenant)
        with self.index.txn() as txn:
            for number, block_hash in enumerate(hashes):
                if (entry := self.index.entry(txn, kind, block_hash)) is None:
                    break
                located.wanted.append(Wanted(number, block_hash, entry))
        return located

    patch.setattr(StoreReader, "locate", locate)
    right = record_header._places_of

    def places_of(raw: bytes, seed: int, kind: int, block_hash: bytes, fingerprint: bytes) -> Any:
        return right(raw, seed, kind, block_hash, bytes(raw[record_header._FINGERPRINT_AT]))

    patch.setattr(record_header, "_places_of", places_of)


def evicted_row_keeps_its_name(patch: Patch) -> None:
    def evict(self: ResidentBlocks) -> None:
        block_id, _ = self._idle.popitem(last=False)
        self._hash_of.pop(block_id)
        self._pool.release([block_id])

    patch.setattr(ResidentBlocks, "_evict_one", evict)


def digest_says_nothing_of_the_prompt(patch: Patch) -> None:
    patch.setattr(Chain, "digest", lambda self: bytes(32))


def window_rounded_twice_in_a_replay(patch: Patch) -> None:
    class Twice(TorchOps):
        def window_pack(self, entries_TC: torch.Tensor, layout: Any) -> torch.Tensor:
            return super().window_pack(entries_TC.bfloat16().float(), layout)

    right = restore.replay
    patch.setattr(restore, "replay", lambda *args, ops, **kwargs: right(*args, ops=Twice(), **kwargs))


def ties_to_the_highest_index(patch: Patch) -> None:
    def keep_highest(scores: torch.Tensor, worst: torch.Tensor, k: int) -> torch.Tensor:
        better, equal = scores > worst, scores == worst
        from_the_end = equal.flip(1).cumsum(1).flip(1)
        return better | (equal & (from_the_end <= k - better.sum(1, keepdim=True)))

    patch.setattr(indexer, "_keep_lowest", keep_highest)


def window_slot_off_by_one(patch: Patch) -> None:
    def advance(ring: torch.Tensor, new: torch.Tensor, position: int) -> torch.Tensor:
        return advance_ring(ring, new, position + 1)

    patch.setattr(runner, "advance_ring", advance)
    patch.setattr(importlib.import_module("antefix.model.replay"), "advance_ring", advance)


def hit_between_chunks_of_a_cold_run(patch: Patch) -> None:
    right = RestorePlanner.__init__

    def init(self: RestorePlanner, *args: Any, **kwargs: Any) -> None:
        right(self, *args, **kwargs)
        self._step = 1

    patch.setattr(RestorePlanner, "__init__", init)


def sampled_position_off_by_one(patch: Patch) -> None:
    right = Scheduler._finish_step

    class Late:
        def __init__(self, sampler: Any) -> None:
            self.sampler = sampler

        def choose(self, logits: Any, position: int, *rest: Any) -> Any:
            return self.sampler.choose(logits, position + 1, *rest)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.sampler, name)

    async def finish(self: Scheduler, running: Any, *rest: Any) -> None:
        sampler = running.sampler
        running.sampler = Late(sampler)
        try:
            await right(self, running, *rest)
        finally:
            running.sampler = sampler

    patch.setattr(Scheduler, "_finish_step", finish)


def another_attention_factor_of_yarn(patch: Patch) -> None:
    def ropes(*args: Any) -> Any:
        right = read_ropes(*args)
        return replace(right, compress=replace(right.compress, attention_factor=1.14))

    patch.setattr(model_config, "read_ropes", ropes)


MUTATIONS: dict[str, Mutation] = {
    # Model and window.
    "a replay's reach leaves out CSA's overlap": Mutation(
        reach_without_overlap, "long-overlap", ("conversations",), r"overlap state|window, layer|global KV"
    ),
    "nothing is replayed with a window of one": Mutation(
        no_replay_with_a_window_of_one, "window-of-one", ("conversations",), r"overlap|global KV|window|logits"
    ),
    "an overlap row is lost in a replay": Mutation(
        overlap_row_lost, "short-window", ("conversations",), r"overlap|global KV|window|logits"
    ),
    "window KV is rounded twice in a replay": Mutation(
        window_rounded_twice_in_a_replay, "short-window", ("conversations",), r"window, layer|logits|global KV"
    ),
    "window slots are off by one": Mutation(window_slot_off_by_one, "odd-sizes", ("cuts",), r"cut at|in a batch"),
    "ties of the indexer go to the highest index": Mutation(
        ties_to_the_highest_index, "short-window", ("ties",), r"ties go to a higher index"
    ),
    "YaRN's attention factor is another one": Mutation(
        another_attention_factor_of_yarn, "flash", ("answers",), r"away from transformers'"
    ),
    # Arithmetic.
    "weights are padded after they were transposed": Mutation(
        weights_padded_after_the_transpose,
        "odd-sizes",
        ("arithmetic", "cuts"),
        r"100 x 6: depends on a row's place",
        in_products=True,
    ),
    "rows are not padded to whole tiles": Mutation(
        rows_not_padded, "odd-sizes", ("arithmetic", "cuts"), r"100 x 6: depends on a row's place"
    ),
    # AVX-512 kernels sum the 9 columns of 3 streams in one order for any rows, and the 16 of 4 streams from 2 rows on.
    "sinkhorn has a bare product": Mutation(
        bare_product_in_sinkhorn,
        "odd-sizes",
        ("arithmetic", "cuts"),
        r"sinkhorn of \d streams: depends on a row's place|cut at|in a batch",
        other_plans=("pro",),
    ),
    "sigmoid is the library's": Mutation(
        sigmoid_of_the_library, "odd-sizes", ("arithmetic", "cuts"), r"sigmoid|cut at|in a batch"
    ),
    "names leave out the arithmetic": Mutation(
        arithmetic_left_out_of_names, SET_UPS, (), r"other bits under the same name with 1 thread, MKL_CBWR=COMPATIBLE"
    ),
    # Store.
    "a lookup finds blocks of another fingerprint": Mutation(
        lookup_ignores_the_fingerprint,
        "window-of-one",
        ("conversations", "names"),
        r"blocks of another fingerprint were found",
        ("full", "zero"),
        real_store=True,
    ),
    "a read returns blocks of another fingerprint": Mutation(
        reader_ignores_the_fingerprint,
        "window-of-one",
        ("conversations", "names"),
        r"of another fingerprint (were|was) returned",
        ("full", "zero"),
        real_store=True,
    ),
    # Workers.
    "a checkpoint is taken one token off": Mutation(
        checkpoint_one_token_off, "odd-sizes", ("conversations",), r"checkpoint", ("full",)
    ),
    "a handoff of another prompt is taken": Mutation(
        digest_says_nothing_of_the_prompt, "window-of-one", ("handoffs",), r"a handoff of another prompt was taken"
    ),
    "a row that was evicted keeps its name": Mutation(
        evicted_row_keeps_its_name, "pro", ("rows",), r"reused rows|rows: "
    ),
    "sampled positions are off by one": Mutation(
        sampled_position_off_by_one, "pro", ("served",), r"continued after \d+: output token"
    ),
    "a reproducible hit resumes between chunks": Mutation(
        hit_between_chunks_of_a_cold_run, "odd-ratios", ("reproducible",), r"a hit resumed at|calls of a cold run"
    ),
}
