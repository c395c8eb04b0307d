"""The engines of a fleet: their addresses, their KV events, their health, and the models that they serve."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import zmq.asyncio

from antefix.checked_files import read_text
from antefix.end_tasks import end_tasks
from antefix.errors import AntefixError
from antefix.events.kv_sockets import CurveKey, check_public_key, guard_client
from antefix.events.kv_subscriber import KvSubscriber
from antefix.keep_running import keep_running
from antefix.pulse import Pulse
from antefix_router.fleet.engine_index import EngineIndex, GoneBlocks
from antefix_router.fleet.fleet_config import EnginePlace, FleetConfig
from antefix_router.fleet.fleet_names import FleetNames
from antefix_router.fleet.openai_door import OpenAIDoor, ServedModel, http_client
from antefix_router.placement.directory import Directory
from antefix_router.placement.work import seed_of
from antefix_router.placement.workers import Worker, WorkerRole, Workers

log = logging.getLogger("antefix.fleet")

# How often to ask for the models, because a worker may load another adapter while it runs.
_MODELS_S: Final = 30.0


@dataclass(slots=True)
class HitCounters:
    """What one engine's answers reported, compared with what the router expected from its directory. All numbers are
    tokens, except for the first three counters.

    num_answers: complete answers. num_unreported: those of them without a count of hits. num_other_prompts: those whose
    prompt had another length than the router counted. lost: tokens expected and not reported. found: tokens reported
    and not expected.
    """

    num_answers: int = 0
    num_unreported: int = 0
    num_other_prompts: int = 0
    expected: int = 0
    reported: int = 0
    lost: int = 0
    found: int = 0


@dataclass(slots=True, eq=False)
class Engine:
    """One cache of the fleet. is_up: whether it answered when it was last asked."""

    place: EnginePlace
    door: OpenAIDoor
    index: EngineIndex
    subscriber: KvSubscriber | None
    models: tuple[ServedModel, ...] = ()
    is_up: bool = False
    hits: HitCounters = field(default_factory=HitCounters)

    @property
    def tells(self) -> bool:
        """Whether the directory is up to date with this engine's events. If the directory is not up to date, the router
        guesses which blocks the engine holds.
        """
        return self.subscriber is not None and self.subscriber.in_step

    def serves(self, model: str) -> bool:
        return any(each.name == model for each in self.models)


def engine_of(worker: Worker) -> Engine:
    assert isinstance(worker.client, Engine)
    return worker.client


class Engines:
    """All engines of a fleet. workers: the object that is told which engines are up."""

    def __init__(self, config: FleetConfig, workers: Workers, directory: Directory, names: FleetNames) -> None:
        """Raises:  ConfigError: a key cannot be read. This does not connect to any engine yet."""
        self._config = config
        self._workers = workers
        self._directory = directory
        self._http = http_client(_api_key(config.worker_key_file))
        self._context = zmq.asyncio.Context()
        self._key = CurveKey.from_file(config.events_key_file) if config.events_key_file else None
        self._tasks: list[asyncio.Task[None]] = []
        self.gone = GoneBlocks()
        self.engines: list[Engine] = []
        for place in config.places():
            index = EngineIndex(place.address, directory, names, gone=self.gone)
            engine = Engine(
                place=place,
                door=OpenAIDoor(place, self._http),
                index=index,
                subscriber=self._subscriber(place, index) if place.events else None,
            )
            self.engines.append(engine)
            workers.add(
                Worker(
                    address=place.address,
                    role=WorkerRole.FOREIGN,
                    client=engine,
                    seed=seed_of(place.address),
                    draining=True,
                    # `_look` asks, because one address may have several ranks.
                    pulse=Pulse(place.address, engine.door.check_health, every_s=config.health_s),
                )
            )

    def _subscriber(self, place: EnginePlace, index: EngineIndex) -> KvSubscriber:
        guard = lambda socket: None  # noqa: E731
        if place.events_key and self._key is not None:
            guard = partial(guard_client, key=self._key, server=check_public_key(place.events_key))
        return KvSubscriber(
            place.events, index, self._context, replay=place.replay, topic=self._config.events_topic, guard=guard
        )

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """All block sizes in use. For an engine that has not reported a block size, the size in the settings."""
        return tuple(dict.fromkeys(self.block_size(engine) for engine in self.engines))

    def block_size(self, engine: Engine) -> int:
        return engine.index.block_size or self._config.block_size

    @property
    def models(self) -> tuple[ServedModel, ...]:
        """The models of the whole fleet, by name."""
        found = {model.name: model for engine in self.engines for model in engine.models}
        return tuple(found.values())

    async def start(self) -> None:
        """Ask all workers once about their models and health, then follow them until `close`."""
        await asyncio.gather(*(self._look(engines) for engines in self._by_url()))
        for engine in self.engines:
            if engine.subscriber is not None:
                self._tasks.append(asyncio.create_task(engine.subscriber.run()))
        self._tasks += [
            keep_running(partial(self._watch, engines), "the health watch", of=engines[0].place.address)
            for engines in self._by_url()
        ]

    async def close(self) -> None:
        await end_tasks(self._tasks)
        await self._http.aclose()
        self._context.destroy(linger=0)

    def _by_url(self) -> list[list[Engine]]:
        found: dict[str, list[Engine]] = {}
        for engine in self.engines:
            found.setdefault(engine.place.url, []).append(engine)
        return list(found.values())

    async def _watch(self, engines: Sequence[Engine]) -> None:
        """Watch the health of one worker, with all its ranks."""
        asked_s = 0.0
        clock = asyncio.get_running_loop().time
        while True:
            await asyncio.sleep(self._config.health_s)
            is_due = clock() - asked_s >= _MODELS_S or not engines[0].models
            if await self._look(engines, models=is_due or not engines[0].is_up) and is_due:
                asked_s = clock()

    async def _look(self, engines: Sequence[Engine], *, models: bool = True) -> bool:
        door, found = engines[0].door, engines[0].models
        try:
            await door.check_health()
            if models:
                found = await door.models()
            is_up = True
        except AntefixError as err:
            is_up = False
            if engines[0].is_up or not self._tasks:
                log.warning("worker %s: %s", engines[0].place.address, err)
        for engine in engines:
            engine.models = found
            worker = self._workers.find(engine.place.address)
            if worker is not None and worker.pulse is not None:
                worker.pulse.heard(reachable=is_up)
            if is_up != engine.is_up:
                self._turn(engine, is_up)
            if not is_up:
                self._forget_gone(engine)
        return is_up

    def _turn(self, engine: Engine, is_up: bool) -> None:
        engine.is_up = is_up
        worker = self._workers.find(engine.place.address)
        if worker is not None:
            worker.draining = not is_up
        log.info("worker %s %s", engine.place.address, "serves" if is_up else "is down")

    def _forget_gone(self, engine: Engine) -> None:
        # The process may be gone, and its cache with it. If its events still arrive, it is alive and only slow.
        if engine.subscriber is None:
            self._directory.forget(engine.place.address)
        elif not engine.subscriber.in_step and len(engine.index):
            engine.subscriber.forget()


# The longest key. A longer file is not a key file.
_KEY_BYTES_MAX: Final = 65_536


def _api_key(path: str) -> str:
    if not path:
        return ""
    return read_text(path, "--worker-key-file", bytes_max=_KEY_BYTES_MAX).strip()
