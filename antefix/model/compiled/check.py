"""Switches the compiled kernels on if each kind of layer of a model gives the same bits with them as without."""

from __future__ import annotations

import ctypes
import importlib.util
import logging
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor

from antefix.layout import KVFormat, PartKind
from antefix.model.attend import WindowLine
from antefix.model.attention import Attention, CSACompressor
from antefix.model.compiled import switch
from antefix.model.compiled.switch import exponential_address
from antefix.model.compressor import Compressor
from antefix.model.mhc import expand
from antefix.model.model import DecoderLayer, Model
from antefix.model.norms_rope import norm_rotate
from antefix.model.ops import Entries, TorchOps
from antefix.model.pool import BlockPool
from antefix.model.quant import round_entries, round_queries

log = logging.getLogger("antefix.model")

# Rows that are compared: more than one tile, with some padding rows behind the tokens.
_ROWS, _TOKENS = 48, 41
# Closed groups that are compared: more than are packed side by side.
_GROUPS = 11
# So few rows that the products are compiled as well.
_FEW = 3
_refused = False


def enable(model: Model) -> bool:
    """Use the compiled kernels in this process if Numba is installed and all results for this model's layers equal
    torch's.

    If the results differ, the kernels stay off for the life of the process, because its arithmetic must not depend on
    which models are loaded later.
    """
    global _refused
    if _refused or importlib.util.find_spec("numba") is None or not _is_theirs(model) or not exponential_address():
        return False
    with torch.inference_mode():
        was_on = switch.is_on()
        plain = list(_compare(model, False))
        compiled = list(_compare(model, True))
        few = list(_compare(model, True, _FEW))
        # With few rows the products of the experts have a row or two each, with many they have whole tiles.
        together = [pair for num in (_FEW, _TOKENS) for pair in _compare_together(model, num)]
        switch.use(was_on)
    pairs = [*zip(plain, compiled, strict=True), *zip(plain, few, strict=True), *together]
    wrong = sorted({name for (name, whole), (_, part) in pairs if not torch.equal(_same_rows(whole, part), part)})
    _refused = bool(wrong)
    if _refused:
        log.warning("compiled kernels stay off: the bits of %s would differ from torch's", ", ".join(wrong))
    switch.use(not _refused)
    _give_back()
    return not _refused


def _give_back() -> None:
    """Return the memory that compiling took to the system: some 25 MB, which a worker's malloc would keep."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _is_theirs(model: Model) -> bool:
    return model.device.type == "cpu" and model.dtype is torch.float32 and model.ranks is None


def _same_rows(whole: Tensor, part: Tensor) -> Tensor:
    """From the results of all rows, select the rows of `part`. A compressor's results have their rows in the second
    dim.
    """
    return whole[: len(part)] if whole.shape[1:] == part.shape[1:] else whole[:, : part.shape[1]]


def _compare(model: Model, on: bool, num_rows: int = _ROWS) -> Iterator[tuple[str, Tensor]]:
    """Named results of one layer of each kind for the first rows of a batch."""
    switch.use(on)
    config = model.config
    random = torch.Generator().manual_seed(1)
    streams = torch.randn(_ROWS, config.hc_mult, config.hidden_size, generator=random)[:num_rows] * 2
    num_tokens = min(_TOKENS, num_rows)
    tokens = torch.arange(num_tokens) % config.vocab_size
    positions = torch.arange(num_rows) * 37
    kinds = {(layer.self_attn.kind, layer.mlp.gate.hash_routed): layer for layer in _layers(model)}
    for (kind, _), layer in kinds.items():
        angles = model.rope(kind, positions)
        for place, connection in (("attention", layer.attn_hc), ("experts", layer.ffn_hc)):
            x, post, comb = connection(streams)
            yield from ((f"mixing before {place}", part) for part in (x, post, comb))
            x = layer.input_layernorm(x) if place == "attention" else layer.post_attention_layernorm(x)
            yield f"norm before {place}", x
            if place == "attention":
                yield from _attention(model, layer.self_attn, x, positions, angles)
                yield from _across(model, layer.self_attn, num_rows)
                output = x
            else:
                output = layer.mlp(x, tokens)
                yield "experts", output[:num_tokens]
            yield "streams", expand(streams, output, post, comb)[:num_tokens]


def _compare_together(model: Model, num: int) -> Iterator[tuple[tuple[str, Tensor], tuple[str, Tensor]]]:
    """Pairs of named results for one layer of each kind: first computed call by call, then by `layers` in three
    calls.
    """
    from antefix.model.compiled.layers import layer_rows

    config, random = model.config, torch.Generator().manual_seed(2)
    tokens, positions = torch.arange(num) % config.vocab_size, torch.arange(num) * 37
    rows = layer_rows(model, tokens, positions)
    if rows is None:
        return
    streams = torch.randn(num, config.hc_mult, config.hidden_size, generator=random) * 2
    attended = torch.randn(num, config.num_heads, config.geometry.head_dim, generator=random)
    for plan in {(p.layer.self_attn.kind, p.layer.mlp.gate.hash_routed): p for p in rows.plans}.values():
        layer = plan.layer
        angles = model.rope(layer.self_attn.kind, positions)
        x, post, comb = layer.attn_hc(streams)
        wanted = dict(_attention(model, layer.self_attn, layer.input_layernorm(x), positions, angles))
        rows.streams.copy_(streams)
        made = rows.before(plan, *angles)
        window = wanted["rounded entries" if plan.rounds else "window entries"]
        yield from _named("rows before attention", (wanted["queries"], window), (made.q, made.window))
        if made.compressed is not None:
            yield from _named("compressor rows", (wanted["compressor rows"],), (made.compressed,))
        if made.index is not None:
            yield from _named("indexer rows", (wanted["indexer rows"], wanted["index queries"]), made.index[:2])
        streams_2 = expand(streams, layer.self_attn.output(attended, *angles), post, comb)
        x, post, comb = layer.ffn_hc(streams_2)
        whole = expand(streams_2, layer.mlp(layer.post_attention_layernorm(x), tokens), post, comb)
        rows.feed(plan, attended, *angles)
        yield from _named("streams behind a layer", (whole,), (rows.streams,))


def _named(
    name: str, wanted: Sequence[Tensor], made: Sequence[Tensor]
) -> Iterator[tuple[tuple[str, Tensor], tuple[str, Tensor]]]:
    for each, other in zip(wanted, made, strict=True):
        yield (name, each), (name, other.clone())


def _attention(
    model: Model, attention: Attention, x: Tensor, positions: Tensor, angles: tuple[Tensor, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    residual = attention.query_residual(x)
    queries = attention.queries(residual, *angles)
    entries = attention.window_entries(x, *angles)
    yield from (("query residual", residual), ("queries", queries), ("window entries", entries))
    yield "rounded entries", round_entries(entries, model.layout)
    yield "attention's output", attention.output(queries, *angles)
    if attention.compressor is not None:
        yield "compressor rows", attention.compressor.project(x, positions)
        norm = attention.compressor.kv_norm
        yield "entries", norm_rotate(entries, norm.weight, norm.eps, *angles)
        yield from _closed_groups(model, attention, angles)
    if isinstance(attention.compressor, CSACompressor):
        indexer = attention.compressor.indexer
        yield "indexer rows", indexer.project(x, positions)
        index_queries = indexer.queries(residual, *angles)
        yield "index queries", index_queries
        if model.layout.kv_format is KVFormat.FP8:
            yield "rounded queries", round_queries(index_queries, model.layout)


def _closed_groups(model: Model, attention: Attention, angles: tuple[Tensor, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Records and decoded values of entries that random rows of closed groups are pooled into."""
    main = cast(Compressor, attention.compressor)
    kinds = [(PartKind.HCA_MAIN, main)]
    if isinstance(main, CSACompressor):
        kinds = [(PartKind.CSA_MAIN, main), (PartKind.INDEXER_KEYS, main.indexer)]
    num = min(len(angles[0]), _GROUPS)
    cos, sin = (table[:num] for table in angles)
    for kind, compressor in kinds:
        random = torch.Generator().manual_seed(4)
        part = BlockPool(model.layout, 1).part(model.config.geometry.layers.index(attention.kind), kind)
        pool = BlockPool(model.layout, -(-_GROUPS // part.num_rows))
        ratio, columns = compressor.position_bias.shape
        rows = torch.randn(2, _GROUPS, ratio, columns, generator=random)[:, :num]
        overlap = None
        if kind is not PartKind.HCA_MAIN:
            overlap = torch.randn(2, ratio, compressor.width, generator=random)
        entries = Entries(pool=pool, part=part, block_ids=torch.arange(pool.num_blocks))
        TorchOps().compress_and_pack(compressor, rows, overlap, cos, sin, entries, 0)
        places = entries.locate(torch.arange(num))
        yield f"records of {kind.name}", pool.records(part)[places]
        yield f"decoded records of {kind.name}", pool.decoded(part)[places]


def _across(model: Model, attention: Attention, num: int) -> Iterator[tuple[str, Tensor]]:
    """Attention across tokens, from a position on at which the indexer has to choose, over random entries."""
    geometry, ops, compressor = model.config.geometry, TorchOps(), attention.compressor
    random = torch.Generator().manual_seed(3)
    topk = compressor.indexer.topk if isinstance(compressor, CSACompressor) else 0
    position = max(2 * geometry.window + 5, (topk + 70) * geometry.csa_ratio)
    positions = torch.arange(position, position + _ROWS)[:num]
    lines = torch.randn(-(-_ROWS // geometry.window) + 2, geometry.window, geometry.head_dim, generator=random)
    window = WindowLine(values=lines, position=position, num_tokens=_ROWS).part(0, num)
    q = torch.randn(_ROWS, attention.num_heads, geometry.head_dim, generator=random)[:num]
    if compressor is None:
        yield "attention", ops.full_attention(q, window, attention.sinks, None, positions)
        return
    pool = BlockPool(model.layout, (position + _ROWS) // geometry.block_size + 1)
    visible = torch.div(positions + 1, compressor.ratio, rounding_mode="floor")

    def stored(kind: PartKind) -> Entries:
        part = pool.part(geometry.layers.index(attention.kind), kind)
        pool.decoded(part).normal_(generator=random)
        return Entries(pool=pool, part=part, block_ids=torch.arange(pool.num_blocks))

    if not isinstance(compressor, CSACompressor):
        yield "HCA attention", ops.full_attention(q, window, attention.sinks, stored(PartKind.HCA_MAIN), visible)
        return
    indexer = compressor.indexer
    queries = torch.randn(_ROWS, indexer.num_heads, indexer.width, generator=random)[:num]
    votes = torch.randn(_ROWS, indexer.num_heads, generator=random)[:num]
    picked = ops.indexer_topk(queries, votes, stored(PartKind.INDEXER_KEYS), visible, topk)
    yield "picked entries", picked
    yield "CSA attention", ops.sparse_attention(q, window, attention.sinks, stored(PartKind.CSA_MAIN), picked)


def _layers(model: Model) -> list[DecoderLayer]:
    return [cast(DecoderLayer, layer) for layer in model.model.layers]
