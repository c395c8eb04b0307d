"""Decides when an output ends, and which of its tokens may be shown already. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from antefix.sampling import Sampling

STOP = "stop"
LENGTH = "length"


class Stopper:
    """Watches one output. Tokens that may be the beginning of a stop sequence are held back until it is clear whether
    they are.
    """

    def __init__(self, sampling: Sampling, eos_ids: frozenset[int], emitted: Sequence[int] = ()) -> None:
        self._sampling = sampling
        # With a grammar, end tokens are not ignored: the output that it describes has an end, which may need one.
        ends = frozenset() if sampling.ignore_eos and not sampling.grammar else eos_ids
        self._end_ids = ends | frozenset(sampling.stop_token_ids)
        self._seen: list[int] = list(emitted)
        self._num_shown = len(self._seen)
        self.num_output = len(self._seen)
        self.finish_reason = ""
        self.stop_number = 0

    def push(self, token: int, *, is_last: bool = False) -> list[int]:
        """Take the next token. Returns the tokens that may be shown now. When the output is over, `finish_reason` is
        set.

        End tokens count as output but are not shown. Stop sequences are not shown either. A stop sequence does not end
        the output before min_tokens; end tokens are not chosen before that.  is_last: the grammar allows nothing more.
        """
        self.num_output += 1
        self._seen.append(token)
        if token in self._end_ids:
            return self._finish(STOP, len(self._seen) - 1)
        may_stop = self.num_output > self._sampling.min_tokens
        for number, sequence in enumerate(self._sampling.stop if may_stop else (), start=1):
            if tuple(self._seen[-len(sequence) :]) == sequence:
                self.stop_number = number
                return self._finish(STOP, len(self._seen) - len(sequence))
        if is_last:
            return self._finish(STOP, len(self._seen))
        if self.num_output >= self._sampling.max_tokens:
            return self._finish(LENGTH, len(self._seen))
        return self._show(len(self._seen) - self._num_undecided())

    def _finish(self, reason: str, stop: int) -> list[int]:
        self.finish_reason = reason
        return self._show(stop)

    def _show(self, stop: int) -> list[int]:
        shown = self._seen[self._num_shown : stop]
        self._num_shown = max(self._num_shown, stop)
        return shown

    def _num_undecided(self) -> int:
        """How many of the last tokens are the beginning of a stop sequence; the longest such run counts."""
        longest = 0
        for sequence in self._sampling.stop:
            for size in range(min(len(sequence) - 1, len(self._seen)), longest, -1):
                if tuple(self._seen[-size:]) == sequence[:size]:
                    longest = size
                    break
        return longest
