"""Runs on every rank but rank 0: repeats each call that rank 0 sends, on the rank's own pools and window states.

At the start of each call, pools and window states hold the same bytes as rank 0's: rank 0 sent the bytes once, and
since then every rank has run the same calls. An error on this rank ends all ranks, unless the same call fails on each
of them. Rank 0 checks calls of the model before it sends them to the other ranks.
"""

from __future__ import annotations

import collections.abc
from typing import Literal, cast

from antefix.model.backend import make_backend
from antefix.model.draft import draft_logits, follow_ran
from antefix.model.model import Model
from antefix.model.ops import Ops
from antefix.model.pool import BlockPool
from antefix.model.rank_messages import (
    Draft,
    Drop,
    Fill,
    FollowRan,
    Keep,
    Message,
    NewPool,
    NewWindow,
    Replay,
    RunTokens,
    TableEnd,
)
from antefix.model.ranks import Ranks
from antefix.model.replay import replay
from antefix.model.runner import Ran, run_tokens
from antefix.model.window_state import Sequence, WindowState


class CallFailed(Exception):
    """A call of the model failed on this rank. If the call failed on every rank at the same exchange, the ranks still
    have equal states.
    """


class Follower:
    """One rank other than rank 0, with its share of a model."""

    def __init__(self, model: Model, ranks: Ranks) -> None:
        self._model = model
        self._ranks = ranks
        self._pools: dict[int, tuple[BlockPool, Ops]] = {}
        self._sequences: dict[int, Sequence] = {}
        self._calls: dict[int, Ran] = {}

    def do(self, messages: collections.abc.Sequence[Message]) -> None:
        """Carry out the messages in the order in which rank 0 sent them.

        Raises:  CallFailed: a call of the model failed; the state is as before that call.  Any other error is fatal.
        """
        failed: CallFailed | None = None
        for message in messages:
            try:
                self._do(message)
            except Exception as err:
                if not isinstance(message, RunTokens | Replay):
                    raise
                failed = CallFailed(f"{type(err).__name__}: {err}")
                failed.__cause__ = err
        if failed is not None:
            raise failed

    def _do(self, message: Message) -> None:
        match message:
            case RunTokens():
                self._run(message)
            case Keep(call=call, number=None):
                self._calls[call].keep_all()
            case Keep(call=call, number=number, count=count):
                self._calls[call].keep(cast(int, number), count)
            case FollowRan():
                window = self._sequences[message.window].window
                ran, ops = self._calls[message.call], self._ops
                follow_ran(self._model, ran, message.number, window, message.tokens, stop=message.stop, ops=ops)
            case Draft():
                windows = [self._sequences[number].window for number in message.windows]
                draft_logits(self._model, windows, message.next_tokens, self._ops)
            case Replay():
                pool, ops = self._pools[message.pool]
                sequence = self._sequence(message.sequence)
                replay(self._model, pool, sequence, message.tokens, stop=message.stop, ops=ops)
            case Fill():
                pool, _ = self._pools[message.pool]
                self._ranks.share_rows(pool.rows, message.block_ids)
                pool.decode_rows(message.block_ids)
            case NewPool():
                self._pools[message.pool] = make_backend(
                    message.kernels,
                    self._model.layout,
                    message.num_blocks,
                    self._model.device,
                    reproducible=message.reproducible,
                    takes_payloads=False,
                    decode_steps=message.decode_steps,
                    short_prefills=message.short_prefills,
                )
            case NewWindow():
                self._sequences[message.window] = Sequence([], self._window(message))
            case Drop():
                self._drop(message)

    @property
    def _ops(self) -> Ops:
        """The operations on the newest pool; a worker has only one pool."""
        return next(reversed(self._pools.values()))[1]

    def _run(self, message: RunTokens) -> None:
        pool, ops = self._pools[message.pool]
        self._calls[message.call] = run_tokens(
            self._model,
            pool,
            [(self._sequence(end), tokens) for end, tokens in message.batch],
            logits=cast(Literal["last", "all"], message.logits),
            write_global_kv=message.write_global_kv,
            ops=ops,
        )

    def _sequence(self, end: TableEnd) -> Sequence:
        sequence = self._sequences[end.window]
        sequence.block_table[end.first :] = end.block_ids
        return sequence

    def _window(self, message: NewWindow) -> WindowState:
        layout, device = self._model.layout, self._model.device
        if not message.data:
            return WindowState.zeros(layout, message.position, device)
        window = WindowState.from_bytes(layout, message.position, message.data, device)
        window.cut = message.cut
        return window

    def _drop(self, message: Drop) -> None:
        for number in message.calls:
            self._calls.pop(number, None)  # it may have failed
        for number in message.windows:
            del self._sequences[number]
        for number in message.pools:
            del self._pools[number]
