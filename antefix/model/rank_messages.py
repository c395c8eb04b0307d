"""The messages that rank 0 sends to the other ranks: the next call, and the pool and sequences that it uses.

Rank 0 gives numbers to pools, window states and calls, by which messages name them. Rank 0 sends a window state's bytes
once, with the first call that uses the state; after that every rank advances its own copy. Only new entries of block
tables are sent, because tables only grow.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True, kw_only=True)
class NewPool:
    """Make a pool and its operations on the receiving rank, with `make_backend`."""

    pool: int
    num_blocks: int
    kernels: str
    reproducible: bool
    decode_steps: str
    short_prefills: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NewWindow:
    """A window state after `position` tokens. cut: as in `WindowState.cut`. data: its bytes; empty for a new
    sequence.
    """

    window: int
    position: int
    cut: int
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class TableEnd:
    """A sequence, with the part of its block table from block `first` on."""

    window: int
    first: int
    block_ids: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunTokens:
    """Call `run_tokens`; its result is kept under the number `call`."""

    call: int
    pool: int
    batch: list[tuple[TableEnd, Tokens]]
    logits: str
    write_global_kv: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """Call `Ran.keep` for sequence `number`; None: call `Ran.keep_all`."""

    call: int
    number: int | None
    count: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FollowRan:
    """Call `follow_ran`."""

    call: int
    number: int
    window: int
    tokens: Tokens
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """Call `draft_logits`."""

    windows: list[int]
    next_tokens: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """Call `replay`."""

    pool: int
    sequence: TableEnd
    tokens: Tokens
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fill:
    """Receive payloads that rank 0 has read from the store into this rank's pool."""

    pool: int
    block_ids: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Drop:
    """Drop these objects on the receiving rank, because rank 0 no longer holds them."""

    pools: list[int]
    windows: list[int]
    calls: list[int]


Message = NewPool | NewWindow | RunTokens | Keep | FollowRan | Draft | Replay | Fill | Drop
