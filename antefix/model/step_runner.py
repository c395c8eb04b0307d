"""Decode steps on a GPU, launched one kernel after another or replayed as recorded CUDA graphs.

A decode step of four layers is some hundred launches, and issuing them from Python takes longer than running them. A
CUDA graph is recorded once for a number of sequences and a length of block tables, both rounded up to a bucket, and
replayed as one launch: the same kernels with the same arguments, so the same bits. Only one array of integers changes
from step to step (`seated_steps.step_integers`). All recorded graphs share one pool of memory.

These are not recorded: replays of prompts that write nothing, experts that are fetched from the host, and, unless the
settings ask for it, models over several ranks.

Shapes:  S = sequences, B = blocks of the longest table, V = vocabulary, M = streams, D = hidden size.
"""

from __future__ import annotations

import collections.abc
import contextlib
import gc
import logging
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from antefix.block import TokenArray
from antefix.model.attention import Attention
from antefix.model.host_rows import HostIntegers, upload
from antefix.model.layer_loop import run_layers
from antefix.model.model import Model
from antefix.model.numerics import linear
from antefix.model.pool import BlockPool
from antefix.model.seated_chunks import (
    SEQUENCES_MAX,
    TOKENS_MAX,
    ChunkShape,
    NewRows,
    PendingChunk,
    SeatedChunks,
    chunk_integers,
    shape_of,
)
from antefix.model.seated_steps import NUM_COLUMNS, SeatedSteps, TokenIds, step_integers
from antefix.model.seats import Seats
from antefix.model.step_counters import StepCounters
from antefix.model.window_state import Sequence, WindowState

log = logging.getLogger("antefix.model")

# Numbers of sequences for which graphs are recorded. Extra rows that fill a batch up to one of these are ignored.
BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
# Fewest blocks of a graph's block tables: 8K tokens of V4.
_BLOCKS_MIN = 64
# A starting worker records graphs for at most this long; a recording that has begun is finished.
PREPARE_S = 20.0
# Most graphs that are kept, the latest used ones; a graph holds little memory but its own record of launches.
_GRAPHS_MAX = 64
# Fewest rows, and fewest sequences (the dummy included), of a graph for several tokens per sequence.
_ROWS_MIN = 16
_CHUNK_SEQUENCES = (2, 5, 17, SEQUENCES_MAX + 1)
# Most tokens times positions of the longest table: with one entry per four positions this is 512 MiB of scores.
_SCORES_MAX = 1 << 29


Run = TypeVar("Run", bound=SeatedSteps)
Made = TypeVar("Made")
Batch = collections.abc.Sequence[tuple[Sequence, TokenArray]]
Step = Callable[[Tensor], tuple[Run, tuple[Tensor, Tensor]]]


@dataclass(slots=True)
class _Graph(Generic[Run]):
    """A recorded decode step. inputs: fills the array that every replay reads. rows: streams, and logits (for chunks:
    the inputs of the head). generation: that of the seats that the graph reads.
    """

    replay: Callable[[], object]
    inputs: HostIntegers
    steps: Run
    rows: tuple[Tensor, Tensor]
    generation: int


class StepRunner:
    """Runs decode steps with one model's operations. graphs: whether to record steps as CUDA graphs; only on a CUDA
    GPU.

    over_ranks: whether graphs of a model over several ranks are recorded too. Exchanges between ranks are then part of
        the graphs, so all ranks record the same steps in the same order. chunks: whether short calls of several tokens
        per sequence also share launches (`antefix.model.seated_chunks`). The runner of steps belongs to one thread,
        like the pool.
    """

    def __init__(self, *, reproducible: bool, graphs: bool, over_ranks: bool = False, chunks: bool = False) -> None:
        self._reproducible, self._wants_graphs = reproducible, graphs
        self._over_ranks, self._takes_chunks = over_ranks, chunks
        self._seats: Seats | None = None
        self._graphs: weakref.WeakKeyDictionary[BlockPool, dict[object, _Graph[Any]]] = weakref.WeakKeyDictionary()
        self._memory: Any = None
        self._new: NewRows | None = None
        # The last call of several tokens per sequence, as long as tokens of it may still be kept.
        self._chunk: weakref.ref[PendingChunk] | None = None
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
        """The attention for sequences that run one token each, in a batch that also has longer ones."""
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
        """Run a whole step. Returns the object that keeps tokens of the step, streams [S, M, D] and logits [S, V]."""
        seats = self.seats(model)
        integers = step_integers(sequences, tokens, seats)
        recorded = self._recorded_step(model, pool, seats, integers) if write else None
        if recorded is None:
            self.counters.steps_launched += 1
            steps = SeatedSteps(
                model, pool, seats, upload(integers, model.device), write=write, reproducible=self._reproducible
            )
            return steps, *run_step(model, steps)
        num = len(integers)
        self._replay(recorded, integers)
        # Copies, because the next replay writes to the same memory.
        streams, logits = recorded.rows
        return recorded.steps, streams[:num].clone(), logits[:num].clone()

    def takes(self, batch: Batch) -> bool:
        """Whether `run_chunk` can run this batch."""
        num_tokens = sum(len(tokens) for _, tokens in batch)
        if not self._takes_chunks or num_tokens > TOKENS_MAX or len(batch) > SEQUENCES_MAX:
            return False
        # The size of the index scores: for each token, all entries of the longest table.
        entries = (
            max(len(sequence.block_table) for sequence, _ in batch) * batch[0][0].window.layout.geometry.block_size
        )
        return num_tokens * entries <= _SCORES_MAX

    @torch.inference_mode()
    def seat_early(self, model: Model, window: WindowState, num_tokens: int) -> None:
        """Give a window state its seat before `run_chunk` or `run` asks for it, if they will run its next `num_tokens`
        tokens.
        """
        if model.lead is None and (num_tokens == 1 or (self._takes_chunks and num_tokens <= TOKENS_MAX)):
            self.seats(model).take([window])

    def run_chunk(
        self, model: Model, pool: BlockPool, batch: Batch, *, write: bool
    ) -> tuple[PendingChunk, Tensor, Tensor]:
        """Run each sequence's new tokens. Returns the object that keeps tokens of the chunk, streams [N, M, D] and the
        head's inputs [N, D].
        """
        seats = self.seats(model)
        # Take seats first: if there are too few, all seats move, and recorded graphs would read the old memory.
        seats.take([sequence.window for sequence, _ in batch])
        self._free_rows(seats)
        new, shape = self._new_rows(seats), shape_of(batch)
        recorded = self._recorded_chunk(model, pool, seats, shape) if write else None
        if recorded is None:
            self.counters.steps_launched += 1
            integers = upload(chunk_integers(batch, seats, shape), model.device)
            steps = self._chunks(model, pool, seats, integers, shape, write=write)
            rows = run_rows(model, steps)
        else:
            self._replay(recorded, chunk_integers(batch, seats, recorded.steps.shape))
            rows = recorded.rows
        pending = PendingChunk.of(batch, seats, new)
        self._chunk = weakref.ref(pending)
        num = shape.rows
        return pending, *((each[:num].clone() for each in rows) if recorded else rows)

    def _free_rows(self, seats: Seats) -> None:
        """Let the previous call copy rows that may still be kept, because this call will overwrite their memory."""
        seats.settle()
        before = None if self._chunk is None else self._chunk()
        if before is not None:
            before.leave_rows()

    def _new_rows(self, seats: Seats) -> NewRows:
        if self._new is None:
            self._new = NewRows(seats, TOKENS_MAX)
        return self._new

    def _chunks(
        self, model: Model, pool: BlockPool, seats: Seats, integers: Tensor, shape: ChunkShape, *, write: bool
    ) -> SeatedChunks:
        new = self._new_rows(seats)
        return SeatedChunks(
            model, pool, seats, integers, write=write, reproducible=self._reproducible, shape=shape, new=new
        )

    def _replay(self, recorded: _Graph[Any], integers: np.ndarray[Any, np.dtype[np.int32]]) -> None:
        recorded.inputs.send(integers)
        recorded.replay()
        self.counters.steps_replayed += 1

    def _recorded_step(
        self, model: Model, pool: BlockPool, seats: Seats, integers: np.ndarray[tuple[int, int], np.dtype[np.int32]]
    ) -> _Graph[SeatedSteps] | None:
        """A recorded graph into whose bucket this step fits; None if none can be recorded."""
        if len(integers) > BUCKETS[-1]:
            return None
        rows, blocks = _bucket(len(integers), integers.shape[1] - NUM_COLUMNS)
        settings: dict[str, Any] = {"write": True, "reproducible": self._reproducible}

        def step(given: Tensor) -> tuple[SeatedSteps, tuple[Tensor, Tensor]]:
            steps = SeatedSteps(model, pool, seats, given, **settings)
            return steps, run_step(model, steps)

        return self._recorded(model, pool, seats, (rows, NUM_COLUMNS + blocks), step)

    def _recorded_chunk(
        self, model: Model, pool: BlockPool, seats: Seats, shape: ChunkShape
    ) -> _Graph[SeatedChunks] | None:
        filled = chunk_bucket(shape)

        def step(given: Tensor) -> tuple[SeatedChunks, tuple[Tensor, Tensor]]:
            steps = self._chunks(model, pool, seats, given, filled, write=True)
            return steps, run_rows(model, steps)

        return self._recorded(model, pool, seats, filled, step)

    def _may_record(self, model: Model) -> bool:
        is_apart = model.lead is None and model.ranks is None
        return (
            self._wants_graphs
            and model.device.type == "cuda"
            and model.offload is None
            and (is_apart or self._over_ranks)
        )

    def _recorded(
        self, model: Model, pool: BlockPool, seats: Seats, shape: tuple[int, int] | ChunkShape, step: Step[Run]
    ) -> _Graph[Run] | None:
        """The recorded graph for integers of this shape; None if none can be recorded."""
        if not self._may_record(model):
            return None
        graphs = self._graphs.setdefault(pool, {})
        # The graph used last stands last, so the first one was not used for longest.
        found = graphs.pop(shape, None)
        if found is not None and found.generation == seats.generation:
            graphs[shape] = found
            return found
        if len(graphs) >= _GRAPHS_MAX:
            del graphs[next(iter(graphs))]
        # A graph that is recorded again needs no warm-up. Over ranks there must be none: each rank moves its seats at
        # its own time, so the others would not take part in a trial step.
        made = self._record(model, seats, shape, step, is_warm=found is not None)
        if made is None:
            self._wants_graphs = False
            return None
        graphs[shape] = made
        return made

    def _record(
        self, model: Model, seats: Seats, shape: tuple[int, int] | ChunkShape, step: Step[Run], *, is_warm: bool
    ) -> _Graph[Run] | None:
        made: _Graph[Run] | None = None
        try:
            # With seat 0 and position 0, the trial and the recording write to no sequence's state.
            size = (shape.num_integers,) if isinstance(shape, ChunkShape) else shape
            integers = torch.zeros(size, dtype=torch.int32, device=model.device)
            replay, (steps, rows) = self._captured(model, lambda: step(integers), is_warm=is_warm)
            made = _Graph(replay, HostIntegers(integers), steps, rows, seats.generation)
        except RuntimeError:
            # There is no memory, or a library call cannot be recorded: from now on kernels are launched one by one.
            log.exception(
                "a decode step cannot be recorded as a CUDA graph; from now on each step launches its kernels "
                "one by one"
            )
            self.counters.recording_errors += 1
        if model.ranks is not None and not is_warm and not model.ranks.agree(made is not None):
            return None
        if made is not None:
            self.counters.graphs_recorded += 1
            log.info("recorded a decode step of shape %s as a CUDA graph", shape)
        return made

    def _captured(self, model: Model, step: Callable[[], Made], *, is_warm: bool) -> tuple[Callable[[], object], Made]:
        """Record the step. Returns the function that replays the graph, and the step's result."""
        if not is_warm:
            # A trial run first: it compiles kernels and makes what is made once, on another stream, as torch's
            # documentation asks.
            stream = torch.cuda.Stream(model.device)
            stream.wait_stream(torch.cuda.current_stream(model.device))
            with torch.cuda.stream(stream):
                step()
            torch.cuda.current_stream(model.device).wait_stream(stream)
        if self._memory is None:
            self._memory = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with (
            _recording(model.device, self._memory),
            torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"),
        ):
            made = step()
        return graph.replay, made

    @torch.inference_mode()
    def prepare(self, model: Model, pool: BlockPool, num_sequences_max: int) -> None:
        """Record steps of up to `num_sequences_max` sequences with short tables now instead of at their first use.
        Steps that do not fit into PREPARE_S are recorded at their first use.
        """
        seats, started = self.seats(model), time.monotonic()
        seats.reserve(num_sequences_max)
        if model.ranks is not None:
            return  # the other ranks must record together with this one, in a call that is sent to them
        for size in BUCKETS:
            if time.monotonic() - started > PREPARE_S:
                return
            self._recorded_step(model, pool, seats, np.zeros((min(size, num_sequences_max), NUM_COLUMNS + 1), np.int32))
            if size >= num_sequences_max:
                return


@contextlib.contextmanager
def _recording(device: torch.device, memory: Any) -> Iterator[None]:
    """Keeps a recording from failing by chance, and a failed one from changing what runs after it.

    Collecting an old graph as garbage is not permitted during a recording and ends it, so the collector waits. After a
    failed recording `torch.cuda.graph` leaves its own stream as this thread's current one: later steps would then run
    next to the work of other threads instead of after it, and read states that are still being written. It also leaves
    the recording's memory open, in which case torch no longer frees unused memory when memory is short.
    """
    stream, collects = torch.cuda.current_stream(device), gc.isenabled()
    gc.disable()
    try:
        yield
    except BaseException:
        # It is closed if the recording itself ended well; another torch may have no such function.
        with contextlib.suppress(RuntimeError, AttributeError):
            torch._C._cuda_endAllocateToPool(stream.device_index, memory)
        raise
    finally:
        # First, because a call of a GPU that is lost fails too.
        if collects:
            gc.enable()
        torch.cuda.set_stream(stream)


def run_rows(model: Model, steps: SeatedSteps) -> tuple[Tensor, Tensor]:
    """Streams [N, M, D] of all rows, and the inputs of the head [N, D]. Never waits for the GPU."""

    def attend(layer: int, attention: Attention, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        return attention.output(steps.attend(layer, attention, x, rope), *rope)

    streams = run_layers(model, steps.tokens, None, len(steps.tokens), attend, ropes=steps.ropes)
    return streams, model.model.norm(model.model.hc_head(streams))


def run_step(model: Model, steps: SeatedSteps) -> tuple[Tensor, Tensor]:
    """Streams [S, M, D] and logits [S, V] of a step."""
    streams, hidden = run_rows(model, steps)
    return streams, linear(hidden, model.lm_head.weight)


def chunk_bucket(shape: ChunkShape) -> ChunkShape:
    rows = max(_ROWS_MIN, 1 << (shape.rows - 1).bit_length())
    sequences = next(size for size in _CHUNK_SEQUENCES if size >= shape.sequences)
    return ChunkShape(rows, sequences, _blocks(shape.blocks))


def _bucket(num_sequences: int, num_blocks: int) -> tuple[int, int]:
    rows = next(size for size in BUCKETS if size >= num_sequences)
    return rows, _blocks(num_blocks)


def _blocks(num_blocks: int) -> int:
    return max(_BLOCKS_MIN, 1 << (num_blocks - 1).bit_length())
