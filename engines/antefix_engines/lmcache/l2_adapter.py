"""The class that LMCache's plug-in adapter loads: its L2 interface over Antefix's store.

LMCache names an object by a hash of its tokens, model, rank, object group and cache_salt. LMCache tells neither which
object precedes another nor how an object is laid out. So each object of LMCache is stored as one record, without a
change. The record's name also includes the revision of the weights, which LMCache's name lacks. LMCache's calls return
at once; a few threads do the work, and an event fd signals when it is done.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from lmcache.lmcache_native import Bitmap
from lmcache.v1.distributed.internal_api import L2StoreResult
from lmcache.v1.distributed.l2_adapters.base import L2AdapterInterface
from lmcache.v1.platform import create_event_notifier

from antefix.block import Family, Fingerprint, HashKind
from antefix.errors import ConfigError, InvalidRequest
from antefix_engines.engine_layout import EngineLayout
from antefix_engines.engine_store import EngineStore, KvOfModel, StoreSettings

log = logging.getLogger("antefix.engines.lmcache")
_NUM_THREADS: Final = 4
# How long an object is protected from eviction after its lookup; a load follows within seconds.
LOCK_S: Final = 60.0
_LAYOUT: Final = EngineLayout(engine="lmcache", family=Family.OPAQUE, block_size=1, block=())


class AntefixL2Adapter(L2AdapterInterface):  # type: ignore[misc]
    """params: where the store is (`StoreSettings`), `weights_revision` and, if wanted, `namespace`.

    Raises:  ConfigError: a setting that is missing, unknown or impossible.
    """

    def __init__(self, params: dict[str, Any], l1_memory_desc: Any = None) -> None:
        super().__init__()
        rest = dict(params)
        revision, namespace = rest.pop("weights_revision", ""), rest.pop("namespace", "default")
        if not revision:
            raise ConfigError(
                "adapter_params: weights_revision is missing; give the checkpoint's revision, such as its commit"
            )
        self.store: Final = EngineStore.open(StoreSettings.from_mapping(rest))
        fingerprint = Fingerprint(
            weights_revision=str(revision),
            geometry=_LAYOUT,
            kv_format="as-given",
            tokenizer="",
            arithmetic="lmcache",
            namespace=str(namespace),
            family=Family.OPAQUE,
            hash_kind=HashKind.ENGINE_KEY,
        )
        self._kv: Final[KvOfModel] = self.store.kv(fingerprint, _LAYOUT)
        self._threads: Final = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="antefix-lmcache")
        self._lock: Final = threading.Lock()
        self._done: Final[dict[str, dict[int, Any]]] = {"store": {}, "lookup": {}, "load": {}}
        self._fds: Final = {kind: create_event_notifier() for kind in self._done}
        self._locks: Final[Counter[bytes]] = Counter()
        self._last_task = 0
        self._is_closed = False

    def get_store_event_fd(self) -> int:
        return int(self._fds["store"].fileno())

    def get_lookup_and_lock_event_fd(self) -> int:
        return int(self._fds["lookup"].fileno())

    def get_load_event_fd(self) -> int:
        return int(self._fds["load"].fileno())

    def submit_store_task(self, keys: list[Any], objects: list[Any]) -> int:
        return self._submit("store", lambda: self._store(keys, objects), L2StoreResult(False, 0))

    def pop_completed_store_tasks(self) -> dict[int, L2StoreResult]:
        with self._lock:
            done, self._done["store"] = self._done["store"], {}
        return done

    def submit_lookup_and_lock_task(self, keys: list[Any], group_layout_descs: dict[int, Any]) -> int:
        return self._submit("lookup", lambda: self._look_up(keys), Bitmap(len(keys)))

    def query_lookup_and_lock_result(self, task_id: int) -> Bitmap | None:
        with self._lock:
            return self._done["lookup"].pop(task_id, None)

    def submit_unlock(self, keys: list[Any]) -> None:
        names = self._names(keys)
        with self._lock:
            self._locks.subtract(names)
            free = [name for name in dict.fromkeys(names) if self._locks[name] <= 0]
            for name in free:
                del self._locks[name]
            if not self._is_closed:
                # If this fails, the lock expires by itself after LOCK_S.
                self._threads.submit(self._kv.pin, free, 0.0)

    def submit_load_task(self, keys: list[Any], objects: list[Any]) -> int:
        return self._submit("load", lambda: self._load(keys, objects), Bitmap(len(keys)))

    def query_load_result(self, task_id: int) -> Bitmap | None:
        with self._lock:
            return self._done["load"].pop(task_id, None)

    def delete(self, keys: list[Any]) -> None:
        """Done in the calling thread: LMCache deletes objects to make room, and retries if there is none."""
        self._kv.evict(self._names(keys))

    def report_status(self) -> dict[str, Any]:
        counters = dataclasses.asdict(self.store.counters)
        return {"is_healthy": not self._is_closed, "type": type(self).__name__, **counters}

    def close(self) -> None:
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        self._threads.shutdown()
        self.store.close()
        for notifier in self._fds.values():
            notifier.close()

    def _submit(self, kind: str, work: Callable[[], Any], otherwise: Any) -> int:
        """otherwise: the answer of a task that failed, because LMCache waits for an answer."""
        with self._lock:
            self._last_task += 1
            task = self._last_task
            if self._is_closed:
                raise ConfigError("the adapter is closed")
            self._threads.submit(self._run, kind, task, work, otherwise)
        return task

    def _run(self, kind: str, task: int, work: Callable[[], Any], otherwise: Any) -> None:
        try:
            answer = work()
        except Exception:
            # Without an answer LMCache would wait for ever.
            log.exception("a task of LMCache of the kind %s failed", kind)
            answer = otherwise
        with self._lock:
            self._done[kind][task] = answer
        self._fds[kind].notify()

    def _store(self, keys: Sequence[Any], objects: Sequence[Any]) -> L2StoreResult:
        payloads, names = [_bytes_of(each) for each in objects], self._names(keys)
        if len(payloads) != len(names):
            raise InvalidRequest(f"{len(names)} keys but {len(payloads)} objects")
        # Objects that are stored already are neither written nor counted again.
        new = [index for index, name in enumerate(names) if not self._kv.lookup([name]).num_blocks]
        stored = self._kv.put_each([self._kv.block(names[i], self._kv.root, 1, payloads[i]) for i in new])
        good = [index for index, is_stored in zip(new, stored, strict=True) if is_stored]
        sizes = [payloads[index].nbytes for index in good]
        if good:
            self._notify_keys_stored([keys[index] for index in good], sizes)
        return L2StoreResult(len(good) == len(new), sum(sizes))

    def _look_up(self, keys: Sequence[Any]) -> Bitmap:
        found, names = Bitmap(len(keys)), self._names(keys)
        held = []
        for index, name in enumerate(names):
            if self._kv.lookup([name]).num_blocks:
                found.set(index)
                held.append(name)
        with self._lock:
            self._locks.update(held)
        self._kv.pin(held, LOCK_S)
        return found

    def _load(self, keys: Sequence[Any], objects: Sequence[Any]) -> Bitmap:
        loaded = Bitmap(len(keys))
        good = []
        for index, (name, each) in enumerate(zip(self._names(keys), objects, strict=True)):
            if self._kv.get_blocks([name], [_bytes_of(each)]):
                loaded.set(index)
                good.append(keys[index])
        if good:
            self._notify_keys_accessed(good)
        return loaded

    def _names(self, keys: Sequence[Any]) -> list[bytes]:
        return [self._kv.hash_of(_name_of(key)) for key in keys]


def _name_of(key: Any) -> bytes:
    """A name from all fields of an ObjectKey, including fields that a later LMCache adds, so that distinct keys stay
    distinct.
    """
    values = {field.name: getattr(key, field.name) for field in dataclasses.fields(key)}
    fields = {name: value.hex() if isinstance(value, bytes) else value for name, value in values.items()}
    return json.dumps(fields, sort_keys=True).encode()


def _bytes_of(memory_object: Any) -> memoryview:
    return memoryview(memory_object.byte_array).cast("B")
