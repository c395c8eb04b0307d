"""Replay: runs tokens again over stored global KV to rebuild window state, computing only what that state depends on.

At layer l, the state after `stop` depends on the inputs of the last `KVGeometry.replay_reach[l]` tokens: the layer's
own window, the last group of CSA's compressors, and n_win - 1 more tokens for each layer above, because the state of
those layers is made from this layer's output. So each layer runs fewer tokens than the one below. The top layer
computes only window KV and no queries, because nothing reads its output. In total this is about half the work of
running every token through every layer.

Replay cannot write global KV, because it never calls `compress_and_pack`, the only operation in `ops` that writes.

Shapes:  N = rows of one layer, a multiple of ROW_TILE; T = tokens of one call; D = hidden size; L = layers.
Source:  V4 report, section 3.5 (caching no windows). Oracle: `forward(write_global_kv=False)`, on a CPU to the bit.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from antefix.block import TokenArray, Tokens, as_tokens
from antefix.errors import InternalError
from antefix.layout import KVGeometry, PartKind
from antefix.model.attend import WindowLine, advance_ring, line_up
from antefix.model.attention import Attention, CSACompressor
from antefix.model.compressor import Compressor
from antefix.model.mhc import expand
from antefix.model.model import DecoderLayer, Model
from antefix.model.numerics import ROW_TILE, pad_rows
from antefix.model.ops import Entries, Ops, TorchOps
from antefix.model.pool import BlockPool
from antefix.model.step_threads import step_threads
from antefix.model.window_state import CompressorState, Sequence

_TORCH_OPS = TorchOps()


@torch.inference_mode()
def replay(
    model: Model, pool: BlockPool, sequence: Sequence, tokens: Tokens, *, stop: int, ops: Ops = _TORCH_OPS
) -> None:
    """Run the next tokens of a replay that will end at `stop`. Only the sequence's window state is advanced; nothing
    else changes.

    stop: the block boundary where the state is wanted, at least one block after the replay's start. Before `stop` the
        state cannot be continued from, because layers leave out tokens that the state at `stop` does not depend on. A
        replay may be cut into any number of calls.
    Raises:  InternalError: tokens beyond `stop`, a `stop` inside a block, or a block table that does not reach it.
             After any other error the window state is useless, and the replay must start again.
    """
    given = as_tokens(tokens)
    _check(model, pool, sequence, len(given), stop)
    lead = model.lead
    telling = contextlib.nullcontext() if lead is None else lead.replay(pool, sequence, given, stop)
    with telling, step_threads(model, len(given)):
        _replay(model, pool, sequence, given, stop, ops)


def _replay(model: Model, pool: BlockPool, sequence: Sequence, given: TokenArray, stop: int, ops: Ops) -> None:
    device, position = model.device, sequence.position
    span = pad_rows(torch.from_numpy(given.astype("i8")).to(device))
    positions = pad_rows(torch.arange(position, position + len(given), device=device))
    block_ids = torch.tensor(sequence.block_table, dtype=torch.long, device=device)
    streams = model.model.embed_tokens(span).unsqueeze(1).repeat(1, model.config.hc_mult, 1)
    first = 0
    for index, module in enumerate(model.model.layers):
        # 1. Leave out the rows whose input this layer does not need.
        start = _first_row(model, index, stop, position, len(given))
        if start == len(span):
            break
        streams, first = streams[start - first :], start
        keep = _first_row(model, index + 1, stop, position, len(given))
        layer = cast(DecoderLayer, module)
        # 2. Take every row into window state. No layer above needs the outputs of rows before `keep`.
        part = _Part(model, pool, index, layer.self_attn, sequence, block_ids, stop, ops)
        x, post, comb = layer.attn_hc.normed(streams, layer.input_layernorm)
        output = part.run(x, positions[start:], position + start, len(given) - start, keep - start)
        if output is None:
            continue
        streams = expand(streams[keep - start :], output, post[keep - start :], comb[keep - start :])
        first = keep
        x, post, comb = layer.ffn_hc.normed(streams, layer.post_attention_layernorm)
        output = layer.mlp(x, span[keep : len(given)])
        streams = expand(streams, output, post, comb)
    sequence.window.position += len(given)


def needed_from(geometry: KVGeometry, layer: int, stop: int) -> int:
    """The first token whose input at `layer` affects window state at `stop`; for `num_layers` it is `stop` itself.

    If the result is negative, every token counts.
    """
    return stop - geometry.replay_reach[layer] if layer < geometry.num_layers else stop


def _first_row(model: Model, layer: int, stop: int, position: int, num_tokens: int) -> int:
    """Index of the first padded row of this call that the layer runs, in whole tiles; if none, the number of rows."""
    skipped = needed_from(model.config.geometry, layer, stop) - position
    if skipped >= num_tokens:
        return -(-num_tokens // ROW_TILE) * ROW_TILE
    return max(skipped, 0) // ROW_TILE * ROW_TILE


def _check(model: Model, pool: BlockPool, sequence: Sequence, num_tokens: int, stop: int) -> None:
    block_size = model.config.geometry.block_size
    if stop % block_size:
        raise InternalError(f"a replay of tokens must stop at a multiple of {block_size} tokens, not {stop}")
    if not 0 < num_tokens <= stop - sequence.position:
        raise InternalError(
            f"cannot replay {num_tokens} tokens: the sequence is at token {sequence.position}, and the replay must "
            f"stop at {stop}"
        )
    if pool.layout != model.layout or sequence.window.layout != model.layout:
        raise InternalError("the pool or the window state was made for another layout of KV than the model's")
    if len(sequence.block_table) * block_size < stop:
        raise InternalError(
            f"{stop} tokens need more blocks than the {len(sequence.block_table)} in the sequence's block table"
        )


@dataclass(frozen=True, slots=True)
class _Part:
    """One layer's attention over the rows of one call."""

    model: Model
    pool: BlockPool
    index: int
    attention: Attention
    sequence: Sequence
    block_ids: Tensor
    stop: int
    ops: Ops

    def run(self, x: Tensor, positions: Tensor, position: int, num_tokens: int, keep: int) -> Tensor | None:
        """x [N, D], normed, holds tokens from `position` on, of which `num_tokens` are real and the others padding.
        Returns the output of rows from `keep` on; returns None if there are no such rows, so that only window state was
        updated.
        """
        attention, window = self.attention, self.sequence.window
        rope = self.model.rope(attention.kind, positions)
        # 1. Window KV of all rows: the ring takes the rows before the first query; the others are lined up behind it.
        entries = self.ops.window_pack(attention.window_entries(x, *rope), self.model.layout)[:num_tokens]
        ring = window.window[self.index]
        lead = min(keep, num_tokens)
        advance_ring(ring, entries[:lead], position)
        line = line_up(ring, entries[lead:], position + lead, window.cut)
        advance_ring(ring, entries[lead:], position + lead)
        # 2. The overlap state that CSA's last group leaves.
        if isinstance(attention.compressor, CSACompressor):
            self._overlap(attention.compressor, window.main[self.index], x, position, num_tokens)
            self._overlap(attention.compressor.indexer, window.indexer[self.index], x, position, num_tokens)
        if keep >= num_tokens:
            return None
        # 3. Queries of the rows that the layer above needs.
        cos, sin = rope[0][keep:], rope[1][keep:]
        residual = attention.query_residual(x[keep:])
        q = attention.queries(residual, cos, sin)
        attended = torch.zeros_like(q)
        num_queries = num_tokens - keep
        live = positions[keep:num_tokens]
        attended[:num_queries] = self._attend(x[keep:], residual, (cos, sin), q[:num_queries], line, live)
        return attention.output(attended, cos, sin)

    def _attend(
        self, x: Tensor, residual: Tensor, rope: tuple[Tensor, Tensor], q: Tensor, line: WindowLine, positions: Tensor
    ) -> Tensor:
        attention, compressor = self.attention, self.attention.compressor
        if compressor is None:
            return self.ops.full_attention(q, line, attention.sinks, None, positions)
        visible = torch.div(positions + 1, compressor.ratio, rounding_mode="floor")
        if not isinstance(compressor, CSACompressor):
            return self.ops.full_attention(q, line, attention.sinks, self._entries(PartKind.HCA_MAIN), visible)
        indexer, live = compressor.indexer, slice(len(positions))
        queries, weights = indexer.queries(residual, *rope)[live], indexer.head_weights(x)[live]
        keys = self._entries(PartKind.INDEXER_KEYS)
        picked = self.ops.indexer_topk(queries, weights, keys, visible, indexer.topk)
        return self.ops.sparse_attention(q, line, attention.sinks, self._entries(PartKind.CSA_MAIN), picked)

    def _entries(self, kind: PartKind) -> Entries:
        return Entries(pool=self.pool, part=self.pool.part(self.index, kind), block_ids=self.block_ids)

    def _overlap(
        self, compressor: Compressor, state: CompressorState, x: Tensor, position: int, num_tokens: int
    ) -> None:
        """Store the Ca rows of the group that ends at `stop`, as far as the group's tokens are in this call."""
        group = self.stop - compressor.ratio
        first = max(group, position)
        count = position + num_tokens - first
        if count <= 0 or state.overlap is None:
            return
        live = torch.arange(first, first + count, device=x.device)
        rows = compressor.project(x[first - position : first - position + count], live)
        state.overlap[:, first - group : first - group + count] = rows[..., : compressor.width]
