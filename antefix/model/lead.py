"""Rank 0's side of a model over several ranks: it sends each call to the other ranks, and then runs it itself.

The model's own functions send calls to the other ranks where `Model.lead` is set. So callers of the model see one
model, one pool and one set of sequences. Calls are checked before they are sent, so a faulty request is refused on rank
0 alone. A call that fails later may leave the ranks in different states; then `on_broken` must end them.

The lead belongs to one thread at a time, as pools do.
"""

from __future__ import annotations

import collections
import collections.abc
import contextlib
import itertools
import weakref
from collections.abc import Callable, Iterator
from types import TracebackType

import numpy as np
import torch

from antefix.errors import InternalError
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
    Tokens,
)
from antefix.model.ranks import Ranks
from antefix.model.window_state import Sequence, WindowState


class LeadCall:
    """One `run_tokens` on all ranks. Inside this object's `with` block, rank 0 runs the call. While this object is
    held, more tokens of the call may be kept.
    """

    def __init__(self, lead: Lead, number: int, context: contextlib.AbstractContextManager[None]) -> None:
        self.number = number
        self._lead = lead
        self._context = context

    def __enter__(self) -> LeadCall:
        self._context.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._context.__exit__(kind, err, trace)

    def keep(self, number: int | None, count: int | None = None) -> None:
        """`Ran.keep` for sequence `number` of the call; None: for all sequences. Sent with the next call."""
        self._lead.post(Keep(call=self.number, number=number, count=count))

    def follow(self, number: int, window: WindowState, tokens: Tokens, stop: int) -> None:
        """`antefix.model.follow_ran`."""
        told = FollowRan(call=self.number, number=number, window=self._lead.known(window), tokens=tokens, stop=stop)
        self._lead.post(told)


class Lead:
    """send: sends messages to the other ranks, in order, without waiting.  on_broken: called with the reason when the
    ranks' states may differ.  has_failed_everywhere: called when a call has failed here; returns whether it has failed
    on all other ranks at the same exchange.
    """

    def __init__(
        self,
        ranks: Ranks,
        send: Callable[[list[Message]], None],
        on_broken: Callable[[BaseException], None],
        has_failed_everywhere: Callable[[], bool] = lambda: False,
    ) -> None:
        self.ranks = ranks
        self._send = send
        self._on_broken = on_broken
        self._has_failed_everywhere = has_failed_everywhere
        self._numbers = itertools.count(1)
        self._waiting: list[Message] = []
        self._pools: weakref.WeakKeyDictionary[BlockPool, int] = weakref.WeakKeyDictionary()
        self._windows: weakref.WeakKeyDictionary[WindowState, int] = weakref.WeakKeyDictionary()
        # For each window state's sequence, the part of its block table that the other ranks have: how many blocks, and
        # the last one.
        self._tables: dict[int, tuple[int, int]] = {}
        # Numbers of objects that Python has collected, in whichever thread that was; a deque allows this.
        self._gone: collections.deque[tuple[str, int]] = collections.deque()

    def add_pool(
        self, pool: BlockPool, *, kernels: str, reproducible: bool, decode_steps: str, short_prefills: str
    ) -> None:
        """From now on every rank has a pool of the same shape as this one."""
        number = self._pools[pool] = next(self._numbers)
        pool.lead = self
        weakref.finalize(pool, self._gone.append, ("pools", number))
        self.post(
            NewPool(
                pool=number,
                num_blocks=pool.num_blocks,
                kernels=kernels,
                reproducible=reproducible,
                decode_steps=decode_steps,
                short_prefills=short_prefills,
            )
        )

    def run(
        self,
        pool: BlockPool,
        batch: collections.abc.Sequence[tuple[Sequence, Tokens]],
        *,
        logits: str,
        write_global_kv: bool,
    ) -> LeadCall:
        """`run_tokens` on all ranks. The call of the model must have been checked before."""
        told = [(self._table_end(sequence), np.asarray(tokens, np.uint32)) for sequence, tokens in batch]
        number = next(self._numbers)
        self.post(
            RunTokens(call=number, pool=self._pool(pool), batch=told, logits=logits, write_global_kv=write_global_kv)
        )
        call = LeadCall(self, number, self._told(pool.rows.device))
        weakref.finalize(call, self._gone.append, ("calls", number))
        return call

    @contextlib.contextmanager
    def replay(self, pool: BlockPool, sequence: Sequence, tokens: Tokens, stop: int) -> Iterator[None]:
        """`replay` on all ranks. The call of the model must have been checked before."""
        end = self._table_end(sequence)
        self.post(Replay(pool=self._pool(pool), sequence=end, tokens=np.asarray(tokens, np.uint32), stop=stop))
        with self._told(pool.rows.device):
            yield

    @contextlib.contextmanager
    def draft(self, windows: collections.abc.Sequence[WindowState], next_tokens: list[int]) -> Iterator[None]:
        """`draft_logits` on all ranks."""
        self.post(Draft(windows=[self.known(window) for window in windows], next_tokens=list(next_tokens)))
        with self._told(windows[0].window.device):
            yield

    def fill(self, pool: BlockPool, block_ids: list[int]) -> None:
        """Send these rows of `pool`, which were filled on rank 0, to the other ranks."""
        self.post(Fill(pool=self._pool(pool), block_ids=block_ids))
        with self._told(pool.rows.device, counts=False):
            self.ranks.share_rows(pool.rows, block_ids)

    def post(self, message: Message) -> None:
        """Send this message to the other ranks together with the next call."""
        self._waiting.append(message)

    def known(self, window: WindowState) -> int:
        """The number that stands for a window state in messages to other ranks. Sends the window state as it is now, if
        the other ranks do not have it yet.
        """
        number = self._windows.get(window)
        if number is None:
            number = self._windows[window] = next(self._numbers)
            weakref.finalize(window, self._gone.append, ("windows", number))
            data = window.to_bytes() if window.position else b""
            self.post(NewWindow(window=number, position=window.position, cut=window.cut, data=data))
        return number

    @contextlib.contextmanager
    def _told(self, device: torch.device, *, counts: bool = True) -> Iterator[None]:
        """Send all waiting messages. While rank 0 works inside this context, the other ranks do the same work."""
        messages, self._waiting = self._waiting, []
        if self._gone:
            messages.append(self._drop())
        timed = self.ranks.time.call(device) if counts else contextlib.nullcontext()
        try:
            with timed:
                self._send(messages)
                yield
        except Exception as err:
            # If the call failed on every rank, their states are still equal.
            if not counts or not self._has_failed_everywhere():
                self._on_broken(err)
            raise
        except BaseException as err:
            self._on_broken(err)
            raise

    def _drop(self) -> Drop:
        gone: dict[str, list[int]] = {"pools": [], "windows": [], "calls": []}
        while self._gone:
            kind, number = self._gone.popleft()
            gone[kind].append(number)
        for number in gone["windows"]:
            self._tables.pop(number, None)
        return Drop(**gone)

    def _pool(self, pool: BlockPool) -> int:
        number = self._pools.get(pool)
        if number is None:
            raise InternalError(
                "a model over several ranks needs pools that its lead knows: make a pool with make_backend(lead=...)"
            )
        return number

    def _table_end(self, sequence: Sequence) -> TableEnd:
        number, table = self.known(sequence.window), sequence.block_table
        first, last = self._tables.get(number, (0, -1))
        if first > len(table) or (first and table[first - 1] != last):
            first = 0
        self._tables[number] = (len(table), table[-1] if table else -1)
        return TableEnd(window=number, first=first, block_ids=table[first:])
