"""Follows the workers' health. A draining worker gets no new work, a worker that died has lost its memory, and the
router does not wait for a worker that gives no sign of life.

The router keeps a health watch and a pulse for each worker (grpc.health.v1). Health watches and pulses guide placement,
and end the wait for a worker that hangs. Whether a call to a worker fails is known only by calling.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from functools import partial

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from antefix import rpc
from antefix.end_tasks import end_tasks
from antefix.keep_running import keep_running
from antefix.pulse import Pulse, health_question
from antefix.security.identity import Role
from antefix_router.placement.directory import Directory
from antefix_router.placement.workers import Worker, Workers

log = logging.getLogger("antefix.router")

# The interval at which an unreachable worker is tried again.
_RETRY_S = 1.0


class HealthWatch:
    """Keeps the state `draining` of all workers up to date. `follow` must be called whenever workers come or go."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._tasks: dict[str, asyncio.Task[None]] = {}
        # Watches of workers that left.
        self._ending: set[asyncio.Task[None]] = set()

    def follow(self, groups: tuple[Workers, ...]) -> None:
        """Watch these workers, and no others."""
        known = {worker.address: worker for group in groups for worker in group.workers}
        for address in set(self._tasks) - set(known):
            self._end(self._tasks.pop(address))
        for address in set(known) - set(self._tasks):
            self._tasks[address] = keep_running(partial(self._watch, known[address]), "the health watch", of=address)

    async def close(self) -> None:
        tasks = [*self._tasks.values(), *self._ending]
        self._tasks.clear()
        await end_tasks(tasks)

    def _end(self, task: asyncio.Task[None]) -> None:
        task.cancel()
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def _watch(self, worker: Worker) -> None:
        async with rpc.channel(worker.address, of=Role(worker.role.value), name=worker.name) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            worker.pulse = Pulse(f"the {worker.role} worker at {worker.address}", health_question(channel))
            worker.pulse.start()
            try:
                await self._follow(worker, stub)
            finally:
                await worker.pulse.close()

    async def _follow(self, worker: Worker, stub: health_pb2_grpc.HealthStub) -> None:
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError):
                # No deadline: a watch lasts as long as the worker, and keepalive detects the end.
                async for answer in stub.Watch(health_pb2.HealthCheckRequest(service="")):
                    draining = answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
                    if draining != worker.draining:
                        log.info("worker %s %s", worker.address, "drains" if draining else "serves")
                    worker.draining = draining
            # The process is gone or unreachable, so the directory forgets what it held in memory.
            self._directory.forget(worker.address)
            await asyncio.sleep(_RETRY_S)
