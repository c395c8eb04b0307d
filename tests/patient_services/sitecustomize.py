"""Raises time limits for peers in tests: on a busy machine answers are late, and a late answer becomes a miss.

Python imports this file in every process that a test starts, because its folder is on their PYTHONPATH.
tests/conftest.py does the same in the test's own process. Tests of these limits are marked `impatient`.
"""

import importlib.abc
import importlib.machinery
import sys

PATIENCE_S = 120.0
# By module: names of constants, and of class parameters with a default.
LIMITS = {
    "antefix.pulse": ("LIMIT_S_MAX", "Pulse.silent_s"),
    "antefix.store.breaker": ("Breaker.slack_s",),
    "antefix.store.file_reads": ("FileReads.slack_s", "_READ_S_MAX"),
    "antefix.store.remote_store": ("CALL_DEADLINE_S", "SEARCH_DEADLINE_S"),
    "antefix.store.standing": ("ASK_S", "ASK_S_MAX"),
    "antefix.window_pool.redis_pool": ("RedisWindowPool.timeout_s",),
}


def limits_of(module):
    """(dictionary, key) of each limit in a module."""
    for limit in LIMITS[module.__name__]:
        owner, _, name = limit.rpartition(".")
        yield (getattr(module, owner).__init__.__kwdefaults__ if owner else vars(module)), name


class PatientModules(importlib.abc.MetaPathFinder):
    """An import finder that changes these modules when they are imported. It imports none of them itself."""

    def find_spec(self, name, path, target=None):
        if name not in LIMITS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_wait_longer(module):
                load(module)
                for values, limit in limits_of(module):
                    values[limit] = PATIENCE_S

            spec.loader.exec_module = load_and_wait_longer
        return spec


# If tests/conftest.py imports this file, it changes the modules for each test itself.
if __name__ == "sitecustomize":
    sys.meta_path.insert(0, PatientModules())
