"""Runs all roles on one machine as separate processes: for `antefix up`, the demo and the end-to-end tests.

    kvstore -> prefill, decode -> router      each role is told the addresses of those before it

A service prints its address to stdout once it serves. The stdin of a service is a pipe from this process, so the
service ends when this process ends, in any way.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import itertools
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO

from antefix.clients import RouterClient
from antefix.config import GRACE_S, flags_of, require
from antefix.errors import AntefixError, ConfigError, Unavailable
from antefix.host_limits import address_space_limit_bytes, usable_cores
from antefix.own_files import put_aside
from antefix.private_file import DIRECTORY_MODE, FILE_MODE, open_private, write_private
from antefix.secret import Keyring, create_secret_file
from antefix.security import own_credentials
from antefix.security.credentials import Credentials
from antefix.security.identity import Role
from antefix.security.listening import parse_address
from antefix.worker_settings import NAMING, WorkerSettings

# In the data directory: workers' measurements at their starts, and the name of the last workers' arithmetic.
ARITHMETIC_DIR = "arithmetic"
ARITHMETIC_FILE = "arithmetic.txt"
# up.lock is locked while a deployment runs here; the other file tells Prometheus where its roles are.
LOCK_FILE = "up.lock"
METRICS_TARGETS_FILE = "metrics-targets.json"
# The settings by which the routers of the last start rendered prompts.
DOOR_FILE = "door.json"
# The key that the store is encrypted with, if it is encrypted.
STORE_KEY_FILE = "store.key"
# For temporary files, where the system has no place for them.
TEMPORARY_DIR = "tmp"
START_TIMEOUT_S = 120.0
# Time that a role needs after the grace period to end what runs and to write what it holds in memory.
STOP_MARGIN_S = 20.0
_TELL_EVERY_S = 10.0
_LOG_TAIL_BYTES = 2000
_LOG_BYTES_MAX = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentConfig(WorkerSettings):
    """The settings of a deployment: those of the workers, and the following.

    data_dir: directory for the secret, the store, the bill and the logs; made if it does not exist.
    http_address: address of the HTTP API; empty for none. Only the first router gets the addresses set here.
    ratecards, tenants_file: docs/BILLING.md; without them nothing costs anything.
    api_keys_file, keys_redis: docs/SECURITY.md, "Keys".
    anchors: where routers' ledgers are anchored.
    bill_redis: billing data that several routers share (docs/BILLING.md, "Several routers").
    encrypt: encrypt the store with the key in data_dir/store.key, which is made if it does not exist.
    chat_format, model_aliases, prefix_rules: docs/HTTP_API.md.
    grace_s: how long running requests may continue after a stop.
    log_level, log_format, traces: docs/OPERATIONS.md, "Watching".
    store_bytes: disk budget per store, such as "64G"; empty for the store's default.
    block_ttl_s, checkpoint_ttl_s: lifetime of records after their last use, in seconds; None: the store's default.
    num_stores: stores, each as if on its own host; workers and routers are assigned to them in turn (docs/STORES.md).
    object_store: URL of the object tier; with `encrypt` it is encrypted with the same key (docs/OBJECT_STORE.md).
    Raises:  ConfigError: too few processes of a role, or window settings that are invalid or contradict each other.
    """

    model: Path
    data_dir: Path
    num_prefill: int = 1
    num_decode: int = 1
    num_routers: int = 1
    num_stores: int = 1
    object_store: str = ""
    store_bytes: str = ""
    block_ttl_s: float | None = None
    checkpoint_ttl_s: float | None = None
    router_address: str = "127.0.0.1:0"
    http_address: str = ""
    ratecards: tuple[str, ...] = ()
    tenants_file: str = ""
    api_keys_file: str = ""
    keys_redis: str = ""
    bill_redis: str = ""
    anchors: tuple[str, ...] = ()
    encrypt: bool = False
    chat_format: str = "auto"
    model_aliases: str = ""
    prefix_rules: str = ""
    grace_s: float = GRACE_S
    log_level: str = "info"
    log_format: str = "text"
    traces: str = ""
    extra_flags: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        WorkerSettings.__post_init__(self)
        for name in ("num_prefill", "num_decode"):
            require(getattr(self, name) >= 0, f"{name} must not be negative, is {getattr(self, name)}")
        require(self.grace_s >= 0, f"grace_s must not be negative, is {self.grace_s}")
        for name in ("block_ttl_s", "checkpoint_ttl_s"):
            ttl_s = getattr(self, name)
            require(ttl_s is None or ttl_s >= 0, f"{name} must not be negative, is {ttl_s}")
        require(self.num_stores > 0, f"num_stores must be at least 1, is {self.num_stores}")
        require(self.num_routers > 0, f"num_routers must be at least 1, is {self.num_routers}")
        # The router would refuse them too, once all workers have started.
        for flag, address in (("--address", self.router_address), ("--http-address", self.http_address)):
            try:
                parse_address(address or "127.0.0.1:0")
            except ConfigError as err:
                raise ConfigError(f"{flag}: {err}") from err

    @property
    def store_dir(self) -> Path:
        return self.data_dir / "store"

    def store_dir_of(self, number: int) -> Path:
        """The directory of a store; stores are numbered from 0."""
        return self.store_dir if not number else self.data_dir / f"store-{number + 1}"

    @property
    def ledger_dir(self) -> Path:
        """The first router's ledger."""
        return self.data_dir / "ledger"

    def ledger_dir_of(self, number: int) -> Path:
        """The ledger of a router; routers are numbered from 0."""
        return self.ledger_dir if not number else self.data_dir / f"ledger-{number + 1}"

    @property
    def usage_log_dir(self) -> Path:
        """The store's own log of hits and writes, with which the ledger is reconciled."""
        return self.data_dir / "usage-log"

    def usage_log_dir_of(self, number: int) -> Path:
        return self.usage_log_dir if not number else self.data_dir / f"usage-log-{number + 1}"


@dataclass(slots=True)
class RoleProcess:
    """One running service. flags: the flags that it was started with."""

    role: str
    process: asyncio.subprocess.Process
    address: str
    log_path: Path
    flags: tuple[str, ...] = ()
    http_address: str = ""
    metrics_address: str = ""
    ledger_dir: Path | None = None

    @property
    def alive(self) -> bool:
        return self.process.returncode is None

    @property
    def serves(self) -> bool:
        """Whether the process lives and has announced its address."""
        return self.alive and bool(self.address)


class Deployment:
    """`async with Deployment(config) as deployment:` starts everything, and stops everything at the end."""

    def __init__(self, config: DeploymentConfig, tell: Callable[[str], None] = lambda _: None) -> None:
        """tell: called every 10 s with a text that says what the start waits for."""
        self.config = config
        self._tell = tell
        self.processes: list[RoleProcess] = []
        self._client: RouterClient | None = None
        self._credentials: Credentials | None = None
        # A counter, because roles that start together would see the same number of processes, and share a log file.
        self._numbers = itertools.count()
        # Chooses the store that is on the next worker's host.
        self._turns = itertools.count()
        self._stores: list[RoleProcess] = []
        self._stop_by = 0.0
        self._lock: IO[str] | None = None

    async def __aenter__(self) -> Deployment:
        try:
            await self.start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    def reload(self) -> None:
        """Make the routers read tenants, rate cards and the receipt key again."""
        for process in self.processes:
            if process.role == "router" and process.alive:
                process.process.send_signal(signal.SIGHUP)

    @property
    def router(self) -> RouterClient:
        """A client of the present router, which is closed together with the deployment."""
        address = self.one("router").address
        if self._client is None or self._client.address != address:
            self._client = RouterClient(address, credentials=self._credentials)
        return self._client

    def one(self, role: str) -> RoleProcess:
        """The first process of this role that serves."""
        return next(process for process in self.processes if process.role == role and process.serves)

    def addresses(self, role: str) -> list[str]:
        return [process.address for process in self.processes if process.role == role and process.serves]

    async def start(self) -> None:
        """Start all services, each after the services that it needs.

        Raises:  ConfigError: the data directory cannot be made or written, or a role refused its settings; then the
        message is the role's own.
        """
        config = self.config
        try:
            config.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._take_lock()
            (config.data_dir / "logs").mkdir(mode=0o700, exist_ok=True)
            secret = create_secret_file(config.data_dir / "secret")
        except OSError as err:
            raise ConfigError(f"--data-dir {config.data_dir} cannot be used: {err}; nothing was started") from err
        self._credentials = Credentials(Role.OPERATOR, keyring=Keyring.from_file(secret))
        # The secret by which the store authenticates its callers.
        flags = ["--secret-file", str(secret)]
        key = config.data_dir / STORE_KEY_FILE
        if config.encrypt:
            create_secret_file(key)
        if key.exists():
            # Also if encryption is not requested any more: else stored data would be unreadable, and new data written
            # unencrypted.
            flags += ["--encrypt-key-file", str(key)]
        flags += _given("--budget-bytes", config.store_bytes)
        flags += self._object_flags()
        for name in ("block_ttl_s", "checkpoint_ttl_s"):
            if (ttl_s := getattr(config, name)) is not None:
                flags += [f"--{name.replace('_', '-')}", f"{ttl_s:g}"]
        for number in range(config.num_stores):
            where = ["--dir", str(config.store_dir_of(number)), "--usage-log-dir", str(config.usage_log_dir_of(number))]
            self._stores.append(await self.start_role("kvstore", [*where, *flags]))
        await asyncio.gather(
            *(self.start_worker("prefill") for _ in range(config.num_prefill)),
            *(self.start_worker("decode") for _ in range(config.num_decode)),
        )
        # A router refuses to start over workers that cannot share KV, and says what differs.
        await self.start_router(config.router_address, http_address=config.http_address)
        arithmetic = (await self.router.status()).arithmetic
        for name, text in ((ARITHMETIC_FILE, arithmetic), (DOOR_FILE, json.dumps(_door_settings(config)))):
            put_aside(config.data_dir / name)
            write_private(config.data_dir / name, text + "\n")
        for _ in range(1, config.num_routers):
            await self.start_router(http_address="127.0.0.1:0" if config.http_address else "")

    def _take_lock(self) -> None:
        """Raises:  ConfigError: another deployment runs in the data directory; both would write the same logs."""
        path = self.config.data_dir / LOCK_FILE
        lock = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, FILE_MODE), "a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            lock.seek(0)
            pid = lock.read().strip()
            lock.close()
            raise ConfigError(
                f"--data-dir {self.config.data_dir} is in use by another `antefix up` (pid {pid}); nothing was started"
            ) from err
        # The content is for the message above only, so a full disk is no error here.
        with contextlib.suppress(OSError):
            os.ftruncate(lock.fileno(), 0)
            os.write(lock.fileno(), f"{os.getpid()}\n".encode())
        self._lock = lock

    async def start_worker(self, role: str) -> RoleProcess:
        """Start one more prefill or decode worker."""
        config = self.config
        flags = flags_of(WorkerSettings, config)
        flags += ["--threads", str(self._threads()), "--arithmetic-cache", str(config.data_dir / ARITHMETIC_DIR)]
        return await self.start_role(role, [*self._shared_flags(), *flags])

    async def start_router(self, address: str = "127.0.0.1:0", *, http_address: str | None = None) -> RoleProcess:
        """Start a router for the workers that are alive now. http_address: None stands for the deployment's address.

        The router takes the first ledger that no living router has. After a crash this is the dead router's ledger,
        whose open bills the new router closes.
        """
        taken = {process.ledger_dir for process in self.processes if process.alive}
        ledger_dir = next(path for n in itertools.count() if (path := self.config.ledger_dir_of(n)) not in taken)
        http_address = self.config.http_address if http_address is None else http_address
        flags = [*self._shared_flags(), *flags_of(WorkerSettings, self.config, NAMING)]
        flags += ["--address", address, "--decode", ",".join(self.addresses("decode"))]
        flags += ["--ledger-dir", str(ledger_dir), "--http-address", http_address]
        # All routers sign with one key, so that there is one public key.
        flags += ["--receipt-key-file", str(self.config.ledger_dir / "receipts.key")]
        flags += ["--chat-format", self.config.chat_format, "--model-aliases", self.config.model_aliases]
        flags += ["--prefix-rules", self.config.prefix_rules]
        flags += ["--ratecards", ",".join(self.config.ratecards)]
        flags += _given("--tenants-file", self.config.tenants_file)
        flags += _given("--api-keys-file", self.config.api_keys_file)
        flags += _given("--keys-redis", self.config.keys_redis)
        flags += _given("--bill-redis", self.config.bill_redis)
        flags += _given("--anchors", ",".join(self.config.anchors))
        peers = [self.config.ledger_dir_of(n) for n in range(self.config.num_routers)]
        flags += _given("--peer-ledgers", ",".join(str(path) for path in peers if path != ledger_dir))
        flags += flags_of(WorkerSettings, self.config, ("redis_password_file", "redis_ca_file"))
        if prefill := self.addresses("prefill"):
            flags += ["--prefill", ",".join(prefill)]
        started = await self.start_role("router", flags)
        started.ledger_dir = ledger_dir
        return started

    def _threads(self) -> int:
        """The cores, divided among workers: two workers with all cores each would wait for each other after every
        parallel loop.
        """
        workers = max(1, self.config.num_prefill + self.config.num_decode)
        return max(1, usable_cores() // (workers * self.config.tensor_parallel_size))

    def _shared_flags(self) -> list[str]:
        config = self.config
        return [
            *("--model", str(config.model)),
            *("--secret-file", str(config.data_dir / "secret")),
            *self._store_flags(),
            *self._object_flags(),
        ]

    def _object_flags(self) -> list[str]:
        """Flags for the object store, which every service reads or writes."""
        url, key = self.config.object_store, self.config.data_dir / STORE_KEY_FILE
        if not url:
            return []
        return ["--object-store", url, *(("--object-encrypt-key-file", str(key)) if key.exists() else ())]

    def store_of(self, process: RoleProcess) -> str:
        """Name and directory of this process's store, if there are several; empty for processes that are not stores."""
        if process not in self._stores or self.config.num_stores == 1:
            return ""
        number = self._stores.index(process)
        return f"{_store_name(number)} in {self.config.store_dir_of(number)}"

    def _store_flags(self) -> list[str]:
        """Flags by which the next process reaches the stores: one is on its host, the others count as remote."""
        config = self.config
        if config.num_stores == 1:
            return ["--store-address", self.one("kvstore").address, "--store-dir", str(config.store_dir)]
        own = next(self._turns) % config.num_stores
        stores = [f"{_store_name(number)}={store.address}" for number, store in enumerate(self._stores)]
        stores[own] += f"@{config.store_dir_of(own).absolute()}"
        return ["--stores", ",".join(stores)]

    async def restart(self, dead: RoleProcess) -> RoleProcess:
        """Start a role that died again, with its addresses, its log and, for a router, its ledger.

        Raises: as `start_role`.
        """
        last = ["--address", dead.address, "--metrics-address", dead.metrics_address]
        last += _given("--http-address", dead.http_address)
        self.processes = [process for process in self.processes if process is not dead]
        try:
            started = await self.start_role(dead.role, dead.flags, last=last, log_path=dead.log_path)
        except AntefixError:
            # Keep only processes that are alive; others that failed to start are dropped.
            self.processes = [process for process in self.processes if process.alive]
            raise
        started.ledger_dir = dead.ledger_dir
        self._stores = [started if store is dead else store for store in self._stores]
        return started

    async def start_role(
        self, role: str, flags: Sequence[str], *, last: Sequence[str] = (), log_path: Path | None = None
    ) -> RoleProcess:
        """Start one process and wait until it serves.  last: flags that override all others.  log_path: the log to
        append to; None: a new one.

        Raises:  ConfigError: the process ended; the message has the end of its log.  Unavailable: it took too long.
        """
        log_path = log_path or self.config.data_dir / "logs" / f"{role}-{next(self._numbers)}.log"
        said_before = _log_bytes(log_path)
        with open_private(log_path, "a") as log:
            process = await asyncio.create_subprocess_exec(
                # -P: do not import a folder called `antefix` in the working directory instead of the package.
                *(sys.executable, "-P", "-m", "antefix_console", "serve", role, "--watch-stdin"),
                *("--grace-s", str(self.config.grace_s)),
                *self._telemetry_flags(),
                *flags,
                *self.config.extra_flags.get(role, ()),
                *last,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                # Its own process group: a Ctrl-C at the terminal reaches only us, and we stop the roles in order.
                start_new_session=True,
                env=_child_environment(self.config.data_dir),
            )
        started = RoleProcess(role=role, process=process, address="", log_path=log_path, flags=tuple(flags))
        self.processes.append(started)
        line = await self._first_line(started, said_before)
        if not line:
            status = await process.wait()
            why = f"it ended with {status}{_of_address_space(status)}"
            raise ConfigError(f"{role} did not start ({why}): {_log_tail(log_path, said_before)}")
        ready = json.loads(line)
        started.address, started.http_address = str(ready["address"]), str(ready.get("http_address", ""))
        started.metrics_address = str(ready.get("metrics_address", ""))
        if self._credentials is not None:
            # The one who started the processes may make any call to them.
            own_credentials.use_for(started.address, self._credentials)
        self._write_targets()
        return started

    async def _first_line(self, starting: RoleProcess, said_before: int) -> bytes:
        """The line with the address that a process prints; empty if the process ended instead. Raises: Unavailable: it
        took too long.
        """
        assert starting.process.stdout is not None
        reading = asyncio.ensure_future(starting.process.stdout.readline())
        begun = time.monotonic()
        try:
            while (waited_s := time.monotonic() - begun) < START_TIMEOUT_S:
                await asyncio.wait([reading], timeout=min(_TELL_EVERY_S, START_TIMEOUT_S - waited_s))
                if reading.done():
                    return reading.result()
                waited_s = time.monotonic() - begun
                name, last = f"{starting.role} (pid {starting.process.pid})", _log_tail(starting.log_path, said_before)
                self._tell(f"waiting for {name} to start, {waited_s:.0f} s of {START_TIMEOUT_S:.0f} s at most: {last}")
        finally:
            reading.cancel()
        last = _log_tail(starting.log_path, said_before)
        raise Unavailable(
            f"{starting.role} did not start within {START_TIMEOUT_S:.0f} s: {last}; {starting.log_path} has the "
            "rest of its log"
        )

    def _telemetry_flags(self) -> list[str]:
        config = self.config
        flags = ["--metrics-address", "127.0.0.1:0", "--log-level", config.log_level, "--log-format", config.log_format]
        return flags + _given("--traces", config.traces)

    def _write_targets(self) -> None:
        """Write the roles' addresses for Prometheus' file_sd_configs; ports change at each start
        (deploy/prometheus.yml).
        """
        targets = [
            {"targets": [each.metrics_address], "labels": {"role": each.role}}
            for each in self.processes
            if each.metrics_address and each.alive
        ]
        path = self.config.data_dir / METRICS_TARGETS_FILE
        # Replaced atomically, because Prometheus reads it as soon as it changes.
        write_private(path, json.dumps(targets, indent=2) + "\n")

    async def kill(self, process: RoleProcess) -> None:
        """Kill the process with SIGKILL, for tests of failure."""
        if process.alive:
            process.process.kill()
        await process.process.wait()

    async def stop(self, tell: Callable[[str], None] = lambda _: None) -> list[RoleProcess]:
        """Stop the roles; a role stops before the roles that it uses. Returns the services that had to be killed.

        tell: called with a text that says what is waited for.
        """
        if self._client is not None:
            await self._client.close()
        self._stop_by = time.monotonic() + self.config.grace_s
        order = ("router", "decode", "prefill", "kvstore")
        killed: list[RoleProcess] = []
        for role in order:
            stopping = [process for process in self.processes if process.role == role]
            ended = await asyncio.gather(*(self._stop_one(process, tell) for process in stopping))
            killed += [process for process, has_ended in zip(stopping, ended, strict=True) if not has_ended]
        self.processes.clear()
        if self._lock is not None:
            self._lock.close()
            self._lock = None
        return killed

    def hurry(self) -> None:
        """Called while `stop` waits: end the running requests now, with an error for their clients."""
        self._stop_by = time.monotonic()
        for process in self.processes:
            if process.alive:
                process.process.send_signal(signal.SIGINT)

    async def num_running(self) -> int:
        """Requests that are still running in the routers. Raises:  Unavailable: a router does not answer."""

        async def ask(address: str) -> int:
            async with RouterClient(address) as router:
                return (await router.status()).num_running

        return sum(await asyncio.gather(*map(ask, self.addresses("router"))))

    async def _stop_one(self, role: RoleProcess, tell: Callable[[str], None]) -> bool:
        """Returns whether the process ended by itself."""
        if not role.alive:
            return True
        with contextlib.suppress(ProcessLookupError):
            role.process.send_signal(signal.SIGTERM)
        name, started = f"{role.role} (pid {role.process.pid})", time.monotonic()
        while (left_s := max(self._stop_by, started) + STOP_MARGIN_S - time.monotonic()) > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left_s, _TELL_EVERY_S)):
                    await role.process.wait()
                return True
            grace_left_s = max(0.0, self._stop_by - time.monotonic())
            tell(f"waiting for {name}: what runs may take {grace_left_s:.0f} s more")
        tell(f"{name} did not stop and was killed; see {role.log_path}")
        role.process.kill()
        await role.process.wait()
        return False


def _door_settings(config: DeploymentConfig) -> dict[str, str]:
    """The gateway settings to be saved. Files in the saved settings are named by their full path, because the reader
    may run in another directory.
    """
    files = {"model_aliases": config.model_aliases, "prefix_rules": config.prefix_rules}
    whole = {name: str(Path(path).absolute()) if Path(path).is_file() else path for name, path in files.items()}
    return {"chat_format": config.chat_format, **whole}


def _store_name(number: int) -> str:
    return f"store-{number + 1}"


def _given(flag: str, value: str) -> list[str]:
    return [flag, value] if value else []


def _child_environment(data_dir: Path) -> dict[str, str]:
    """The environment of this process, tuned for workers. A directory for temporary files is set if the system has
    none, because torch needs one.

    By default glibc would map and unmap each 1 to 4 MiB buffer again, and OpenMP threads would spin at the end of each
    loop, on a busy machine for a thread that is not running: a prefill of 3,000 tokens took 6.9 s instead of 0.9 s.
    """
    tuned = {
        "OMP_WAIT_POLICY": "PASSIVE",
        "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
        "MALLOC_TOP_PAD_": str(64 << 20),
    }
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        directory = data_dir / TEMPORARY_DIR
        directory.mkdir(mode=DIRECTORY_MODE, exist_ok=True)
        return {**tuned, **os.environ, "TMPDIR": str(directory.absolute())}
    return {**tuned, **os.environ}


def _log_bytes(path: Path) -> int:
    """The length of the log file to which a service will append. A large log is renamed, and kept until the next such
    renaming.

    Earlier runs' lines are kept: after a crash they explain it, and restarts must not lose them.
    """
    if not path.exists():
        return 0
    nbytes = path.stat().st_size
    if nbytes <= _LOG_BYTES_MAX:
        return nbytes
    path.replace(path.with_suffix(".old.log"))
    return 0


def _of_address_space(status: int) -> str:
    """That the address space is limited, for a process that a signal ended: libraries crash when they are short of it,
    and their messages do not name it.
    """
    limit_bytes = address_space_limit_bytes()
    if status >= 0 or limit_bytes is None:
        return ""
    return f"; `ulimit -v` limits its address space to {limit_bytes >> 20} MiB, which may be too little: raise it"


def _log_tail(path: Path, begin: int) -> str:
    """The last line of the log after byte `begin`."""
    data = path.read_bytes()[begin:][-_LOG_TAIL_BYTES:]
    lines = data.decode(errors="replace").strip().splitlines()
    return lines[-1].removeprefix("antefix: ") if lines else "it said nothing"
