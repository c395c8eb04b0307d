"""SGLang's classes for the tests: the small stand-in, or SGLang itself if ANTEFIX_SGLANG_REAL is set."""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import os
import sys
from types import SimpleNamespace
from unittest import mock

IS_REAL = bool(os.environ.get("ANTEFIX_SGLANG_REAL"))
# SGLang imports these modules for images. The tests do not need them, and their wheels do not load with PyTorch for
# CPUs.
_IMAGES = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional", "torchvision.io")


def _real():
    import transformers

    # transformers checks whether torchvision is installed. It must check before a stand-in replaces torchvision.
    assert transformers.AutoProcessor
    for name in _IMAGES:
        module = mock.MagicMock(name=name)
        module.__spec__, module.__path__ = importlib.machinery.ModuleSpec(name, None), []
        sys.modules.setdefault(name, module)
    storage = importlib.import_module("sglang.srt.mem_cache.hicache_storage")
    pools = importlib.import_module("sglang.srt.mem_cache.memory_pool_host")
    factory = importlib.import_module("sglang.srt.mem_cache.storage").StorageBackendFactory
    hashes = importlib.import_module("sglang.srt.mem_cache.utils").get_storage_hash_str
    return storage, pools, factory, hashes


@contextlib.contextmanager
def world():
    """storage: the interface's module.  pools: the module of host pools.  factory: None in the stand-in."""
    if IS_REAL:
        storage, pools, factory, hashes = _real()
        hicache = importlib.import_module("antefix_engines.sglang.hicache")
        yield SimpleNamespace(storage=storage, pools=pools, factory=factory, hashes=hashes, hicache=hicache)
        return
    from tests.foreign_engines import sglang_stand_in as small

    with small.stand_in():
        hicache = importlib.import_module("antefix_engines.sglang.hicache")
        yield SimpleNamespace(
            storage=small, pools=small, factory=None, hashes=small.get_storage_hash_str, hicache=hicache
        )
