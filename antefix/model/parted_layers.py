"""Runs a long prefill's layers on a CPU with the rows divided between threads; replaces `layer_loop` and `runner`.

    each thread, on its rows  mixing, norm, queries, window entries, compressors' rows
    all threads meet          then separate jobs: order window KV, close the main compressor's groups, the indexer's
    all threads meet          then each thread, on its rows: index, attention, output, mixing, experts

Shapes:  N = rows of the batch, D = hidden size, M = streams, H = heads, C = head dim, S = a compressor's columns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from antefix.model.attend import WindowLine
from antefix.model.mhc import expand
from antefix.model.model import DecoderLayer, Model
from antefix.model.row_threads import Meeting, run_each
from antefix.model.steps import TokenRows

if TYPE_CHECKING:
    from antefix.model.compiled.layers import LayerRows
    from antefix.model.runner import Item, LayerPass


@dataclass(slots=True)
class _Layer:
    """What the threads share about one layer. rows: results of each part.  lines: the window line of each item."""

    attention: LayerPass
    rows: list[TokenRows | None]
    lines: list[WindowLine | None]
    jobs: list[Callable[[], None]] = field(default_factory=list)


class PartedLayers:
    """One forward pass over items that run more than one token each.

    layers: the attention of each layer.  compiles: whether a layer's computations of each token alone may run compiled.
    """

    def __init__(
        self,
        model: Model,
        layers: Sequence[LayerPass],
        items: Sequence[Item],
        tokens: Tensor,
        positions: Tensor,
        *,
        compiles: bool,
    ) -> None:
        self._compiles = compiles
        self._model, self._items, self._tokens, self._positions = model, items, tokens, positions
        self._num_tokens = items[-1].stop
        self._attention = layers
        for item in items:
            item.prepare()

    def run(self, parts: Sequence[slice], after_layer: Callable[[], None] | None = None) -> Tensor | None:
        """Streams [N, M, D] after the last layer; rows of padding may be missing.  parts: the rows of each thread.
        after_layer: called by this thread after each layer of its part (`antefix.model.pauses`). The other threads
        continue until they need its rows of the next layer. Returns None if the threads were busy, in which case
        nothing has run.
        """
        layers = [_Layer(each, [None] * len(parts), [None] * len(self._items)) for each in self._attention]
        for layer in layers:
            layer.jobs = self._jobs(layer)
        works = [
            functools.partial(self._run_part, layers, number, part, after_layer if number == 0 else None)
            for number, part in enumerate(parts)
        ]
        streams = run_each(works)
        return None if streams is None else torch.cat(streams)

    def _run_part(
        self,
        layers: Sequence[_Layer],
        number: int,
        part: slice,
        after_layer: Callable[[], None] | None,
        meeting: Meeting,
    ) -> Tensor:
        model, positions = self._model, self._positions[part]
        tokens = self._tokens[part]
        live = tokens[: max(self._num_tokens - part.start, 0)]
        if (compiled := self._compiled(live, positions[: len(live)])) is not None:
            mine = slice(part.start, part.start + len(live))
            return compiled.run(
                lambda layer, _, rows: self._meet(layers[layer], rows, mine, number, meeting), after_layer
            )
        ropes = {kind: model.rope(kind, positions) for kind in set(model.config.geometry.layers)}
        streams: Tensor = model.model.embed_tokens(tokens).unsqueeze(1).repeat(1, model.config.hc_mult, 1)
        for shared, module in zip(layers, model.model.layers, strict=True):
            layer = cast(DecoderLayer, module)
            x, post, comb = layer.attn_hc(streams)
            rope = ropes[layer.self_attn.kind]
            rows = shared.attention.rows(layer.input_layernorm(x), positions, rope)
            output = layer.self_attn.output(self._meet(shared, rows, part, number, meeting), *rope)
            streams = expand(streams, output, post, comb)
            x, post, comb = layer.ffn_hc(streams)
            streams = expand(streams, layer.mlp(layer.post_attention_layernorm(x), live), post, comb)
            if after_layer is not None:
                after_layer()
        return streams

    def _compiled(self, tokens: Tensor, positions: Tensor) -> LayerRows | None:
        """The rows of one thread as compiled calls, if this model's layers can run so."""
        if not self._compiles:
            return None
        from antefix.model.compiled.layers import layer_rows

        return layer_rows(self._model, tokens, positions)

    def _meet(self, layer: _Layer, rows: TokenRows, part: slice, number: int, meeting: Meeting) -> Tensor:
        """Give this thread's rows to the other threads, run a share of the jobs, and then the attention of the thread's
        own rows.
        """
        layer.rows[number] = rows
        meeting.wait()
        for job in layer.jobs[number :: len(layer.rows)]:
            job()
        meeting.wait()
        return self._attend(layer, rows, part)

    def _jobs(self, layer: _Layer) -> list[Callable[[], None]]:
        """Jobs that need all threads' rows of an item; they may run in any order."""
        attention = layer.attention

        def line_up(number: int, item: Item) -> None:
            entries = torch.cat([cast(TokenRows, each).window for each in layer.rows])
            layer.lines[number] = attention.window_line(item, entries[item.rows])

        def compress(item: Item) -> None:
            rows = [cast(Tensor, cast(TokenRows, each).compressed) for each in layer.rows]
            attention.compress_main(item, torch.cat(rows, 1)[:, item.rows])

        def index(item: Item) -> None:
            rows = [cast("tuple[Tensor, ...]", cast(TokenRows, each).index)[0] for each in layer.rows]
            attention.compress_index(item, torch.cat(rows, 1)[:, item.rows])

        jobs: list[Callable[[], None]] = []
        for number, item in enumerate(self._items):
            jobs.append(functools.partial(line_up, number, item))
            jobs += [functools.partial(compress, item)] if attention.compresses else []
            jobs += [functools.partial(index, item)] if attention.indexes else []
        return jobs

    def _attend(self, layer: _Layer, rows: TokenRows, part: slice) -> Tensor:
        """Attention of one thread's rows, before its output projection: [rows, H, C]."""
        attended = torch.zeros_like(rows.q)
        for item, line in zip(self._items, layer.lines, strict=True):
            start, stop = max(item.start, part.start), min(item.stop, part.stop)
            if start >= stop:
                continue
            mine = slice(start - part.start, stop - part.start)
            index = None if rows.index is None else (rows.index[1][mine], rows.index[2][mine])
            own = cast(WindowLine, line).part(start - item.start, stop - item.start)
            positions = item.positions[start - item.start : stop - item.start]
            attended[mine] = layer.attention.attend(item, rows.q[mine], own, positions, index)
        return attended
