"""Compares the entries that two engines store for one V4 prompt: converts them to one shape, finds and explains
differences.

Each engine has its own layout of the same numbers. For each engine, a function here or next to its layout reads a
prompt's stored records into `StoredV4`, and `compare` compares two of these entry by entry.

    group            rows                                              width
    csa_main         a CSA layer's compressed entries, in order        head_dim
    indexer_keys     its keys                                          indexer_dim
    hca_main         an HCA layer's compressed entries                 head_dim
    window           the last n_win - 1 tokens of each layer           head_dim
    overlap          CSA: kv, then gate rows of the last group         2 m rows of head_dim
    indexer_overlap  the indexer's                                     2 m rows of indexer_dim
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import torch
from torch import Tensor

from antefix.layout import BlockLayout, KVFormat, PartKind
from antefix.model import WindowState
from antefix.model.quant import hadamard, pack_entries, pack_keys, unpack, unpack_entries, unpack_keys
from antefix_engines.engine_layout import EngineLayout, Part, views_of


class Group(StrEnum):
    CSA_MAIN = "csa_main"
    INDEXER_KEYS = "indexer_keys"
    HCA_MAIN = "hca_main"
    WINDOW = "window"
    OVERLAP = "overlap"
    INDEXER_OVERLAP = "indexer_overlap"


_STATES: Final = (Group.OVERLAP, Group.INDEXER_OVERLAP)
# Largest differences, relative to a group's largest number, that order of sums and rounding can explain. Measured: 5e-6
# and 0.19 in models of five layers with random weights (tests/foreign_engines/test_v4_entries.py), and 0.36 for another
# prompt and other weights in three engines (benchmarks/engines_three_way.py).
SUMS_MAX: Final = 1e-4
ROUNDING_MAX: Final = 0.45
# The same for indexer keys, which one engine keeps in FP4 and another in FP8. Measured: 0.31 (engines_three_way.py).
KEYS_MAX: Final = 0.5
Where = tuple[int, Group]


@dataclass(frozen=True, kw_only=True)
class StoredV4:
    """entries: [rows, width] float32 by layer and group.  num_tokens: a multiple of all ratios.

    layout: Antefix's layout for these entries; its format says how this engine rounds them: FLOAT32: not at all.
    keys_rotated: indexer keys are Hadamard-rotated, as in the FP8 format.  computes: the precision of the engine's
    computation, whatever precision is stored.
    """

    engine: str
    num_tokens: int
    layout: BlockLayout
    entries: Mapping[Where, Tensor]
    keys_rotated: bool = False
    computes: str = "float32"


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One layer's group in two engines.

    num_equal: rows equal to the bit.  largest: largest difference, relative to the group's largest number.
    first_row: the first row that differs; -1: none.  share_rounded: if one engine does not round, the share of numbers
    that are equal after its numbers are rounded in the other's way.  why: an explanation.
    is_explained: whether order of sums or rounding can be the reason.
    """

    layer: int
    group: Group
    num_rows: int
    num_equal: int
    largest: float
    first_row: int
    share_rounded: float
    why: str
    is_explained: bool


def of_antefix(layout: BlockLayout, blocks: Sequence[bytes], checkpoint: bytes) -> StoredV4:
    """Read the entries from blocks in order and the checkpoint after the last one, as Antefix's workers store them."""
    entries: dict[Where, Tensor] = {}
    names = {
        PartKind.CSA_MAIN: Group.CSA_MAIN,
        PartKind.INDEXER_KEYS: Group.INDEXER_KEYS,
        PartKind.HCA_MAIN: Group.HCA_MAIN,
    }
    for part in layout.parts:
        raw = b"".join(block[part.offset : part.offset + part.nbytes] for block in blocks)
        records = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(-1, part.record.nbytes)
        entries[part.layer, names[part.kind]] = unpack(part.kind, records, layout).float()
    num_tokens = len(blocks) * layout.block_size
    state = WindowState.from_bytes(layout, num_tokens, checkpoint)
    window = layout.geometry.window
    oldest_first = state.window.roll(-(num_tokens % window), dims=1).float()
    for layer in range(layout.geometry.num_layers):
        # The oldest window entry is stored but never read again.
        entries[layer, Group.WINDOW] = oldest_first[layer, 1:]
    for group, states in ((Group.OVERLAP, state.main), (Group.INDEXER_OVERLAP, state.indexer)):
        for layer, each in states.items():
            if each.overlap is not None:
                entries[layer, group] = each.overlap.flatten(0, 1).float()
    is_fp8 = layout.kv_format is KVFormat.FP8
    return StoredV4(engine="antefix", num_tokens=num_tokens, layout=layout, entries=entries, keys_rotated=is_fp8)


def of_transformers(own: BlockLayout, layout: EngineLayout, blocks: Sequence[bytes], checkpoint: bytes) -> StoredV4:
    """Read the entries from payloads as `AntefixCache` stores them.  own: the geometry, with the FLOAT32 format."""
    entries: dict[Where, list[Tensor]] = {}
    kinds = {"compressor_entries": None, "indexer_entries": Group.INDEXER_KEYS, "window_keys": Group.WINDOW}
    state_rows: dict[Where, list[Tensor]] = {}
    csa_layers = {part.layer for part in layout.block if part.group == "indexer_entries"}
    for payload in blocks:
        for part, view in views_of(memoryview(payload), layout.block):
            main = Group.CSA_MAIN if part.layer in csa_layers else Group.HCA_MAIN
            entries.setdefault((part.layer, kinds[part.group] or main), []).append(_numbers(part, view))
    for part, view in views_of(memoryview(checkpoint), layout.checkpoint):
        if part.group == "window_keys":
            entries[part.layer, Group.WINDOW] = [_numbers(part, view)]
        else:
            group = Group.INDEXER_OVERLAP if part.group.startswith("indexer") else Group.OVERLAP
            state_rows.setdefault((part.layer, group), []).append(_numbers(part, view))
    joined = {where: torch.cat(rows) for where, rows in (entries | state_rows).items()}
    num_tokens = len(blocks) * layout.block_size
    return StoredV4(engine="transformers", num_tokens=num_tokens, layout=own, entries=joined)


def compare(one: StoredV4, other: StoredV4) -> list[Difference]:
    """Every group of KV in every layer, in order.

    Raises:  ValueError: groups or rows of the two differ, so they cannot be compared.
    """
    if one.entries.keys() != other.entries.keys():
        missing = sorted(one.entries.keys() ^ other.entries.keys())
        raise ValueError(f"{one.engine} and {other.engine} do not have the same groups: {missing}")
    return [_difference(one, other, layer, group) for layer, group in sorted(one.entries)]


def _difference(one: StoredV4, other: StoredV4, layer: int, group: Group) -> Difference:
    a, b = one.entries[layer, group], other.entries[layer, group]
    if a.shape != b.shape:
        raise ValueError(
            f"layer {layer}, {group}: {one.engine} stored the shape {tuple(a.shape)}, but {other.engine} "
            f"{tuple(b.shape)}"
        )
    share = _share_rounded(one, other, layer, group)
    if group is Group.INDEXER_KEYS and one.keys_rotated != other.keys_rotated:
        a, b = (x if stored.keys_rotated else hadamard(x) for x, stored in ((a, one), (b, other)))
    # Before the first group, the gates are -inf in all engines.
    same = (a == b) | (torch.isinf(a) & torch.isinf(b))
    gap = torch.where(same, 0.0, (a - b).abs().nan_to_num(nan=float("inf")))
    scale = torch.where(torch.isfinite(b), b.abs(), 0.0).max().clamp(min=1e-30)
    largest = float(gap.max() / scale)
    differing = torch.nonzero(~same.all(-1))
    why, is_explained = _why(one, other, group, largest, share)
    return Difference(
        layer=layer,
        group=group,
        num_rows=len(a),
        num_equal=len(a) - len(differing),
        largest=largest,
        first_row=int(differing[0]) if len(differing) else -1,
        share_rounded=share,
        why=why,
        is_explained=is_explained,
    )


def _share_rounded(one: StoredV4, other: StoredV4, layer: int, group: Group) -> float:
    formats = [stored.layout.kv_format for stored in (one, other)]
    a, b = one.entries[layer, group], other.entries[layer, group]
    if group not in _STATES and KVFormat.FP8 in formats and formats[0] is not formats[1]:
        coarse = one if formats[0] is KVFormat.FP8 else other
        pack, read = (pack_keys, unpack_keys) if group is Group.INDEXER_KEYS else (pack_entries, unpack_entries)
        rounded = [
            x if stored is coarse else read(pack(x, coarse.layout), coarse.layout)
            for x, stored in ((a, one), (b, other))
        ]
        a, b = rounded
    return float(((a == b) | (torch.isinf(a) & torch.isinf(b))).float().mean())


def _why(one: StoredV4, other: StoredV4, group: Group, largest: float, share: float) -> tuple[str, bool]:
    """An explanation, and whether rounding or the order of sums can be the reason."""
    if largest == 0:
        return "equal to the bit", True
    if one.computes != other.computes:
        text = f"computed in {one.computes} and {other.computes}: roundings move all layers above ({share:.0%} equal)"
        most = KEYS_MAX if group is Group.INDEXER_KEYS else ROUNDING_MAX
        return (text, True) if largest < most else ("another computation: rounding does not explain it", False)
    if one.layout.kv_format is other.layout.kv_format:
        if largest < SUMS_MAX:
            return "the same sums in another order", True
        return "another computation: neither order nor rounding explains it", False
    if share > 0.98:
        return f"rounded where it is stored: rounded alike, {share:.2%} of the numbers are equal", True
    if largest < ROUNDING_MAX and group in _STATES:
        return "not rounded, but computed from rounded KV in the layers below", True
    if largest < ROUNDING_MAX:
        return f"rounded where it is stored, and computed from rounded KV in the layers below ({share:.0%} equal)", True
    return "another computation: rounding does not explain it", False


def _numbers(part: Part, view: memoryview) -> Tensor:
    raw = torch.frombuffer(bytearray(view), dtype=getattr(torch, part.dtype))
    return raw.view(part.num_rows, -1).float()
