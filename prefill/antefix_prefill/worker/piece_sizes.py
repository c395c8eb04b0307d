"""How many tokens a piece of a prompt may have while decode steps run on the same thread, so that no step waits long.

A step waits for the piece that is running. So with pieces of one length every step waits about equally long, and with
whole chunks a few steps wait for several times as long as the others. The times of pieces and steps are measured.
"""

from __future__ import annotations

from typing import Final

from antefix.linear_law import LinearLaw

# A piece may take as long as so many steps: then the longest wait between two tokens is two and a half steps.
STEPS_PER_PIECE: Final = 1.5
# No piece is shorter, because half of its time is the fixed cost of a call of the model (antefix-tiny, one core).
TOKENS_MIN: Final = 64
# Lengths are multiples of this.
_TOKENS: Final = 16
# Assumed before anything is measured: antefix-tiny's fixed cost and time per token on one core.
_FIXED_S: Final = 0.02
_EACH_S: Final = 0.0004
# Weight of older steps' times. The number of sequences in a step changes slowly.
_MEMORY: Final = 0.9


class PieceSizes:
    """Measures pieces and steps. tokens_max: the most tokens of a piece that runs between two steps."""

    def __init__(self) -> None:
        self._law = LinearLaw((_FIXED_S, _EACH_S), (1.0, float(TOKENS_MIN)))
        self._step_s: float | None = None
        self.tokens_max = TOKENS_MIN

    def observe_step(self, seconds: float) -> None:
        before = seconds if self._step_s is None else self._step_s
        self._step_s = _MEMORY * before + (1 - _MEMORY) * seconds
        fixed_s, each_s = self._law.coefficients
        num_tokens = int((STEPS_PER_PIECE * self._step_s - fixed_s) / max(each_s, 1e-9))
        self.tokens_max = max(num_tokens // _TOKENS * _TOKENS, TOKENS_MIN)

    def observe_piece(self, num_tokens: int, seconds: float) -> None:
        """num_tokens: of all pieces that ran in one call."""
        self._law.observe((1.0, float(num_tokens)), seconds)
