"""The forward pass for serving: ragged batches of new tokens over the pool and each sequence's window state.

One call takes any number of sequences, each with any number of new tokens: a prefill chunk is one sequence with many
tokens, a decode step many sequences with one token each (two with a drafted one). On a CPU a sequence's results have
the same bits however its tokens are cut into calls and whatever else is in the batch (see `numerics`, `attend`).

Shapes:  N = tokens of the whole batch, padded to ROW_TILE rows; T = tokens of one sequence; M = streams,
         D = hidden size, V = vocabulary.
"""

from __future__ import annotations

import collections.abc
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from antefix.block import TokenArray, Tokens, as_tokens
from antefix.errors import InternalError
from antefix.layout import LayerKind, PartKind
from antefix.model.attend import WindowLine, advance_ring, line_up
from antefix.model.attention import Attention, CSACompressor
from antefix.model.batch_check import check_piece
from antefix.model.compiled.switch import is_compiled
from antefix.model.compressor import Compressor
from antefix.model.host_rows import upload
from antefix.model.layer_loop import run_layers
from antefix.model.lead import LeadCall
from antefix.model.model import DecoderLayer, Model
from antefix.model.numerics import ROW_TILE, ROWS_FEW, linear
from antefix.model.ops import Entries, Ops, TorchOps
from antefix.model.parted_layers import PartedLayers
from antefix.model.pauses import layers_pause
from antefix.model.pool import BlockPool
from antefix.model.row_threads import parts_of
from antefix.model.step_threads import step_threads
from antefix.model.steps import Steps, TokenRows, steps_of
from antefix.model.window_state import CompressorState, Sequence, WindowState

if TYPE_CHECKING:
    from antefix.model.compiled.layers import AttendRows
    from antefix.model.seated_chunks import PendingChunk
    from antefix.model.seated_steps import SeatedSteps
    from antefix.model.step_runner import StepRunner

_TORCH_OPS = TorchOps()
_Integers = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(slots=True)
class Item:
    """One sequence's part of the batch: rows [start, stop), and the updates to make when tokens are kept.

    pending: functions that advance a part of the window state by the new tokens [first, last).  num_kept: how many new
    tokens it has advanced by.
    """

    sequence: Sequence
    start: int
    stop: int
    device: torch.device
    _block_ids: Tensor | None = None
    _positions: Tensor | None = None
    group_ropes: dict[LayerKind, tuple[Tensor, Tensor]] = field(default_factory=dict)
    pending: list[Callable[[int, int], object]] = field(default_factory=list)
    num_kept: int = 0
    step: int | None = None

    @property
    def position(self) -> int:
        """The position of the sequence's first new token."""
        return self.sequence.position - self.num_kept

    @property
    def block_ids(self) -> Tensor:
        if self._block_ids is None:
            self._block_ids = torch.tensor(self.sequence.block_table, dtype=torch.long, device=self.device)
        return self._block_ids

    @property
    def positions(self) -> Tensor:
        if self._positions is None:
            last = self.position + self.stop - self.start
            self._positions = torch.arange(self.position, last, device=self.device)
        return self._positions

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)

    def prepare(self) -> None:
        """Compute in advance what several threads will use."""
        _ = self.block_ids, self.positions

    def move_on(self, stop: int) -> None:
        """Advance the sequence until `stop` of its new tokens are kept."""
        self.sequence.window.position += stop - self.num_kept
        self.num_kept = stop


@torch.inference_mode()
def forward(
    model: Model,
    pool: BlockPool,
    batch: collections.abc.Sequence[tuple[Sequence, Tokens]],
    *,
    logits: Literal["last", "all"] = "last",
    write_global_kv: bool = True,
    ops: Ops = _TORCH_OPS,
) -> Tensor:
    """Run new tokens of each sequence. The call advances the sequences' window states, and fills the rows of their
    blocks.

    logits: "last" gives [len(batch), V], "all" [total tokens, V], in batch order.
    write_global_kv: False replays: stored entries are read, window state is rebuilt and the pool is not written. The
        block tables must then hold the entries of every token up to the last replayed one.
    Raises:  InvalidRequest: token ids out of range, or more tokens than the model has positions.
             InternalError: no tokens, a block table that is too short, a pool or a state of another layout.
             After these errors nothing has changed. After any other error the same call can be made again.
    """
    ran = run_tokens(model, pool, batch, logits=logits, write_global_kv=write_global_kv, ops=ops)
    ran.keep_all()
    return ran.logits


@dataclass(frozen=True, slots=True)
class Ran:
    """The computed new tokens of a batch. Sequences do not advance until tokens are kept.

    logits: as requested. streams: [tokens, M, D] after the last layer, in the order of the batch. Tokens that are not
    kept leave only rows of the pool, which the next tokens at these positions overwrite.
    """

    logits: Tensor
    streams: Tensor
    _items: list[Item]
    _steps: Steps | SeatedSteps | None = None
    _call: LeadCall | None = None
    _chunk: PendingChunk | None = None

    def rows(self, number: int) -> slice:
        """The rows of a sequence in `streams`, and in the logits of all tokens."""
        return self._items[number].rows

    def keep(self, number: int, count: int | None = None) -> None:
        """Advance sequence `number` until `count` of its new tokens are kept in total; None: all of them."""
        item = self._items[number]
        stop = item.stop - item.start if count is None else count
        if not item.num_kept <= stop <= item.stop - item.start:
            raise InternalError(
                f"{stop} of a sequence's {item.stop - item.start} new tokens cannot be kept, because "
                f"{item.num_kept} are kept already"
            )
        if self._call is not None:
            self._call.keep(number, stop)
        self._keep(number, stop)

    def keep_all(self) -> None:
        """Advance every sequence by all of its new tokens. This method may be called only if no token has been kept
        before.
        """
        if self._call is not None:
            self._call.keep(None)
        steps = [item for item in self._items if item.step is not None]
        if self._steps is not None:
            self._steps.keep_all()
        for item in steps:
            item.move_on(1)
        if self._chunk is not None:
            self._chunk.keep_all()
        for item in self._items:
            if item.step is None:
                self._move(item, item.stop - item.start)

    def follow(self, number: int, window: WindowState, tokens: np.ndarray[Any, Any], stop: int) -> None:
        """Advance the draft state on the other ranks too (`antefix.model.follow_ran`)."""
        if self._call is not None:
            self._call.follow(number, window, tokens, stop)

    def _keep(self, number: int, stop: int) -> None:
        item = self._items[number]
        if self._chunk is not None:
            self._chunk.keep(number, stop)
        if self._steps is not None and item.step is not None and stop > item.num_kept:
            self._steps.keep([item.step])
        self._move(item, stop)

    @staticmethod
    def _move(item: Item, stop: int) -> None:
        for apply in item.pending:
            apply(item.num_kept, stop)
        item.move_on(stop)


@torch.inference_mode()
def run_tokens(
    model: Model,
    pool: BlockPool,
    batch: collections.abc.Sequence[tuple[Sequence, Tokens]],
    *,
    logits: Literal["last", "all"] = "last",
    write_global_kv: bool = True,
    ops: Ops = _TORCH_OPS,
) -> Ran:
    """Like `forward`, but the caller decides afterwards how many of each sequence's tokens are kept. Tokens that are
    not kept are treated as if they had never run. Raises as `forward`.
    """
    # 1. Check everything before anything is written.
    items, given = _plan(model, pool, batch)
    lead = model.lead
    with step_threads(model, items[-1].stop) as threads:
        if lead is None:
            return _run_items(model, pool, items, given, logits=logits, write=write_global_kv, ops=ops, threads=threads)
        told = [(sequence, as_tokens(each)) for sequence, each in batch]
        with lead.run(pool, told, logits=logits, write_global_kv=write_global_kv) as call:
            ran = _run_items(model, pool, items, given, logits=logits, write=write_global_kv, ops=ops, threads=1)
        return replace(ran, _call=call)


def _run_items(
    model: Model,
    pool: BlockPool,
    items: list[Item],
    given: _Integers,
    *,
    logits: Literal["last", "all"],
    write: bool,
    ops: Ops,
    threads: int,
) -> Ran:
    if write:
        _open_blocks(pool, items)
    single = [item for item in items if item.stop - item.start == 1] if ops.steps_together else []
    for number, item in enumerate(single):
        item.step = number
    runner = ops.step_runner
    if runner is not None and len(single) == len(items):
        sequences = [item.sequence for item in items]
        seated, streams, head = runner.run(model, pool, sequences, given[0, : len(items)], write=write)
        return Ran(head, streams, items, seated)
    if runner is not None:
        batch = [(item.sequence, given[0, item.rows].astype(np.uint32)) for item in items]
        if runner.takes(batch):
            return _run_chunk(model, pool, items, batch, runner, logits=logits, write=write)
    tokens, positions = upload(given, model.device)
    steps = _steps(model, pool, single, given[0], runner, write=write)
    split = _Split(items, single, model.device)
    # 2. The layers. Rows beyond the last sequence are padding.
    num_tokens = items[-1].stop

    def attend(layer: int, attention: Attention, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        return LayerPass(model, pool, layer, attention, ops, write, steps).run(x, positions, rope, split)

    def attend_rows(layer: int, attention: Attention, rows: TokenRows) -> Tensor:
        together = steps.attend(layer, attention, rows.at(split.rows)) if isinstance(steps, Steps) else None
        if together is not None and not split.longer:
            return together
        return LayerPass(model, pool, layer, attention, ops, write, steps).across(rows, split, together)

    # Work of a pause would reach other ranks, and experts on the host, in the middle of this call.
    may_pause = not single and model.lead is None and model.ranks is None and model.offload is None
    after_layer = layers_pause(model.device) if may_pause else None
    found: Tensor | None = None
    if not single:
        found = _run_parted(model, pool, items, tokens, positions, ops, threads, after_layer, write=write)
    if found is None and _compiles_layers(model, ops):
        found = _run_compiled(model, tokens[:num_tokens], positions[:num_tokens], attend_rows, after_layer)
    last = [item.stop - 1 for item in items]
    # 3. Window states advance only when tokens are kept, so that a failed call can be repeated.
    if found is None:
        streams = run_layers(model, tokens, positions, num_tokens, attend, after_layer)
        hidden = model.model.norm(model.model.hc_head(streams))
        wanted = hidden[:num_tokens] if logits == "all" else hidden[last]
    else:
        streams = found
        wanted = model.model.norm(model.model.hc_head(streams[:num_tokens] if logits == "all" else streams[last]))
    return Ran(linear(wanted, model.lm_head.weight), streams[:num_tokens], items, steps)


def _run_chunk(
    model: Model,
    pool: BlockPool,
    items: list[Item],
    batch: list[tuple[Sequence, TokenArray]],
    runner: StepRunner,
    *,
    logits: Literal["last", "all"],
    write: bool,
) -> Ran:
    """Run a few new tokens of each sequence in shared launches: as many as for one sequence."""
    chunk, streams, hidden = runner.run_chunk(model, pool, batch, write=write)
    for item in items:
        item.step = None
    if logits == "last":
        last = np.array([item.stop - 1 for item in items], np.int64)
        hidden = hidden.index_select(0, upload(last, model.device))
    return Ran(linear(hidden, model.lm_head.weight), streams, items, _chunk=chunk)


def _steps(
    model: Model,
    pool: BlockPool,
    single: list[Item],
    tokens: _Integers,
    runner: StepRunner | None,
    *,
    write: bool,
) -> Steps | SeatedSteps | None:
    """The object that runs all sequences of one token together; None if there are no such sequences."""
    sequences = [item.sequence for item in single]
    if not sequences:
        return None
    if runner is None:
        return steps_of(model, pool, sequences, write=write)
    return runner.steps(model, pool, sequences, tokens[[item.start for item in single]], write=write)


def _compiles_layers(model: Model, ops: Ops) -> bool:
    """Whether a layer's computations of each token alone may run compiled. Operations other than the compiled ones
    round window KV themselves.
    """
    return type(ops) is TorchOps and is_compiled(model.lm_head.weight)


def _run_compiled(
    model: Model, tokens: Tensor, positions: Tensor, attend: AttendRows, after_layer: Callable[[], None] | None
) -> Tensor | None:
    """The layers as a few compiled calls each: streams [N, M, D]. Returns None if this model cannot be run so."""
    from antefix.model.compiled.layers import layer_rows

    rows = layer_rows(model, tokens, positions)
    return None if rows is None else rows.run(attend, after_layer)


def _run_parted(
    model: Model,
    pool: BlockPool,
    items: list[Item],
    tokens: Tensor,
    positions: Tensor,
    ops: Ops,
    threads: int,
    after_layer: Callable[[], None] | None,
    *,
    write: bool,
) -> Tensor | None:
    """The layers on several threads, each with its rows: streams [N, M, D]. Returns None if the layers must run on one
    thread.
    """
    parts = parts_of(model, len(tokens), threads)
    if len(parts) == 1:
        return None
    layers = [
        LayerPass(model, pool, index, cast(DecoderLayer, layer).self_attn, ops, write, None)
        for index, layer in enumerate(model.model.layers)
    ]
    compiles = _compiles_layers(model, ops)
    return PartedLayers(model, layers, items, tokens, positions, compiles=compiles).run(parts, after_layer)


class _Split:
    """Which rows of the batch belong to sequences that run one token, and which items run more tokens.

    rows: the rows of the sequences that run one token. In a decode step these rows are neighbours, so the result is a
    slice.
    """

    def __init__(self, items: list[Item], single: list[Item], device: torch.device) -> None:
        self.longer = [item for item in items if item.step is None]
        first = single[0].start if single else 0
        is_run = all(item.start == first + i for i, item in enumerate(single))
        self.rows: slice | Tensor = slice(first, first + len(single))
        if not is_run:
            self.rows = torch.tensor([item.start for item in single], device=device)


@dataclass(frozen=True, slots=True)
class LayerPass:
    """One layer's attention over a batch."""

    model: Model
    pool: BlockPool
    index: int
    attention: Attention
    ops: Ops
    write: bool
    steps: Steps | SeatedSteps | None

    def run(self, x: Tensor, positions: Tensor, rope: tuple[Tensor, Tensor], split: _Split) -> Tensor:
        """Attention from x [N, D], normed, to the attention block's output [N, D]."""
        attention, at = self.attention, split.rows
        # 1. Per-token computations, for the whole batch at once.
        rows = self.rows(x, positions, rope)
        # 2. Attention across tokens: for sequences with one token all together, for the others one by one.
        only = split.longer[0] if self.steps is None and len(split.longer) == 1 else None
        if only is not None and only.stop - only.start == len(rows.q) and not isinstance(self.ops, TorchOps):
            # A chunk of one prompt on a GPU: nothing is put together, so nothing is copied.
            return attention.output(self.attend_item(only, rows), *rope)
        together: Tensor | None = None
        if self.steps is not None and not isinstance(self.steps, Steps):
            together = self.steps.attend(self.index, attention, x[at], (rope[0][at], rope[1][at]))
        elif self.steps is not None:
            together = self.steps.attend(self.index, attention, rows.at(at))
        # 3. Project back.
        return attention.output(self.across(rows, split, together), *rope)

    def across(self, rows: TokenRows, split: _Split, together: Tensor | None) -> Tensor:
        """Attention before its output projection [N, H, C]. together: the attention of the sequences with one token."""
        attended = torch.zeros_like(rows.q)
        if together is not None:
            attended[split.rows] = together
        for item in split.longer:
            attended[item.rows] = self.attend_item(item, rows.at(item.rows))
        return attended

    def attend_item(self, item: Item, rows: TokenRows) -> Tensor:
        """Attention of an item's tokens [T, H, C], by their rows; groups of tokens that end in the item are
        completed.
        """
        line = self.window_line(item, rows.window)
        if rows.compressed is not None:
            self.compress_main(item, rows.compressed)
        if rows.index is not None:
            self.compress_index(item, rows.index[0])
        return self.attend(item, rows.q, line, item.positions, None if rows.index is None else rows.index[1:])

    def rows(self, x: Tensor, positions: Tensor, rope: tuple[Tensor, Tensor]) -> TokenRows:
        """The per-token results for x [N, D], normed."""
        attention = self.attention
        done = attention.input_products(x)
        residual = attention.query_residual(x, done)
        q = attention.queries(residual, *rope)
        window = self.ops.window_pack(attention.window_entries(x, *rope, done), self.model.layout)
        compressed = None if attention.compressor is None else attention.compressor.project(x, positions, done)
        index = None
        if isinstance(attention.compressor, CSACompressor):
            indexer = attention.compressor.indexer
            rows, weights = indexer.project(x, positions, done), indexer.head_weights(x, done)
            index = rows, indexer.queries(residual, *rope), weights
        return TokenRows(q=q, window=window, compressed=compressed, index=index)

    def window_line(self, item: Item, entries_TC: Tensor) -> WindowLine:
        """Window KV of the item's tokens [T, C], lined up behind its ring. The ring takes these tokens when they are
        kept.
        """
        ring = item.sequence.window.window[self.index]
        position = item.position
        item.pending.append(lambda first, stop: advance_ring(ring, entries_TC[first:stop], position + first))
        return line_up(ring, entries_TC, position, item.sequence.window.cut)

    @property
    def compresses(self) -> bool:
        return self.attention.compressor is not None

    @property
    def indexes(self) -> bool:
        return isinstance(self.attention.compressor, CSACompressor)

    def compress_main(self, item: Item, rows: Tensor) -> None:
        """Write the entries of the groups that the main compressor's new rows [2, T, S] complete."""
        compressor = cast(Compressor, self.attention.compressor)
        entries = self._entries(item, PartKind.CSA_MAIN if self.indexes else PartKind.HCA_MAIN)
        self._compress(item, compressor, item.sequence.window.main[self.index], rows, entries)

    def compress_index(self, item: Item, rows: Tensor) -> None:
        """Write the entries of the groups that the indexer's new rows [2, T, S] complete."""
        indexer = cast(CSACompressor, self.attention.compressor).indexer
        keys = self._entries(item, PartKind.INDEXER_KEYS)
        self._compress(item, indexer, item.sequence.window.indexer[self.index], rows, keys)

    def attend(
        self,
        item: Item,
        q: Tensor,
        line: WindowLine,
        positions: Tensor,
        index: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """Attention of some tokens of the item, at `positions` [T]: [T, H, C]. All entries that these tokens see must
        have been written.

        index: the indexer's queries [T, I, C] and head weights [T, I] (CSA).
        """
        sinks, compressor = self.attention.sinks, self.attention.compressor
        if compressor is None:
            return self.ops.full_attention(q, line, sinks, None, positions)
        visible = torch.div(positions + 1, compressor.ratio, rounding_mode="floor")
        if index is None:
            return self.ops.full_attention(q, line, sinks, self._entries(item, PartKind.HCA_MAIN), visible)
        keys, topk = self._entries(item, PartKind.INDEXER_KEYS), cast(CSACompressor, compressor).indexer.topk
        picked = self.ops.indexer_topk(*index, keys, visible, topk)
        return self.ops.sparse_attention(q, line, sinks, self._entries(item, PartKind.CSA_MAIN), picked)

    def _entries(self, item: Item, kind: PartKind) -> Entries:
        return Entries(pool=self.pool, part=self.pool.part(self.index, kind), block_ids=item.block_ids)

    def _compress(
        self, item: Item, compressor: Compressor, state: CompressorState, new_rows: Tensor, entries: Entries
    ) -> None:
        """Close the groups that the new rows [2, T, S] complete, and keep the remaining rows as the tail."""
        ratio = compressor.ratio
        first, count = divmod(item.position, ratio)
        num_new = new_rows.shape[1]
        closed = (count + num_new) // ratio
        if not closed:

            def extend(first: int, stop: int) -> None:
                state.tail[:, count + first : count + stop] = new_rows[:, first:stop]

            item.pending.append(extend)
            return
        rows = torch.cat((state.tail[:, :count], new_rows), dim=1) if count else new_rows
        groups = rows[:, : closed * ratio].view(2, closed, ratio, -1)
        if self.write:
            cos, sin = self._group_rope(item, first, closed)
            self.ops.compress_and_pack(compressor, groups, state.overlap, cos, sin, entries, first)

        def close(first: int, stop: int) -> None:
            done = (count + stop) // ratio
            rest = rows[:, done * ratio : count + stop]
            state.tail[:, : rest.shape[1]] = rest
            if state.overlap is not None and done > (count + first) // ratio:
                state.overlap.copy_(groups[:, done - 1, :, : compressor.width])

        item.pending.append(close)

    def _group_rope(self, item: Item, first: int, num_groups: int) -> tuple[Tensor, Tensor]:
        """cos and sin at each group's first token. For all layers of one kind, the values are the same."""
        kind = self.attention.kind
        if kind not in item.group_ropes:
            ratio = self.model.config.geometry.ratio(self.index)
            starts = torch.arange(first, first + num_groups, device=self.model.device) * ratio
            item.group_ropes[kind] = self.model.rope(kind, starts)
        return item.group_ropes[kind]


def _plan(
    model: Model, pool: BlockPool, batch: collections.abc.Sequence[tuple[Sequence, Tokens]]
) -> tuple[list[Item], _Integers]:
    """Checked items, and the batch's tokens and positions [2, N], padded with 0."""
    if not batch:
        raise InternalError("a batch of the model needs at least one sequence")
    if pool.layout != model.layout:
        raise InternalError("the block pool was made for another layout of KV than the model's")
    items: list[Item] = []
    pieces: list[TokenArray] = []
    start = 0
    for sequence, given in batch:
        tokens = as_tokens(given)
        check_piece(model, pool, sequence, tokens)
        stop = start + len(tokens)
        items.append(Item(sequence, start, stop, model.device))
        pieces.append(tokens)
        start = stop
    if len({id(item.sequence.window) for item in items}) < len(items):
        raise InternalError("a sequence may appear only once in one batch")
    both = np.zeros((2, num_rows(model, start)), np.int64)
    for item, tokens in zip(items, pieces, strict=True):
        if len(tokens) == 1:
            both[0, item.start], both[1, item.start] = tokens[0], item.position
        else:
            both[0, item.rows] = tokens
            both[1, item.rows] = np.arange(item.position, item.position + len(tokens))
    return items, both


def num_rows(model: Model, num_tokens: int) -> int:
    """Rows of a batch: whole tiles, unless there are so few that products run without padding."""
    if num_tokens <= ROWS_FEW and is_compiled(model.lm_head.weight):
        return num_tokens
    return -(-num_tokens // ROW_TILE) * ROW_TILE


def _open_blocks(pool: BlockPool, items: list[Item]) -> None:
    """Clear the rows of the pool that this call is the first to write."""
    block_size = pool.layout.geometry.block_size
    for item in items:
        first = -(-item.position // block_size)
        last = (item.position + item.stop - item.start - 1) // block_size
        if last >= first:
            pool.clear(item.sequence.block_table[first : last + 1])
