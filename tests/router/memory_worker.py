"""A worker's memory without a worker: names are added and removed, and a real service sends the events."""

import hashlib

from antefix import rpc
from antefix.events.block_events import keys_of
from antefix.events.memory_log import MemoryLog
from antefix.v1 import memory_pb2
from antefix_prefill.worker.memory_service import add_memory_service


def names_of(prefix, count):
    return [hashlib.blake2b(f"{prefix}/{index}".encode(), digest_size=32).digest() for index in range(count)]


class Memory:
    """held: names in the order of their arrival. They are leading parts of chains, as in a worker's memory."""

    def __init__(self, **options):
        self.held = {}
        self.log = MemoryLog(lambda: self.held, **options)

    def store(self, names):
        for name in names:
            if name not in self.held:
                self.held[name] = None
                self.log.stored(name)

    def evict(self, names):
        for name in names:
            if name in self.held:
                del self.held[name]
                self.log.evicted(name)

    def num_leading(self, names):
        return next((index for index, name in enumerate(names) if name not in self.held), len(names))


class Worker:
    """A memory with a real server. `restart` acts like a new process at the same address with empty memory."""

    def __init__(self, **options):
        self.options = options
        self.memory = Memory(**options)
        self.server = None

    @property
    def address(self):
        return self.server.address

    async def start(self, address="127.0.0.1:0"):
        log = self.memory.log
        self.server = await rpc.start_server(
            address, lambda server: add_memory_service(log, server), [memory_pb2.DESCRIPTOR]
        )
        return self

    async def stop(self):
        await self.server.drain(0)

    async def restart(self):
        address = self.address
        await self.stop()
        self.memory = Memory(**self.options)
        await self.start(address)


def leading(directory, address, names):
    return int(directory.leading([address], keys_of(names))[0])
