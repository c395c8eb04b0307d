"""A deployment whose roles call each other through our proxies, which can delay, cut and reset connections."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Sequence
from pathlib import Path

from antefix_console.deployment import Deployment, DeploymentConfig, RoleProcess
from tests.redis_servers import RedisServer

_PIECE = 65536


class Link:
    """A proxy in front of one role. delay_s: delay of each piece, both ways.  is_cut: neither data nor closes pass."""

    def __init__(self) -> None:
        self.delay_s = 0.0
        self.is_cut = False
        self.target = ""
        self.address = ""
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accepted, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        self.reset()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def reset(self) -> None:
        """End all connections, as a network router does when it restarts."""
        for writer in list(self._writers):
            writer.transport.abort()

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = self.target.rpartition(":")
        try:
            to_reader, to_writer = await asyncio.open_connection(host, int(port))
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, to_writer}
        for source, sink in ((reader, to_writer), (to_reader, writer)):
            task = asyncio.create_task(self._pass(source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pass(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while piece := await source.read(_PIECE):
                while self.is_cut:  # noqa: ASYNC110 - by hand
                    await asyncio.sleep(0.05)
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                sink.write(piece)
                await sink.drain()
        self._writers.discard(sink)
        sink.transport.abort()


class LinkedDeployment(Deployment):
    """The other services know each service by its proxy's address, which stays the same when the service restarts
    elsewhere.
    """

    def __init__(self, config: DeploymentConfig, redis: RedisServer | None = None, *, lasts_s: float) -> None:
        """redis: the server that the services use, which faults can stop and wipe.  lasts_s: how long a lasting fault
        lasts after the first answer.
        """
        super().__init__(config)
        self.lasts_s = lasts_s
        self.redis = redis
        self.links: dict[str, Link] = {}
        self._numbers_of = itertools.count()

    async def start_role(
        self, role: str, flags: Sequence[str], *, last: Sequence[str] = (), log_path: Path | None = None
    ) -> RoleProcess:
        known = next((link for link in self.links.values() if link.address in last), None)
        if known is not None:
            last = [flag if flag != known.address else "127.0.0.1:0" for flag in last]
        started = await super().start_role(role, flags, last=last, log_path=log_path)
        link = known or Link()
        link.target = started.address
        if known is None:
            await link.start()
            self.links[f"{role}-{next(self._numbers_of)}"] = link
        started.address = link.address
        return started

    def links_of(self, role: str) -> list[Link]:
        return [link for name, link in self.links.items() if name.startswith(f"{role}-")]

    async def close_links(self) -> None:
        for link in self.links.values():
            await link.close()
