"""What vLLM tells a tier about its cache: groups, rows and ranks. This module reads an `OffloadingSpec`, but does not
import vLLM.

A *row* is one chunk of host memory: one block of one group, for all ranks of this engine. Each rank has a *cell*; the
cells have equal size and follow each other, and the row is padded to a whole page of memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

GROUP_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """layers: by vLLM's names, in the order of its row.  num_window_rows: how many of the last rows a hit needs, 0 for
    all; None where this version of vLLM does not say (0.32).
    """

    id: int
    num_tokens: int
    layers: tuple[str, ...]
    num_window_rows: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """num_tokens of a group: the tokens of one row. cell_bytes: bytes of a row that one rank uses.

    is_replicated: vLLM keeps one cell for all ranks, because they hold the same.  is_one_whole: the cells together are
    the same bytes with any number of ranks.  is_cut_otherwise: layers or tokens are divided over ranks too, not only
    heads.
    """

    groups: tuple[Group, ...]
    cell_bytes: int
    num_cells: int
    row_stride: int
    blocks_per_row: int
    dtype: str
    layout: str
    model: str
    tokens_per_hash: int
    tp_size: int
    is_cut_otherwise: bool
    is_replicated: bool
    is_one_whole: bool

    @classmethod
    def of(cls, spec: Any, row_stride: int) -> Self:
        """spec: vLLM's `OffloadingSpec`, 0.32 or 0.33."""
        config = spec.config
        parallel, blocks = config.parallel, config.cache.blocks_per_chunk
        is_replicated = bool(spec.replicated_layout)
        return cls(
            groups=tuple(_group(group, blocks) for group in config.groups),
            cell_bytes=config.worker_kv_bytes_per_block * blocks,
            num_cells=1 if is_replicated else parallel.world_size,
            row_stride=row_stride,
            blocks_per_row=blocks,
            dtype=str(config.model.dtype),
            layout=str(config.kv_cache_layout or ""),
            model=config.model.name,
            tokens_per_hash=config.cache.tokens_per_hash,
            tp_size=parallel.tp_size,
            is_cut_otherwise=parallel.world_size != parallel.tp_size
            or any(size != 1 for size in (parallel.pp_size, parallel.pcp_size, parallel.dcp_size)),
            is_replicated=is_replicated,
            is_one_whole=bool(parallel.is_parallelism_agnostic),
        )

    def group(self, id: int) -> Group:
        for group in self.groups:
            if group.id == id:
                return group
        raise KeyError(id)


def _group(group: Any, blocks_per_row: int) -> Group:
    # vLLM 0.33 says how many chunks of a window are kept; None means full attention there, and unknown in 0.32.
    says = hasattr(group, "sliding_window_size_in_chunks")
    window = group.sliding_window_size_in_chunks if says else None
    return Group(
        id=group.group_id,
        num_tokens=group.tokens_per_block * blocks_per_row,
        layers=tuple(group.layer_names),
        num_window_rows=(window or 0) if says else None,
    )


def split_key(key: bytes) -> tuple[bytes, int]:
    """vLLM's hash of all tokens up to the row's end, and the row's group."""
    return key[:-GROUP_BYTES], int.from_bytes(key[-GROUP_BYTES:], "big")
