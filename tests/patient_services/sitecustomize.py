"""Raises time limits for peers in tests: on a busy machine answers are late, and a late answer becomes a miss.

Python imports this file in every process that a test starts, because its folder is on their PYTHONPATH.
tests/conftest.py does the same in the test's own process. Tests of these limits are marked `impatient`.

Processes that a test starts also keep the speeds that they assume at first. If they learnt that a first prompt was
slow, workers would choose another restore plan, and the next prompt would hit less. Tests of learnt speeds run in one
process.
"""

import importlib.abc
import importlib.machinery
import operator
import sys

PATIENCE_S = 120.0
# A process imports for seconds, and on a busy machine for minutes, before it says anything.
START_S = 600.0
# By module: names of constants, and of parameters with a default, of a class or a method.
LIMITS = {
    "antefix.clients.about": ("_DEADLINE_S",),
    "antefix.clients.decode": ("DecodeClient.status.timeout_s",),
    "antefix.clients.fleet": ("FleetClient.status.timeout_s", "FleetClient.explain.timeout_s"),
    "antefix.clients.prefill": ("PrefillClient.status.timeout_s",),
    "antefix.clients.router": ("RouterClient.status.timeout_s",),
    "antefix.clients.window": ("WindowClient.status.timeout_s", "WindowClient.set_strategy.timeout_s"),
    "antefix.discovery.redis_leases": ("_TIMEOUT_S",),
    "antefix.events.follower": ("_PIECE_TIMEOUT_S", "_SILENT_S"),
    "antefix.events.kv_subscriber": ("_REPLY_TIMEOUT_S",),
    "antefix.events.redis_stream": ("_TIMEOUT_S",),
    "antefix.model.arithmetic": ("probe.time_s_max",),
    "antefix.objects.object_reads": ("_DIRECT_S", "_LATE_S"),
    "antefix.objects.signed_ranges": ("_LATE_S", "_OPEN_S"),
    "antefix.pulse": ("LIMIT_S_MAX", "Pulse.silent_s"),
    "antefix.store.breaker": ("Breaker.slack_s",),
    "antefix.store.file_reads": ("FileReads.slack_s", "_READ_S_MAX"),
    "antefix.store.patience": ("FLOOR_S",),
    "antefix.store.payload_reads": ("STREAM_DEADLINE_S",),
    "antefix.store.read_tiers": ("_ALONE_S", "_LATE_S"),
    "antefix.store.remote_store": ("CALL_DEADLINE_S", "SEARCH_DEADLINE_S"),
    "antefix.store.standing": ("ASK_S", "ASK_S_MAX"),
    "antefix.store.store_members": ("_LATE_S_MAX",),
    "antefix.window_pool.redis_pool": ("RedisWindowPool.timeout_s",),
    "antefix_console.deployment": ("START_TIMEOUT_S", "STOP_MARGIN_S"),
    "antefix_decode.grammar_state": ("READY_S_MAX",),
    "antefix_prefill.worker.rank_processes": ("START_S",),
    "antefix_router.chat.template_process": ("ANSWER_S_MAX",),
    "antefix_router.decode_stream": ("SLACK_S",),
    "antefix_router.fleet.openai_door": ("CONNECT_S", "TOKENIZE_S", "_ASK_S"),
    "antefix_router.grammar_check": ("ANSWER_S_MAX", "START_S_MAX"),
    "antefix_router.inflight": ("WAIT_SLACK_S",),
    "antefix_router.key_exchange": ("_TIMEOUT_S",),
    "antefix_router.placement.found_workers": ("_ASK_TIMEOUT_S",),
    "antefix_router.prefill_calls": ("SLACK_S",),
    "antefix_router.shared_bill.bill_exchange": ("_TIMEOUT_S",),
    "antefix_router.workers_arithmetic": ("_ASK_TIMEOUT_S",),
}
SPEEDS = "antefix.linear_law"


def limits_of(module):
    """(dictionary, key, longer limit) of each limit in a module."""
    for limit in LIMITS[module.__name__]:
        owner, _, name = limit.rpartition(".")
        longer_s = START_S if name.startswith("START_") else PATIENCE_S
        yield (_defaults(operator.attrgetter(owner)(module)) if owner else vars(module)), name, longer_s


def _defaults(owner):
    return (owner.__init__ if isinstance(owner, type) else owner).__kwdefaults__


def change(module):
    """Raise the module's limits, or let its laws learn nothing."""
    if module.__name__ == SPEEDS:
        module.LinearLaw.observe = lambda *_: None
        return
    for values, limit, longer_s in limits_of(module):
        values[limit] = longer_s


class PatientModules(importlib.abc.MetaPathFinder):
    """An import finder that changes these modules when they are imported. It imports none of them itself."""

    def find_spec(self, name, path, target=None):
        if name not in LIMITS and name != SPEEDS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_change(module):
                load(module)
                change(module)

            spec.loader.exec_module = load_and_change
        return spec


# If tests/conftest.py imports this file, it changes the modules for each test itself.
if __name__ == "sitecustomize":
    sys.meta_path.insert(0, PatientModules())
