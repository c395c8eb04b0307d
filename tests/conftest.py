"""Fixtures that several test folders share, and the rule that keeps `make test-fast` fast.

A test that starts a process is marked `services`, uses a fixture of PROCESS_FIXTURES or lies in a folder of
PROCESS_FOLDERS. Any other test that starts a process fails, so nobody slows down the fast run without noticing.
Heavy modules are imported only when a test needs them.
"""

import gc
import os
import platform
import random
import shutil
import subprocess
import sys
import time
import warnings
import zlib
from importlib.metadata import version
from pathlib import Path

import certifi
import pytest
from hypothesis import settings

from antefix.security import own_credentials
from tests.on_demand import OnDemand
from tests.patient_services import sitecustomize
from tests.redis_servers import redis, shared_redis, start_cluster, start_redis
from tests.role_forks import RoleForks
from tests.running_deployment import _deployment_of_all, running
from tests.slow_cases import SlowTest

__all__ = ["_deployment_of_all", "redis", "running", "shared_redis", "start_cluster", "start_redis"]

# Services set this umask too. Tests write secrets, keys and stores, which are refused if everybody can read them.
os.umask(0o077)
# Triton reads this when it is first imported, by us or by transformers: without a card the kernels' tests
# run in its interpreter.
HAS_CARD = Path("/dev/nvidiactl").exists()
if not HAS_CARD:
    os.environ.setdefault("TRITON_INTERPRET", "1")

# If there is room, tests' files lie in memory. No test cuts the power, and on a disk each sync would take time.
MEMORY = Path("/dev/shm")
if os.access(MEMORY, os.W_OK | os.X_OK) and shutil.disk_usage(MEMORY).free > 4 << 30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))

# Every run draws the same numbers, so that none fails by chance. With TEST_SEED it draws others, and hypothesis new
# examples.
TEST_SEED = os.environ.get("TEST_SEED", "")

# hypothesis's limit of 200 ms per example says nothing about the code on a machine that others use too. All runs draw
# the same examples, so more of them would find nothing new. A test may set its own number of examples.
settings.register_profile("antefix", deadline=None, derandomize=not TEST_SEED, max_examples=25)
# A run with the long tests draws new examples each time.
settings.register_profile("long", settings.get_profile("antefix"), derandomize=False, max_examples=200)


# Imported and collected objects never become garbage, but each pass of the garbage collector would look at all of them.
# That takes a quarter of the collection's time, and 0.1 s per pass afterwards.
gc.disable()


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


_role_forks = RoleForks()


def pytest_configure(config):
    settings.load_profile("antefix" if "not long" in config.option.markexpr else "long")
    if not HAS_CARD:
        _role_forks.install()


def pytest_unconfigure():
    _role_forks.close()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Seed the random generators with the test's name, so that a test draws the same numbers whatever ran before it."""
    seed = zlib.crc32(f"{TEST_SEED}{item.nodeid}".encode())
    random.seed(seed)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(seed)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(seed)


@pytest.fixture(autouse=True)
def own_credentials_of_each_test():
    """Reset the credentials that a command in this process presents to services, so that each test uses its own."""
    found, own = list(own_credentials._find), list(own_credentials._own)
    yield
    own_credentials._find[:], own_credentials._own[:] = found, own


@pytest.fixture
def open_umask():
    """The umask of most machines, under which code must explicitly make a file private."""
    before = os.umask(0o022)
    yield
    os.umask(before)


# Fixtures that start services, Redis or another Python. A test that uses one is marked `services` automatically.
PROCESS_FIXTURES = {
    "running",
    "deploy",
    "redis",
    "shared_redis",
    "start_cluster",
    "start_redis",
    "small_filesystem",
    "small_disk",
    "disk",
    "measured",
    "plots",
}
PROCESS_FOLDERS = {"e2e", "wheel"}
# `make test-fast` runs no test of these folders and does not import them.
NOT_FAST_FOLDERS = PROCESS_FOLDERS | {"environments", "hosts", "page"}

# `platform` runs `uname` once per process. Call it here, so that no test is blamed for that process.
platform.processor()

# numpy's test helpers run `lscpu` when they are imported, and transformers imports them in the middle of a test.
if version("numpy").startswith("2.1."):
    import numpy.testing  # noqa: F401


def compiles(item):
    """Whether the test may start Triton's assembler, which runs on a card for each kernel that is not compiled yet."""
    return HAS_CARD and (item.get_closest_marker("gpu") is not None or item.path.parent.name == "kernels")


def _refuse(*_, **__):
    raise RuntimeError("this test starts a process: mark it with @pytest.mark.services")


# Each HTTP client would load the system's 140 trusted authorities, which takes 40 ms. Tests only talk to this host.
NO_AUTHORITY = Path(__file__).with_name("no_authority.pem")
# Markers of tests that `make test-fast` leaves out. Its tests take under 1 s on an idle machine, under 5 s on a busy
# one.
NOT_FAST = ("slow", "services", "long", "gpu", "browser", "hosts", "engines", "upgrade")
FAST_TEST_S = 5.0


def pytest_ignore_collect(collection_path, config):
    if "not services" in config.option.markexpr and collection_path.name in NOT_FAST_FOLDERS:
        return collection_path.parent == Path(__file__).parent or None
    return None


def pytest_collection_modifyitems(items):
    for item in items:
        if PROCESS_FIXTURES.intersection(item.fixturenames) or item.path.parent.name in PROCESS_FOLDERS:
            item.add_marker(pytest.mark.services)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    with pytest.MonkeyPatch.context() as patch:
        is_patient = item.get_closest_marker("impatient") is None
        if is_patient:
            wait_longer_for_peers(patch)
        _role_forks.are_used = is_patient and item.get_closest_marker("whole_starts") is None
        if item.get_closest_marker("services") is None and not compiles(item):
            patch.setattr(subprocess.Popen, "__init__", _refuse)
            patch.setenv("SSL_CERT_FILE", str(NO_AUTHORITY))
            patch.setattr(certifi, "where", lambda: str(NO_AUTHORITY))
        return (yield)


def wait_longer_for_peers(patch):
    """Set longer time limits for peers in this process, and in processes that a test starts."""
    for module in sitecustomize.LIMITS.keys() & sys.modules.keys():
        for values, limit, longer_s in sitecustomize.limits_of(sys.modules[module]):
            patch.setitem(values, limit, longer_s)
    patch.setenv("PYTHONPATH", str(Path(sitecustomize.__file__).parent), prepend=os.pathsep)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item):
    before_s = time.process_time() - OnDemand.spent_s
    result = yield
    check_fast(item, time.process_time() - OnDemand.spent_s - before_s)
    return result


def check_fast(item, used_s):
    """Fail a test that is too slow.  used_s: processor time.

    A busy machine doubles it, so only `make test-fast` fails.
    """
    if used_s > FAST_TEST_S and not any(item.get_closest_marker(marker) for marker in NOT_FAST):
        warnings.warn(
            f"{item.nodeid} took {used_s:.1f} s of processor time: make it cheaper, or mark it with @pytest.mark.slow",
            SlowTest,
            stacklevel=2,
        )


@pytest.fixture
def plots():
    """For a test that plots. In its first run on a machine, matplotlib starts a process to list the fonts."""
    pytest.importorskip("matplotlib")


@pytest.fixture(scope="session")
def models():
    """The shipped model, loaded once for each KV format that is asked for."""
    from antefix.layout import KVFormat
    from tests import engines

    class Loaded(dict):
        def __missing__(self, kv_format):
            self[kv_format] = engines.load(KVFormat(kv_format))
            return self[kv_format]

    return Loaded()


@pytest.fixture
def store():
    from tests.engines import MemoryStore

    return MemoryStore()


@pytest.fixture
def make_engine(models, store):
    """Make engines that share one store, as workers do."""
    from tests import engines

    made = []

    def make(strategy="boundary", kv_format="fp8", num_blocks=128, prefill_chunk=256, priors=None):
        engine = engines.build(
            models[kv_format],
            store,
            strategy=strategy,
            num_blocks=num_blocks,
            prefill_chunk=prefill_chunk,
            priors=priors,
        )
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.compute.close()


@pytest.fixture
def make_prompt():
    from tests.engines import prompt_of

    return prompt_of
