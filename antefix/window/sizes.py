"""The sizes that decisions about window state need, computed once from a block layout."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from antefix.errors import InternalError
from antefix.layout import BlockLayout
from antefix.layout_v41 import V41Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Tokens and bytes of one model's KV.

    block_size: tokens per block.  block_bytes: global KV of a block.  checkpoint_bytes: window state of a checkpoint.
    window_tokens: n_win.  replay_reach: `KVGeometry.replay_reach`, the one bound of exact replays.
    """

    block_size: int
    block_bytes: int
    checkpoint_bytes: int
    window_tokens: int
    replay_reach: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("block_size", "block_bytes", "checkpoint_bytes", "window_tokens"):
            if getattr(self, name) < 1:
                raise InternalError(f"{name} must be positive, is {getattr(self, name)}")
        if not self.replay_reach or min(self.replay_reach) < 1:
            raise InternalError(f"replay_reach must give a number of tokens for each layer, is {self.replay_reach}")

    @classmethod
    def of(cls, layout: BlockLayout | V41Layout) -> Sizes:
        return cls(
            block_size=layout.geometry.block_size,
            block_bytes=layout.block_bytes,
            checkpoint_bytes=layout.checkpoint_bytes,
            window_tokens=layout.geometry.window,
            replay_reach=layout.geometry.replay_reach,
        )

    @property
    def replay_tokens(self) -> int:
        """How many tokens before its end an exact replay starts, rounded up to whole blocks."""
        return self.blocks_up(self.replay_reach[0]) * self.block_size

    def blocks_up(self, tokens: int) -> int:
        """Whole blocks that cover `tokens`."""
        return -(-tokens // self.block_size)

    def replay_work_tokens(self, replayed: int) -> int:
        """Tokens that take as long to prefill as a replay that starts `replayed` tokens before its end.

        Each layer runs the tokens that the layers above it need, and the top layer none (`antefix.model.replay`), so an
        exact replay's work is about half of its tokens. Window KV and projections of the tokens left out are not
        counted: the measured replay law, which has these tokens as its unit, knows them.
        """
        return _replay_work_tokens(replayed, self.replay_reach)

    @property
    def exact_replay_work_tokens(self) -> int:
        return self.replay_work_tokens(self.replay_tokens)


# Asked for some prefixes of each request; a simulated fleet asks millions of times.
@functools.lru_cache(maxsize=4096)
def _replay_work_tokens(replayed: int, reach: tuple[int, ...]) -> int:
    run = sum(min(replayed, above) for above in reach[1:])
    return -(-run // len(reach))
