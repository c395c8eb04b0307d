"""Decode steps on a card, launched one kernel after another or replayed as recorded CUDA graphs.

A step of four layers is some hundred launches, whose way through Python takes longer than what they do. A graph is
recorded once for a number of sequences and a length of block tables, both rounded up to a bucket, and replayed as one
launch: the same kernels with the same arguments, so the same bits. What changes from step to step is one array of
integers (`seated_steps.step_integers`). All graphs share one pool of memory.

Not recorded: replays that write nothing, models over several ranks (their exchanges are the host's), and experts that
are fetched from the host.

Shapes:  S = sequences, B = blocks of the longest table, V = vocabulary, M = streams, D = hidden size.
"""

from __future__ import annotations

import collections.abc
import logging
import time
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from antefix.model.attention import Attention
from antefix.model.host_rows import upload
from antefix.model.layer_loop import run_layers
from antefix.model.model import Model
from antefix.model.numerics import linear
from antefix.model.pool import BlockPool
from antefix.model.seated_steps import NUM_COLUMNS, SEAT, SeatedSteps, TokenIds, step_integers
from antefix.model.seats import Seats
from antefix.model.step_counters import StepCounters
from antefix.model.window_state import Sequence

log = logging.getLogger("antefix.model")

# Sequences of a graph. Rows that fill a batch up to one of these compute a token that nobody asked for.
BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
# Blocks of a graph's tables, at least: 8K tokens of V4's.
_BLOCKS_MIN = 64
# A worker that starts takes no more than so long for recordings, but for the one in hand.
PREPARE_S = 20.0
# Graphs kept; each holds little but its own record of launches.
_GRAPHS_MAX = 64


@dataclass(slots=True)
class _Graph:
    """A recorded step. integers: [S, 4 + B], read by every replay.  generation: of the seats that it reads."""

    graph: torch.cuda.CUDAGraph
    integers: Tensor
    steps: SeatedSteps
    streams: Tensor
    logits: Tensor
    generation: int


class StepRunner:
    """Runs steps for one model's operations. graphs: whether to record them; only on a CUDA card.

    Belongs to one thread, like the pool.
    """

    def __init__(self, *, reproducible: bool, graphs: bool) -> None:
        self._reproducible, self._wants_graphs = reproducible, graphs
        self._seats: Seats | None = None
        self._graphs: weakref.WeakKeyDictionary[BlockPool, dict[tuple[int, int], _Graph]]
        self._graphs = weakref.WeakKeyDictionary()
        self._memory: Any = None
        self.counters = StepCounters()

    def seats(self, model: Model) -> Seats:
        if self._seats is None or self._seats.layout != model.layout:
            self._seats = Seats(model.layout, model.device)
        return self._seats

    def steps(
        self,
        model: Model,
        pool: BlockPool,
        sequences: collections.abc.Sequence[Sequence],
        tokens: TokenIds,
        *,
        write: bool,
    ) -> SeatedSteps:
        """What attends for sequences that run one token each, next to longer ones."""
        seats = self.seats(model)
        integers = upload(step_integers(sequences, tokens, seats), model.device)
        return SeatedSteps(model, pool, seats, integers, write=write, reproducible=self._reproducible)

    def run(
        self,
        model: Model,
        pool: BlockPool,
        sequences: collections.abc.Sequence[Sequence],
        tokens: TokenIds,
        *,
        write: bool,
    ) -> tuple[SeatedSteps, Tensor, Tensor]:
        """A whole step: what keeps its tokens, streams [S, M, D] and logits [S, V]."""
        seats = self.seats(model)
        integers = step_integers(sequences, tokens, seats)
        recorded = self._recorded(model, pool, seats, integers) if write else None
        if recorded is None:
            self.counters.steps_launched += 1
            steps = SeatedSteps(
                model, pool, seats, upload(integers, model.device), write=write, reproducible=self._reproducible
            )
            return steps, *run_step(model, steps)
        num = len(integers)
        filled = _fill(integers, recorded.integers.shape)
        recorded.integers.copy_(torch.from_numpy(filled).pin_memory(), non_blocking=True)
        recorded.graph.replay()
        self.counters.steps_replayed += 1
        # The next replay writes to the same memory.
        return recorded.steps, recorded.streams[:num].clone(), recorded.logits[:num].clone()

    def _recorded(
        self, model: Model, pool: BlockPool, seats: Seats, integers: np.ndarray[tuple[int, int], np.dtype[np.int32]]
    ) -> _Graph | None:
        """A graph that this step fits in; None where none can be recorded."""
        if not self._wants_graphs or model.device.type != "cuda" or model.lead is not None:
            return None
        if model.ranks is not None or model.offload is not None or len(integers) > BUCKETS[-1]:
            return None
        shape = _bucket(len(integers), integers.shape[1] - NUM_COLUMNS)
        graphs = self._graphs.setdefault(pool, {})
        found = graphs.get(shape)
        if found is not None and found.generation == seats.generation:
            return found
        if len(graphs) >= _GRAPHS_MAX:
            graphs.clear()
        try:
            graphs[shape] = self._record(model, pool, seats, shape)
        except RuntimeError:
            # No memory for it, or a library that cannot be recorded: the same kernels are launched one by one.
            log.exception("a decode step cannot be recorded; steps are launched from here on")
            self.counters.recording_errors += 1
            self._wants_graphs = False
        return graphs.get(shape)

    @torch.inference_mode()
    def prepare(self, model: Model, pool: BlockPool, num_sequences_max: int) -> None:
        """Record steps of up to so many sequences with short tables now, rather than when they first come. What does
        not fit into PREPARE_S is left until then."""
        seats, started = self.seats(model), time.monotonic()
        seats.reserve(num_sequences_max)
        for size in BUCKETS:
            if time.monotonic() - started > PREPARE_S:
                return
            self._recorded(model, pool, seats, np.zeros((min(size, num_sequences_max), NUM_COLUMNS + 1), np.int32))
            if size >= num_sequences_max:
                return

    def _record(self, model: Model, pool: BlockPool, seats: Seats, shape: tuple[int, int]) -> _Graph:
        # Seat 0 and position 0: nothing of anybody's is written while it is tried and recorded.
        integers = torch.zeros(shape[0], NUM_COLUMNS + shape[1], dtype=torch.int32, device=model.device)

        def step() -> tuple[SeatedSteps, Tensor, Tensor]:
            steps = SeatedSteps(model, pool, seats, integers, write=True, reproducible=self._reproducible)
            return steps, *run_step(model, steps)

        # Kernels are compiled and what is made once is made before recording begins, on another stream, as torch asks.
        stream = torch.cuda.Stream(model.device)
        stream.wait_stream(torch.cuda.current_stream(model.device))
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream(model.device).wait_stream(stream)
        if self._memory is None:
            self._memory = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            steps, streams, logits = step()
        self.counters.graphs_recorded += 1
        log.info("recorded a decode step of %d sequences and %d blocks", *shape)
        return _Graph(graph, integers, steps, streams, logits, seats.generation)


def run_step(model: Model, steps: SeatedSteps) -> tuple[Tensor, Tensor]:
    """Streams [S, M, D] and logits [S, V] of a step. Nothing here waits for the card."""

    def attend(layer: int, attention: Attention, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        return attention.output(steps.attend(layer, attention, x, rope), *rope)

    streams = run_layers(model, steps.tokens, steps.positions, len(steps.tokens), attend)
    hidden = model.model.norm(model.model.hc_head(streams))
    return streams, linear(hidden, model.lm_head.weight)


def _bucket(num_sequences: int, num_blocks: int) -> tuple[int, int]:
    rows = next(size for size in BUCKETS if size >= num_sequences)
    return rows, max(_BLOCKS_MIN, 1 << (num_blocks - 1).bit_length())


def _fill(
    integers: np.ndarray[tuple[int, int], np.dtype[np.int32]], shape: torch.Size
) -> np.ndarray[tuple[int, int], np.dtype[np.int32]]:
    """The same in a larger array: further rows are nobody's."""
    filled = np.zeros((shape[0], shape[1]), np.int32)
    filled[: integers.shape[0], : integers.shape[1]] = integers
    assert not filled[len(integers) :, SEAT].any()
    return filled
