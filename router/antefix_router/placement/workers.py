"""The workers that a router knows, and the load that it has placed on each.

The load counts only the requests of this router. A request's load is added when a request is placed, and subtracted
when that part of the request ends in any way. Nothing else may change a load: a health check that reset a worker's load
would send all requests to that worker.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from antefix.clients import DecodeClient, PrefillClient
from antefix.errors import InternalError, Overloaded, Unavailable
from antefix.events.block_events import Key
from antefix.located import ReadSpeed
from antefix.pulse import Pulse
from antefix_router.placement.backlog import Backlog
from antefix_router.placement.directory import Directory
from antefix_router.placement.loading import loading_tokens
from antefix_router.placement.pace import Pace, without_slow
from antefix_router.placement.work import Loads, Policy, Work, seed_of

# How often one request may move to another worker. If more moves are needed, moving does not solve the problem.
NUM_MOVES_MAX = 3
# The assumed prefill speed until one is measured: slow, like that of a small machine.
TOKENS_PER_S_PRIOR = 1_000.0
# A worker that failed gets no requests for this time, unless there is no other worker.
SHUN_S = 2.0
# The most stores and tiers for which a worker's read speed is kept. So those that no longer exist are forgotten.
_NUM_SPEEDS_MAX = 4096


class WorkerRole(StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"
    # Another engine's worker: a whole engine behind an OpenAI API.
    FOREIGN = "foreign"


@dataclass(slots=True)
class Worker:
    """One worker process and the load that the router placed on it.  num_tokens: tokens of the requests placed and not
    ended.

    arithmetic, setup: the arithmetic and the set-up that the worker reported; empty before its report.
    name: the name in the certificate of the expected process; empty: any process of its role.
    pulse: whether the worker answers, while it is asked (`antefix_router.health`, and `fleet.engines` for workers that
    are not ours).
    probed_at: when a request was last placed there, by the router's clock.
    speeds: its last reported read speed for each store or tier, by name.
    """

    address: str
    role: WorkerRole
    # The client's type depends on the role, which the caller knows.
    client: Any
    num_requests: int = 0
    num_tokens: int = 0
    num_active_tokens: int = 0
    num_served: int = 0
    shunned_until: float = 0.0
    draining: bool = False
    backlog: Backlog = field(default_factory=Backlog)
    seed: int = 0
    arithmetic: str = ""
    setup: str = ""
    name: str = ""
    pulse: Pulse | None = None
    pace: Pace = field(default_factory=Pace)
    probed_at: float = 0.0
    speeds: dict[str, ReadSpeed] = field(default_factory=dict)

    def note_speeds(self, speeds: Mapping[str, ReadSpeed]) -> None:
        """Keep the speeds of reads that the worker reported."""
        self.speeds.update(speeds)
        while len(self.speeds) > _NUM_SPEEDS_MAX:
            del self.speeds[next(iter(self.speeds))]

    def is_shunned(self, now: float) -> bool:
        return now < self.shunned_until

    @property
    def is_silent(self) -> bool:
        """Record that the worker hangs or cannot be reached."""
        return self.pulse is not None and self.pulse.is_silent

    @property
    def answers(self) -> bool | None:
        """Whether the worker answered its last ping; None if it was not pinged."""
        return self.pulse.answers if self.pulse is not None else None

    @property
    def num_returns(self) -> int:
        """How often the worker has begun to answer, for the first time or again."""
        return self.pulse.num_returns if self.pulse is not None else 0

    def guard(self, patience_s: float = 0.0) -> contextlib.AbstractContextManager[None]:
        """Wraps a wait for this worker.  Raises:  Unavailable: the worker has not answered for longer than
        `patience_s`.
        """
        return self.pulse.guard(patience_s) if self.pulse is not None else contextlib.nullcontext()


class LoadPart:
    """The prompt's part of a request's load, which may end before the request does."""

    def __init__(self, worker: Worker, num_tokens: int) -> None:
        self._worker = worker
        self._ticket: int | None = worker.backlog.add(num_tokens, time.monotonic())

    def computed(self) -> None:
        """Record that the worker has computed the prompt, and is free for the next one, because its first token
        came.
        """
        self.end(done=True)

    def end(self, *, done: bool) -> None:
        if self._ticket is not None:
            self._worker.backlog.remove(self._ticket, time.monotonic(), done=done)
        self._ticket = None


class Workers:
    """All workers of one role, placed by one policy."""

    def __init__(self, role: WorkerRole, policy: Policy, addresses: Sequence[str] = ()) -> None:
        self.role = role
        self.workers: list[Worker] = []
        # Counts since the start: requests placed, requests placed again after a worker failed, and calls by how they
        # ended.
        self.num_placed = {"first": 0, "again": 0}
        self.num_ended = {"done": 0, "unavailable": 0, "overloaded": 0, "failed": 0, "cancelled": 0}
        self._policy = policy
        for address in addresses:
            self.join(address)

    def join(self, address: str, *, name: str = "") -> Worker:
        """Add a worker. A worker that is known already, such as one that was draining, keeps its state."""
        worker = self.find(address)
        if worker is None:
            client_type = PrefillClient if self.role is WorkerRole.PREFILL else DecodeClient
            client = client_type(address, name=name)
            worker = Worker(address=address, role=self.role, client=client, seed=seed_of(address), name=name)
            self.workers.append(worker)
        worker.draining = False
        return worker

    def add(self, worker: Worker) -> None:
        """Add a worker that already has its client."""
        self.workers.append(worker)

    def leave(self, address: str) -> None:
        """Place nothing there any more. The requests that run on a removed worker end normally."""
        self.workers = [worker for worker in self.workers if worker.address != address]

    def find(self, address: str) -> Worker | None:
        return next((worker for worker in self.workers if worker.address == address), None)

    def has_another(self, tried: Collection[str], fits: Callable[[Worker], bool] = lambda worker: True) -> bool:
        """Whether a request tried at these addresses may move to another worker that fits. A worker that failed may
        have been removed since.
        """
        return len(tried) < NUM_MOVES_MAX and any(
            worker.address not in tried and fits(worker) for worker in self.workers
        )

    def may_help(self, late: Worker, tried: Collection[str]) -> bool:
        """Whether the request of a late worker can move: another worker answers and has no more work."""
        return len(tried) < NUM_MOVES_MAX and any(
            worker.address not in tried
            and not (worker.is_silent or worker.draining or worker.is_shunned(time.monotonic()))
            and worker.num_requests <= late.num_requests
            for worker in self.workers
        )

    def num_running_least(self) -> int:
        """The number of requests on the worker with the fewest."""
        return min((worker.num_requests for worker in self.workers), default=0)

    def place(
        self,
        work: Work,
        directory: Directory,
        keys: Sequence[Key],
        block_size: int,
        exclude: frozenset[str],
        *,
        hint: str = "",
        soon: tuple[str, int] | None = None,
    ) -> Worker:
        """Choose a worker for this prompt by the policy. A worker that failed or drains is chosen only if there is no
        other worker.

        hint: the address of the conversation's last worker; decides among equals.  soon: the worker that is computing
        the prompt's beginning, and how many blocks of it.
        Raises:  Unavailable: there is none besides the excluded ones.
        """
        workers = self.fit(self.workers, exclude)
        self.num_placed["again" if exclude else "first"] += 1
        if len(workers) == 1:
            return _placed(workers[0])
        resident = directory.leading([worker.address for worker in workers], keys) * block_size
        soon_tokens = (soon[0], soon[1] * block_size) if soon else None
        return self.choose(workers, work, resident, hint=hint, soon=soon_tokens)

    def fit(self, workers: Sequence[Worker], exclude: frozenset[str]) -> Sequence[Worker]:
        """The workers that may be chosen.  Raises:  Unavailable: there is no worker besides the excluded ones."""
        now = time.monotonic()
        workers = [worker for worker in workers if worker.address not in exclude] if exclude else workers
        workers = [worker for worker in workers if not worker.draining] or workers
        workers = [worker for worker in workers if not worker.is_silent] or workers
        workers = [worker for worker in workers if now >= worker.shunned_until] or workers
        if not workers:
            raise Unavailable(f"no {self.role} worker is left to try for this request")
        return without_slow(workers, now)

    def choose(
        self,
        workers: Sequence[Worker],
        work: Work,
        resident_tokens: npt.NDArray[np.int64],
        *,
        far_tokens: npt.NDArray[np.int64] | None = None,
        hint: str = "",
        soon: tuple[str, int] | None = None,
    ) -> Worker:
        """Choose among these workers by the policy.  resident_tokens: tokens of the prompt in each worker's memory.
        far_tokens: see `Loads`.  soon: as in `place`, but in tokens.
        """
        loads = loads_of(workers, resident_tokens, time.monotonic())
        loads.far_tokens = far_tokens
        loads.loading_tokens = self._loading(workers, work, resident_tokens)
        loads.hinted = _row_of(hint, workers)
        if soon is not None and soon[1]:
            loads.leading = _row_of(soon[0], workers)
            loads.soon_tokens = min(soon[1], work.num_tokens - 1)
        return _placed(workers[self._policy.choose(work, loads)])

    def tokens_per_s(self) -> float:
        """The measured prefill speed of one worker, on average."""
        speeds = [worker.backlog.tokens_per_s for worker in self.workers if worker.backlog.tokens_per_s]
        return sum(speeds) / len(speeds) if speeds else TOKENS_PER_S_PRIOR

    def _loading(
        self, workers: Sequence[Worker], work: Work, resident_tokens: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float64] | None:
        """None: the router does not know which store holds which blocks, or no worker has reported read speeds."""
        if not work.places or not any(worker.speeds for worker in workers):
            return None
        rate = self.tokens_per_s()
        rows = zip(workers, resident_tokens.tolist(), strict=True)
        return np.array([loading_tokens(work, resident, worker.speeds, rate) for worker, resident in rows])

    @contextlib.contextmanager
    def load(self, worker: Worker, num_tokens: int, *, num_active_tokens: int = 0) -> Iterator[LoadPart]:
        """Count a request on the worker while the block runs: its tokens of work, and the length of its prompt."""
        worker.num_requests += 1
        worker.num_tokens += num_tokens
        worker.num_active_tokens += num_active_tokens
        part = LoadPart(worker, num_tokens)
        done, ended = False, "cancelled"
        try:
            yield part
            ended = "done"
            # A decode worker runs all sequences at once, so the duration of one does not show how much work the others
            # have left.
            done = self.role is WorkerRole.PREFILL
        except (Unavailable, InternalError) as err:
            worker.shunned_until = time.monotonic() + SHUN_S
            ended = "unavailable" if isinstance(err, Unavailable) else "failed"
            raise
        except Overloaded:
            ended = "overloaded"
            raise
        except Exception:
            ended = "failed"
            raise
        finally:
            part.end(done=done)
            worker.num_requests -= 1
            worker.num_tokens -= num_tokens
            worker.num_active_tokens -= num_active_tokens
            worker.num_served += 1
            self.num_ended[ended] += 1


def _placed(worker: Worker) -> Worker:
    worker.probed_at = time.monotonic()
    return worker


def _row_of(address: str, workers: Sequence[Worker]) -> int:
    return next((row for row, worker in enumerate(workers) if worker.address == address), -1) if address else -1


def loads_of(workers: Sequence[Worker], resident_tokens: npt.NDArray[np.int64], now: float) -> Loads:
    """The workers as placement sees them."""
    rows = np.array([(w.num_requests, w.num_served, w.num_active_tokens) for w in workers], np.int64).reshape(-1, 3)
    return Loads(
        seeds=np.array([worker.seed for worker in workers], np.uint64),
        pending_tokens=np.array([worker.backlog.pending_tokens(now) for worker in workers], np.float64),
        active_tokens=rows[:, 2].astype(np.float64),
        num_requests=rows[:, 0],
        resident_tokens=resident_tokens,
        num_served=rows[:, 1],
        shunned=np.zeros(len(workers), np.bool_),
    )
