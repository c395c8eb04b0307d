"""What rank 0 tells the other ranks: which call comes next, on which pool and sequences. Their own state does the rest.

Pools, window states and calls have numbers that rank 0 gives. A window state's bytes are sent once, when a call first
names it; from then on each rank moves its own one on. Of block tables what is new is sent: they only grow.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True, kw_only=True)
class NewPool:
    """A pool and its operations, as `make_backend` makes them."""

    pool: int
    num_blocks: int
    kernels: str
    reproducible: bool
    decode_steps: str
    short_prefills: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NewWindow:
    """A window state after `position` tokens.  cut: as there.  data: its bytes; empty: of a sequence's beginning."""

    window: int
    position: int
    cut: int
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class TableEnd:
    """A sequence and its block table from block `first` on."""

    window: int
    first: int
    block_ids: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunTokens:
    """`run_tokens`; what came out stays under the number `call`."""

    call: int
    pool: int
    batch: list[tuple[TableEnd, Tokens]]
    logits: str
    write_global_kv: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """`Ran.keep` of sequence `number`; None: `Ran.keep_all`."""

    call: int
    number: int | None
    count: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FollowRan:
    """`follow_ran`."""

    call: int
    number: int
    window: int
    tokens: Tokens
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """`draft_logits`."""

    windows: list[int]
    next_tokens: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """`replay`."""

    pool: int
    sequence: TableEnd
    tokens: Tokens
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fill:
    """Payloads that rank 0 has read come from it to every rank's pool."""

    pool: int
    block_ids: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Drop:
    """Nobody has these any more."""

    pools: list[int]
    windows: list[int]
    calls: list[int]


Message = NewPool | NewWindow | RunTokens | Keep | FollowRan | Draft | Replay | Fill | Drop
