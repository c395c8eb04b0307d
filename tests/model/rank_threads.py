"""A model over several ranks in one process, in which each further rank is a thread. Exchanges still use gloo."""

from __future__ import annotations

import contextlib
import datetime
import queue
import threading
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

from antefix.model import Model
from antefix.model.follower import Follower
from antefix.model.lead import Lead
from antefix.model.rank_messages import Message
from antefix.model.ranks import Ranks
from tests.waiting import AT_MOST_S


@contextlib.contextmanager
def over_ranks(size: int, load: Callable[[Ranks], Model]) -> Iterator[tuple[Model, list[Follower]]]:
    """Rank 0's share of a model. Rank 0 leads; `load` makes each rank's share; other ranks' errors are raised here."""
    store = dist.HashStore()
    inboxes: list[queue.Queue[list[Message] | None]] = [queue.Queue() for _ in range(size - 1)]
    followers: list[Follower] = []
    errors: list[BaseException] = []
    ready = threading.Barrier(size, timeout=AT_MOST_S)

    def connect(rank: int) -> Ranks:
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(interface="lo")]
        options._timeout = datetime.timedelta(seconds=AT_MOST_S)
        return Ranks(rank=rank, size=size, group=dist.ProcessGroupGloo(store, rank, size, options))

    def follow(rank: int) -> None:
        try:
            ranks = connect(rank)
            follower = Follower(load(ranks), ranks)
            followers.append(follower)
            ready.wait()
            while (messages := inboxes[rank - 1].get()) is not None:
                follower.do(messages)
        except BaseException as err:
            errors.append(err)

    threads = [threading.Thread(target=follow, args=(rank,), daemon=True) for rank in range(1, size)]
    for thread in threads:
        thread.start()
    ranks = connect(0)
    model = load(ranks)
    ready.wait()

    def send(messages: list[Message]) -> None:
        for inbox in inboxes:
            inbox.put(messages)

    model.lead = Lead(ranks, send, errors.append)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield model, followers
    finally:
        torch.set_num_threads(threads_before)
        for inbox in inboxes:
            inbox.put(None)
        for thread in threads:
            thread.join(AT_MOST_S)
    assert not errors, errors
