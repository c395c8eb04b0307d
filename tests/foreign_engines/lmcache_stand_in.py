"""A small stand-in for the parts of LMCache that the L2 adapter uses. Names and signatures are LMCache 0.5.6's:
`test_lmcache_adapter.py` compares them with LMCache itself in the environment that `make test-engines` makes.
"""

from __future__ import annotations

import contextlib
import os
import sys
import types
from abc import ABC, abstractmethod
from dataclasses import dataclass


@dataclass(frozen=True)
class ObjectKey:
    chunk_hash: bytes
    model_name: str
    kv_rank: int
    object_group_id: int = 0
    cache_salt: str = ""


class Bitmap:
    def __init__(self, size: int):
        self._bits = [False] * size

    def set(self, index):
        self._bits[index] = True

    def test(self, index):
        return self._bits[index]


class L2StoreResult(int):
    def __new__(cls, success, bytes_transferred):
        return super().__new__(cls, bytes_transferred if success else -1)

    def is_successful(self):
        return int(self) >= 0

    def bytes_transferred(self):
        return max(int(self), 0)


class EventNotifier:
    def __init__(self):
        self._fd = os.eventfd(0, os.EFD_NONBLOCK)

    def fileno(self):
        return self._fd

    def notify(self):
        os.eventfd_write(self._fd, 1)

    def consume(self):
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._fd)

    def close(self):
        os.close(self._fd)


def create_event_notifier():
    return EventNotifier()


class L2AdapterInterface(ABC):
    def __init__(self, max_capacity_bytes=0):
        self.stored, self.accessed = [], []

    @abstractmethod
    def get_store_event_fd(self): ...

    @abstractmethod
    def get_lookup_and_lock_event_fd(self): ...

    @abstractmethod
    def get_load_event_fd(self): ...

    @abstractmethod
    def submit_store_task(self, keys, objects): ...

    @abstractmethod
    def pop_completed_store_tasks(self): ...

    @abstractmethod
    def submit_lookup_and_lock_task(self, keys, group_layout_descs): ...

    @abstractmethod
    def query_lookup_and_lock_result(self, task_id): ...

    @abstractmethod
    def submit_unlock(self, keys): ...

    @abstractmethod
    def submit_load_task(self, keys, objects): ...

    @abstractmethod
    def query_load_result(self, task_id): ...

    @abstractmethod
    def close(self): ...

    def delete(self, keys):
        return None

    def report_status(self):
        return {"is_healthy": True}

    def _notify_keys_stored(self, keys, sizes):
        self.stored += keys

    def _notify_keys_accessed(self, keys):
        self.accessed += keys


_MODULES = {
    "lmcache.lmcache_native": (Bitmap,),
    "lmcache.v1.distributed.internal_api": (L2StoreResult,),
    "lmcache.v1.distributed.l2_adapters.base": (L2AdapterInterface,),
    "lmcache.v1.platform": (create_event_notifier,),
}


@contextlib.contextmanager
def stand_in():
    """Within this context `lmcache` is importable. Modules that were imported on top of it are dropped afterwards."""
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "lmcache"}
    for name in ("lmcache", "lmcache.v1", "lmcache.v1.distributed", "lmcache.v1.distributed.l2_adapters", *_MODULES):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = []
    for name, kinds in _MODULES.items():
        for kind in kinds:
            setattr(sys.modules[name], kind.__name__, kind)
    try:
        yield
    finally:
        for name in list(sys.modules):
            if name.split(".")[0] == "lmcache" or name == "antefix_engines.lmcache.l2_adapter":
                del sys.modules[name]
        sys.modules.update(before)
