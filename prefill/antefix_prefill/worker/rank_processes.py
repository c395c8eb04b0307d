"""The other ranks of a worker: starts a process for each rank, loads the model over all of them, and ends the worker if
one dies.

    rank 0 (the worker: services, pool's bookkeeping, store)  --socket each-->  other_rank 1 .. N-1
        all ranks                                             <--NCCL or gloo-->  all ranks

Rank 0 tells the other ranks what to run (`antefix.model.lead`); they answer only while they start. A dead rank cannot
be replaced, because it held its part of the sequences' state. So the whole worker ends at once, with the reason in its
log. Routers treat it like any dead worker: they retry requests, or continue them, on other workers.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, Final

import torch

from antefix.errors import ConfigError
from antefix.host_limits import usable_cores
from antefix.model import Arithmetic, Model
from antefix.model.lead import Lead
from antefix.model.rank_messages import Message
from antefix_prefill.worker.join_ranks import device_of, join_ranks, part_ranks
from antefix_prefill.worker.other_rank import CARRY_ON, END_S, Join, LoadShare, Measure, Up

log = logging.getLogger("antefix_prefill.ranks")

EXIT_LOST: Final = 70
# Importing torch takes seconds, more on a busy machine. Loading has no time limit as long as the processes live.
START_S: Final = 120.0
# If a call fails on all ranks they report it within moments; a rank that did not fail waits at the next exchange.
FAILED_S: Final = 3.0
# Not `-m`: pickled messages name their class's module, and with `-m` that would be `__main__`.
_STARTED: Final = ("-P", "-c", "from antefix_prefill.worker.other_rank import main; main()")


def end_process(reason: str) -> None:
    """End this process, whatever its threads are waiting for, because a rank is lost."""
    log.critical("%s; this worker ends", reason)
    logging.shutdown()
    os._exit(EXIT_LOST)


class RankProcesses:
    """`size` processes that run one model; this process is rank 0. `close` ends the others.

    device: "cpu", or "cuda" for GPUs 0 to size - 1.  threads: torch's threads in each rank; 0: the cores, divided.
    timeout_s: the longest that a rank waits for another one in an exchange.
    on_lost: called once, from a separate thread, when a rank has ended or its state may differ from the others'.
    Raises:  ConfigError: not enough GPUs, or a rank did not start; nothing is left running then.
    """

    def __init__(
        self,
        size: int,
        *,
        device: str = "cpu",
        threads: int = 0,
        timeout_s: float = 300.0,
        on_lost: Callable[[str], None] = end_process,
    ) -> None:
        self.device = device_of(0, size, device)
        devices = [device_of(rank, size, device) for rank in range(1, size)]
        threads = threads or max(1, usable_cores() // size)
        torch.set_num_threads(threads)
        self._on_lost = on_lost
        # While the ranks start, errors are raised in the call that waits for them, and `on_lost` is not called.
        self._is_starting = True
        self._is_closing = False
        self._lost = ""
        self._mutex = threading.Lock()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._sockets: list[socket.socket] = []
        self._connections: list[Connection] = []
        self._answers: list[queue.SimpleQueue[Up]] = []
        # Kept as long as the ranks live, because NCCL's watchdog reads it.
        self._directory = tempfile.TemporaryDirectory(prefix="antefix-ranks-")
        try:
            for _ in devices:
                self._start_one()
            self._await("started", START_S)
            level = logging.getLevelName(logging.getLogger("antefix").getEffectiveLevel()).lower()
            meet = Path(self._directory.name) / "meet"
            for rank, (connection, where) in enumerate(zip(self._connections, devices, strict=True), 1):
                connection.send(
                    Join(
                        rank=rank,
                        size=size,
                        device=where,
                        rendezvous=meet,
                        timeout_s=timeout_s,
                        threads=threads,
                        log_level=level,
                        log_format=_log_format(),
                    )
                )
            self.ranks = join_ranks(0, size, self.device, rendezvous=meet, timeout_s=timeout_s)
            self._await("joined", timeout_s)
        except BaseException:
            self.close()
            raise

    def load(self, load: Callable[..., Model], **settings: Any) -> Model:
        """Call `load(ranks=..., device=..., **settings)` on every rank. Returns this rank's share of the model.

        load: a module-level function, which each process imports.
        Raises:  ConfigError: another rank could not load its share.  Whatever `load` raises here.
        """
        self._is_starting = True
        for connection in self._connections:
            connection.send(LoadShare(load=load, settings=settings))
        model = load(ranks=self.ranks, device=self.device, **settings)
        self._await("loaded", None)
        model.lead = Lead(self.ranks, self._send, self._broken, self._has_failed_everywhere)
        self._end_of_start()
        return model

    def start_measuring(self, **settings: Any) -> None:
        """Start a probe with these settings on every other rank, while this one probes too."""
        self._is_starting = True
        for connection in self._connections:
            connection.send(Measure(settings=settings))

    def check_measured(self, measured: Arithmetic) -> None:
        """Check that every rank has this rank's arithmetic. Raises: ConfigError: one rank has another arithmetic, or
        died.
        """
        names = [answer.text for answer in self._await("measured", None)]
        for rank, name in enumerate(names, 1):
            if name != measured.name:
                raise ConfigError(
                    f"rank {rank} computes with {name}, but rank 0 with {measured.name}: all ranks need the "
                    "same kind of card and the same number of threads"
                )
        self._end_of_start()

    @property
    def pids(self) -> list[int]:
        """Process ids of the other ranks."""
        return [process.pid for process in self._processes]

    def close(self) -> None:
        """End the other ranks; those that do not end by themselves are killed."""
        self._is_closing = True
        for each in self._sockets:
            # Not `close`, which would wait for the thread that reads from the socket.
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        deadline = time.monotonic() + END_S
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                log.warning("the process of a rank, pid %d, did not end and is killed", process.pid)
                process.kill()
                process.wait()
        if hasattr(self, "ranks"):
            part_ranks(self.ranks)
        self._directory.cleanup()

    def _start_one(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, *_STARTED, str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                # To stderr, because the program that started the worker reads the worker's stdout.
                stdout=2,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            )
        self._processes.append(process)
        self._sockets.append(ours)
        self._connections.append(Connection(os.dup(ours.fileno())))
        self._answers.append(queue.SimpleQueue())
        rank = len(self._processes)
        threading.Thread(target=self._watch, args=(rank,), name=f"rank {rank}", daemon=True).start()

    def _watch(self, rank: int) -> None:
        """Read a rank's messages until the rank ends; before `close` its end is an error."""
        connection, answers = self._connections[rank - 1], self._answers[rank - 1]
        reason = ""
        try:
            while True:
                said: Up = connection.recv()
                if said.what == "failed":
                    reason = f"rank {rank} failed: {said.text}"
                else:
                    answers.put(said)
        except (EOFError, OSError):
            pass  # the rank has ended, which is reported below
        except Exception as err:  # noqa: BLE001 - reported below; otherwise rank 0 would wait for this rank for ever
            reason = f"rank {rank} sent what cannot be read: {type(err).__name__}: {err}"
        if self._is_closing:
            return
        process = self._processes[rank - 1]
        reason = reason or f"rank {rank} (pid {process.pid}) died with status {process.wait()}"
        answers.put(Up(what="failed", text=reason))
        self._lose(reason)

    def _await(self, what: str, timeout_s: float | None) -> list[Up]:
        """Each rank's answer. Raises:  ConfigError: a rank failed, or did not answer within `timeout_s`."""
        found = []
        for rank, answers in enumerate(self._answers, 1):
            try:
                answer = answers.get(timeout=timeout_s)
            except queue.Empty as err:
                raise ConfigError(f"rank {rank} did not start within {timeout_s:.0f} s") from err
            if answer.what == "failed":
                raise ConfigError(answer.text)
            assert answer.what == what, f"rank {rank} said {answer.what}, not {what}"
            found.append(answer)
        return found

    def _send(self, messages: list[Message]) -> None:
        data = ForkingPickler.dumps(messages)
        for connection in self._connections:
            connection.send_bytes(data)

    def _has_failed_everywhere(self) -> bool:
        """Whether the call failed on all other ranks too, after as many exchanges; if so, all ranks continue."""
        deadline = time.monotonic() + FAILED_S
        for answers in self._answers:
            try:
                said = answers.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return False
            if said.what != "call failed" or said.num_exchanges != self.ranks.time.num_exchanges:
                return False
        for connection in self._connections:
            connection.send(CARRY_ON)
        return True

    def _broken(self, err: BaseException) -> None:
        """A call that was sent to the other ranks failed on this rank. The other ranks wait for this rank, or are ahead
        of it in the call.
        """
        # If a rank died, its reason arrives within a moment; until then only its absence is known.
        time.sleep(0.5)
        self._lose(f"a call over {self.ranks.size} ranks failed on rank 0: {type(err).__name__}: {err}")

    def _end_of_start(self) -> None:
        """From now on a lost rank is reported at once."""
        with self._mutex:
            self._is_starting = False
        if self._lost:
            self._on_lost(self._lost)

    def _lose(self, reason: str) -> None:
        with self._mutex:
            if self._lost or self._is_closing:
                return
            self._lost = reason
            is_starting = self._is_starting
        if not is_starting:
            self._on_lost(reason)


def _log_format() -> str:
    from antefix.telemetry.logs import JsonFormatter

    handlers = logging.getLogger().handlers
    return "json" if any(isinstance(handler.formatter, JsonFormatter) for handler in handlers) else "text"
