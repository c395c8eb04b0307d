"""The positions of all parts in vLLM's rows of a DeepSeek-V4 cache, so that only the parts that a hit needs are stored.

vLLM packs one block of every layer of a group into a row. A page per layer, padded to a multiple of 576 bytes:

    group      tokens  page of a layer, without padding                   what a hit at a block's end needs
    blocks     256     64 entries of 584 B (CSA), 2 (HCA); 64 keys        all rows
    window     64      64 entries of 584 B                                the last 128 tokens: 2 rows
    CSA state  4       kv and score of two series: 2 x 2 x 512 floats a   of 1 row, the first series
                       token, the indexer's: 128
    HCA state  8       kv and score: 2 x 512 floats per token               nothing: all groups are closed

n entries of 584 B lie as n x 576 B (448 FP8 codes, 64 BF16), then n x 8 B of scales; n keys as n x 128 B, then n x 4 B,
or as n x 64 B and n x 4 B. `V4Pages.of` knows a cache by the names of its layers, and believes it only if its pages add
up to vLLM's row to the byte. A cache that is not recognised is not V4, and its rows are stored whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from antefix.block import Family
from antefix.layout import Field, RecordLayout
from antefix_engines.engine_layout import EngineLayout, Part
from antefix_engines.vllm.shape import Group, Shape

Bytes = npt.NDArray[np.uint8]
NO_MEMORY: Final[Bytes] = np.empty((0, 0), np.uint8)

ALIGN: Final = 576
ENTRY_BYTES: Final = 584
CODES, ROPE, SCALES = 448, 128, 8
CSA_RATIO, HCA_RATIO = 4, 128
WINDOW_TOKENS: Final = 128
# Of the main compressor and of the indexer's, in floats of 4 bytes.
HEAD_BYTES: Final = 512 * 4
INDEXER_BYTES: Final = 128 * 4
# Of one key: FP8 codes and a float, or FP4 codes and four scales.
KEY_WIDTHS: Final = (132, 68)


class Kind(StrEnum):
    """What a page holds; also the groups of an `EngineLayout`'s parts."""

    CSA = "csa_main"
    HCA = "hca_main"
    KEYS = "indexer_keys"
    WINDOW = "window"
    CSA_STATE = "csa_state"
    KEYS_STATE = "indexer_state"
    HCA_STATE = "hca_state"


STATES: Final = (Kind.CSA_STATE, Kind.KEYS_STATE, Kind.HCA_STATE)
_LAYER: Final = re.compile(
    r".*\blayers\.(\d+)\.[\w.]*attn"
    r"(\.swa_cache|\.compressor\.state_cache|\.indexer\.k_cache|\.indexer\.compressor\.state_cache|)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Adjacent pages of one kind in a row: `page_bytes` each, of which the first `used_bytes` are in use."""

    kind: Kind
    layers: tuple[int, ...]
    offset: int
    page_bytes: int
    used_bytes: int
    num_tokens: int

    def used(self, row: Bytes) -> Bytes:
        """A view of the bytes in use, page by page."""
        count = len(self.layers)
        return row[self.offset : self.offset + count * self.page_bytes].reshape(count, -1)[:, : self.used_bytes]

    def live(self, row: Bytes) -> Bytes:
        """A view of the first series of CSA's state: kv and score of each token, which the next group overlaps with."""
        used = self.used(row)
        per_token = self.used_bytes // self.num_tokens
        return used.reshape(len(self.layers), self.num_tokens, 2, 2, per_token // 4)[:, :, :, 0, :]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """The part of a row that a checkpoint holds: the used bytes of each page, or CSA's first series."""

    group: int
    tokens_before_end: int
    runs: tuple[Run, ...]
    only_live: bool = False

    def views(self, row: Bytes) -> Iterator[Bytes]:
        for run in self.runs:
            yield run.live(row) if self.only_live else run.used(row)

    def parts(self) -> Iterator[Part]:
        for run in self.runs:
            yield from _parts(run, self.only_live)

    @property
    def nbytes(self) -> int:
        share = 2 if self.only_live else 1
        return sum(len(run.layers) * run.used_bytes // share for run in self.runs)


@dataclass(frozen=True, kw_only=True)
class V4Pages:
    """This class has no slots, because the layout is computed once and kept.

    runs: the runs of each group, by its id.  blocks: the group that every later token may need.  compact: windows
    without state that hits at block ends do not need; `antefix_engines.vllm.aligned` restricts hits to block ends.
    """

    shape: Shape
    runs: dict[int, tuple[Run, ...]]
    blocks: Group
    compact: bool

    @classmethod
    def of(cls, shape: Shape, *, compact: bool) -> Self | None:
        """Returns None if this is not a V4 cache with a known layout; nothing may then be assumed about its rows."""
        if (
            shape.dtype != "fp8_ds_mla"
            or shape.layout != "BLHNC"
            or shape.blocks_per_row != 1
            or shape.is_cut_otherwise
        ):
            return None
        fitting = []
        for key_bytes in KEY_WIDTHS:
            runs = {group.id: _runs_of(group, key_bytes) for group in shape.groups}
            if all(runs.values()) and max(map(_end, runs.values())) == shape.cell_bytes:
                fitting.append(runs)
        blocks = [group for group in shape.groups if _kinds(group) & {Kind.CSA, Kind.HCA}]
        if len(fitting) != 1 or len(blocks) != 1 or blocks[0].num_tokens % WINDOW_TOKENS:
            return None
        windows = [group for group in shape.groups if group != blocks[0]]
        pages = cls(shape=shape, runs=fitting[0], blocks=blocks[0], compact=compact)
        is_v4 = _kinds(blocks[0]) <= {Kind.CSA, Kind.HCA, Kind.KEYS} and all(map(pages._is_window, windows))
        return pages if is_v4 else None

    def _is_window(self, group: Group) -> bool:
        """Whether the group is one of V4's windows or states, with as many rows as vLLM says (where it says)."""
        span = self.span(group)
        if not span or span % group.num_tokens:
            return False
        return group.num_window_rows is None or group.num_window_rows == span // group.num_tokens

    @property
    def block_tokens(self) -> int:
        return self.blocks.num_tokens

    def span(self, group: Group) -> int:
        """How many tokens before its end a hit needs from a group; 0: all tokens."""
        kinds = _kinds(group)
        if kinds & {Kind.CSA_STATE, Kind.KEYS_STATE}:
            return 2 * CSA_RATIO
        return WINDOW_TOKENS if kinds & {Kind.WINDOW, Kind.HCA_STATE} else 0

    def end_of(self, position: int) -> int:
        """The end of the block that contains this position; a row there may belong to the window at that end."""
        return -(-position // self.block_tokens) * self.block_tokens

    def is_in_window(self, group_id: int, position: int) -> bool:
        """Whether a hit at the end of its block needs the row that ends at `position`."""
        return self.end_of(position) - position < self._spans[group_id]

    @cached_property
    def _spans(self) -> dict[int, int]:
        return {group.id: self.span(group) for group in self.shape.groups}

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """The contents of a checkpoint, row by row."""
        pieces = []
        for group in self.shape.groups:
            kinds = _kinds(group)
            if group == self.blocks or (self.compact and Kind.HCA_STATE in kinds):
                continue
            only_live = self.compact and bool(kinds & {Kind.CSA_STATE, Kind.KEYS_STATE})
            # No hit at the end of a block reads the first of CSA's two rows.
            befores = range(0, group.num_tokens if only_live else self.span(group), group.num_tokens)
            pieces += [
                Piece(group=group.id, tokens_before_end=before, runs=self.runs[group.id], only_live=only_live)
                for before in reversed(befores)
            ]
        return tuple(pieces)

    @cached_property
    def block_bytes(self) -> int:
        return sum(len(run.layers) * run.used_bytes for run in self.runs[self.blocks.id])

    @cached_property
    def window_bytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)

    @cached_property
    def layout(self) -> EngineLayout:
        return EngineLayout(
            engine="vllm",
            family=Family.V4,
            block_size=self.block_tokens,
            block=tuple(part for run in self.runs[self.blocks.id] for part in _parts(run)),
            checkpoint=tuple(
                part for piece in self.pieces for run in piece.runs for part in _parts(run, piece.only_live)
            ),
            num_checkpoints=1,
        )


def _kind_of(layer_name: str, group: Group) -> tuple[int, Kind] | None:
    found = _LAYER.fullmatch(layer_name)
    if found is None:
        return None
    layer, what = int(found[1]), found[2]
    if what == ".swa_cache":
        return layer, Kind.WINDOW
    if what == ".indexer.k_cache":
        return layer, Kind.KEYS
    if what == ".indexer.compressor.state_cache":
        return layer, Kind.KEYS_STATE
    if what == ".compressor.state_cache":
        return layer, Kind.CSA_STATE if group.num_tokens == CSA_RATIO else Kind.HCA_STATE
    # A layer with an indexer in the same group selects entries, so its entries are CSA's.
    return layer, Kind.CSA if f"{layer_name}.indexer.k_cache" in group.layers else Kind.HCA


def _kinds(group: Group) -> set[Kind]:
    return {found[1] for name in group.layers if (found := _kind_of(name, group)) is not None}


def _used_bytes(kind: Kind, num_tokens: int, key_bytes: int) -> int:
    return {
        Kind.WINDOW: num_tokens * ENTRY_BYTES,
        Kind.CSA: num_tokens // CSA_RATIO * ENTRY_BYTES,
        Kind.HCA: num_tokens // HCA_RATIO * ENTRY_BYTES,
        Kind.KEYS: num_tokens // CSA_RATIO * key_bytes,
        Kind.CSA_STATE: num_tokens * 4 * HEAD_BYTES,
        Kind.KEYS_STATE: num_tokens * 4 * INDEXER_BYTES,
        Kind.HCA_STATE: num_tokens * 2 * HEAD_BYTES,
    }[kind]


def _runs_of(group: Group, key_bytes: int) -> tuple[Run, ...]:
    """The runs of a group's row: vLLM puts layers of one kind side by side, kinds in the order of their first layers.
    Returns nothing for a layer of another kind.
    """
    by_kind: dict[Kind, list[int]] = {}
    for name in group.layers:
        found = _kind_of(name, group)
        if found is None:
            return ()
        by_kind.setdefault(found[1], []).append(found[0])
    runs, offset = [], 0
    for kind, layers in by_kind.items():
        used = _used_bytes(kind, group.num_tokens, key_bytes)
        page = -(-used // ALIGN) * ALIGN
        runs.append(
            Run(
                kind=kind,
                layers=tuple(layers),
                offset=offset,
                page_bytes=page,
                used_bytes=used,
                num_tokens=group.num_tokens,
            )
        )
        offset += page * len(layers)
    return tuple(runs)


def _end(runs: tuple[Run, ...]) -> int:
    return runs[-1].offset + runs[-1].page_bytes * len(runs[-1].layers)


def _parts(run: Run, only_live: bool = False) -> Iterator[Part]:
    """A run's pages as parts, each split into pieces that compress alike."""
    for layer in run.layers:
        if run.kind in STATES:
            floats = run.used_bytes // (2 if only_live else 1)
            yield _part(layer, run.kind, run.num_tokens, ("values", floats // run.num_tokens, 4))
        elif run.kind is Kind.KEYS:
            num_keys = run.num_tokens // CSA_RATIO
            is_fp8 = run.used_bytes == num_keys * KEY_WIDTHS[0]
            yield _part(layer, run.kind, num_keys, ("codes", 128 if is_fp8 else 64, 1))
            yield _part(layer, run.kind, num_keys, ("scales", 4, 4 if is_fp8 else 1))
        else:
            num_entries = run.used_bytes // ENTRY_BYTES
            yield _part(layer, run.kind, num_entries, ("codes", CODES, 1), ("rope", ROPE, 2))
            yield _part(layer, run.kind, num_entries, ("scales", SCALES, 1))


def _part(layer: int, kind: Kind, num_rows: int, *fields: tuple[str, int, int]) -> Part:
    made, offset = [], 0
    for name, nbytes, width in fields:
        made.append(Field(name=name, offset=offset, nbytes=nbytes, width=width))
        offset += nbytes
    return Part(layer=layer, group=kind, num_rows=num_rows, record=RecordLayout(fields=tuple(made)))
