"""The sizes that window-state decisions weigh, read off a block layout once."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from antefix.errors import InternalError
from antefix.layout import BlockLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Tokens and bytes of one model's KV.

    block_size: tokens a block.  block_bytes: global KV of a block.  checkpoint_bytes: window state of a checkpoint.
    replay_tokens: how far before its end an exact replay starts, whole blocks.  window_tokens: n_win.
    """

    block_size: int
    block_bytes: int
    checkpoint_bytes: int
    replay_tokens: int
    window_tokens: int
    num_layers: int

    def __post_init__(self) -> None:
        for name in ("block_size", "block_bytes", "checkpoint_bytes", "window_tokens", "num_layers"):
            if getattr(self, name) < 1:
                raise InternalError(f"{name} must be positive, is {getattr(self, name)}")
        if self.replay_tokens < 0 or self.replay_tokens % self.block_size:
            raise InternalError(f"replay_tokens must be whole blocks, is {self.replay_tokens}")

    @classmethod
    def of(cls, layout: BlockLayout) -> Sizes:
        return cls(
            block_size=layout.geometry.block_size,
            block_bytes=layout.block_bytes,
            checkpoint_bytes=layout.checkpoint_bytes,
            replay_tokens=layout.geometry.replay_tokens,
            window_tokens=layout.geometry.window,
            num_layers=layout.geometry.num_layers,
        )

    def blocks_up(self, tokens: int) -> int:
        """Whole blocks that cover `tokens`."""
        return -(-tokens // self.block_size)

    def replay_work_tokens(self, replayed: int) -> int:
        """Tokens that take as long to prefill as a replay that starts `replayed` tokens before its end.

        Each layer runs n_win - 1 tokens fewer than the one below, and the top one none (`antefix.model.replay`), so an
        exact replay's work is about half of its tokens. Window KV and projections of the tokens left out are not
        counted: the measured replay law, which has these tokens as its unit, knows them.
        """
        return _replay_work_tokens(replayed, self.window_tokens, self.num_layers)

    @property
    def exact_replay_work_tokens(self) -> int:
        return self.replay_work_tokens(self.replay_tokens)


# Asked for some prefixes of each request; a simulated fleet asks millions of times.
@functools.lru_cache(maxsize=4096)
def _replay_work_tokens(replayed: int, window_tokens: int, num_layers: int) -> int:
    step = window_tokens - 1
    run = sum(min(replayed, window_tokens + above * step) for above in range(num_layers - 1))
    return -(-run // num_layers)
