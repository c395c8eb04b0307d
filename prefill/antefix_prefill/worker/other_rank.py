"""The process of a rank other than rank 0: joins the other ranks, loads its share, and runs what rank 0 sends.

`rank_processes` starts it with one end of a socket, over which all messages come. When the socket closes, however rank
0 ended, this process ends too, at most `END_S` seconds later, whatever it is waiting for. This process ignores signals,
which only rank 0 handles: a supervisor that signals every process must not end a rank while requests are drained.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import torch

from antefix.model import Model, probe
from antefix.model.follower import CallFailed, Follower
from antefix.telemetry.logs import set_up_logs
from antefix_prefill.worker.join_ranks import join_ranks

END_S: Final = 10.0
# Sent to ranks on all of which a call has failed.
CARRY_ON: Final = "carry on"

log = logging.getLogger("antefix_prefill.ranks")


@dataclass(frozen=True, slots=True, kw_only=True)
class Join:
    """The number of this rank, and the number of ranks. rendezvous: a file where all ranks meet. threads: for torch."""

    rank: int
    size: int
    device: str
    rendezvous: Path
    timeout_s: float
    threads: int
    log_level: str
    log_format: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadShare:
    """`load(ranks=..., device=..., **settings)` gives this rank's share of a model; an earlier share is dropped."""

    load: Callable[..., Model]
    settings: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """Run `antefix.model.probe` with these settings."""

    settings: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Up:
    """An answer to rank 0.  text: for `failed` the reason, for `measured` the arithmetic's name.  num_exchanges: the
    number of exchanges so far.
    """

    what: str
    text: str = ""
    num_exchanges: int = 0


class _OfRank(logging.Filter):
    """Adds the rank's number to each log line."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank

    def filter(self, record: logging.LogRecord) -> bool:
        record.rank = self._rank
        return True


def main() -> None:
    """Serve rank 0 until it is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    rank_0 = Connection(int(sys.argv[1]))
    inbox: queue.Queue[Any] = queue.Queue()
    threading.Thread(target=_read, args=(rank_0, inbox), daemon=True).start()
    rank_0.send(Up(what="started"))
    status = 0
    try:
        _serve(rank_0, inbox)
    except BaseException as err:
        status = 1
        log.critical("this rank ends: %s", err, exc_info=err)
        try:
            rank_0.send(Up(what="failed", text=f"{type(err).__name__}: {err}"))
        except OSError:
            log.info("rank 0 is gone")
    logging.shutdown()
    # Not a normal exit of the interpreter: a GPU's library might wait there for ranks that are gone.
    os._exit(status)


def _read(rank_0: Connection, inbox: queue.Queue[Any]) -> None:
    """Read every message at once, so that rank 0 never waits for this rank to read."""
    try:
        while True:
            inbox.put(rank_0.recv())
    except (EOFError, OSError):
        inbox.put(None)
        timer = threading.Timer(END_S, os._exit, (1,))
        timer.daemon = True
        timer.start()


def _may_carry_on(inbox: queue.Queue[Any]) -> bool:
    """Whether rank 0 tells this rank to continue after a call that failed here. If the call did not fail on rank 0,
    rank 0 sends nothing.
    """
    try:
        return bool(inbox.get(timeout=END_S / 2) == CARRY_ON)
    except queue.Empty:
        return False


def _serve(rank_0: Connection, inbox: queue.Queue[Any]) -> None:
    join: Join | None = inbox.get()
    if join is None:
        return
    set_up_logs(join.log_level, join.log_format)
    for handler in logging.getLogger().handlers:
        handler.addFilter(_OfRank(join.rank))
    torch.set_num_threads(join.threads)
    ranks = join_ranks(join.rank, join.size, join.device, rendezvous=join.rendezvous, timeout_s=join.timeout_s)
    rank_0.send(Up(what="joined"))
    follower: Follower | None = None
    model: Model | None = None
    while (told := inbox.get()) is not None:
        match told:
            case LoadShare(load=load, settings=settings):
                # Free the memory of the old model before the next one is loaded.
                follower = model = None
                model = load(ranks=ranks, device=join.device, **settings)
                follower = Follower(model, ranks)
                log.info("this rank's share of the model, one of %d shares, is loaded onto %s", join.size, join.device)
                rank_0.send(Up(what="loaded"))
            case Measure(settings=settings):
                assert model is not None
                measured = probe(model, **settings)
                model.threads_are_free = measured.ignores_threads
                rank_0.send(Up(what="measured", text=measured.name))
            case list():
                assert follower is not None
                try:
                    follower.do(told)
                except CallFailed as err:
                    rank_0.send(Up(what="call failed", text=str(err), num_exchanges=ranks.time.num_exchanges))
                    # If the call did not fail on rank 0, rank 0 waits for this rank, which must end.
                    if not _may_carry_on(inbox):
                        raise
