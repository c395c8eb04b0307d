"""What does TLS cost a remote restore, and would another way to carry payloads be faster than gRPC?

One run measures all ways in turn, repeatedly, over loopback. Each server is a separate process:

    grpc       a bare stream of 1 MiB chunks: the least that a Python gRPC server can do
    grpc_2     the same bytes in two halves, each over a connection of its own
    socket     the file of the payloads over a TCP socket: sendfile without TLS, a buffer at a time over TLS
    socket_2   the same bytes in two halves, each over a connection of its own
    flight     Arrow Flight: one table of 1 MiB binary rows
    restore    the store's own restore of the same bytes, every block verified; by 1, 4 and 8 readers

Each way runs without and with TLS (certificates of `antefix certs`, mutual TLS if the way supports it). Connections
last for the whole run. The check that each restore returned the right bytes runs after the clock has stopped. Figures
are medians of bytes per second (higher is better) and of processor seconds of client and server per GiB (lower is
better). A ratio is the median of each round's ratio.

    python benchmarks/data_planes.py --mib 256 --repeats 5 --json benchmarks/results/data_planes.json
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import mmap
import os
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from rich.console import Console
from rich.table import Table

from antefix.secret import Keyring
from antefix.security import grants
from antefix.security.credential_files import CredentialFiles
from antefix.security.credentials import Credentials
from antefix.security.identity import Role
from antefix.store.allocator import keep_large_buffers
from antefix.store.remote_store import RemoteStore
from benchmarks.run_record import write
from benchmarks.store import chain, records
from benchmarks.store_payloads import blocks, layout_of
from benchmarks.store_remote import MIB, _cpu_s

READERS = (1, 4, 8)
KEYRING, TENANT = Keyring(b"k" * 32), "bench"
_CHUNK = 1 << 20

GRPC_SERVER = """
import asyncio, grpc, sys
from pathlib import Path
from antefix.store.allocator import keep_large_buffers
keep_large_buffers()
chunk = bytes(1 << 20)
async def stream(request, context):
    for _ in range(int(request)):
        yield chunk
async def main():
    server = grpc.aio.server()
    handlers = {"Stream": grpc.unary_stream_rpc_method_handler(stream)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("Bare", handlers),))
    if len(sys.argv) > 1:
        read = lambda name: (Path(sys.argv[1]) / name).read_bytes()
        pair = [(read("tls.key"), read("tls.crt"))]
        credentials = grpc.ssl_server_credentials(pair, read("ca.crt"), require_client_auth=True)
        print(server.add_secure_port("127.0.0.1:0", credentials), flush=True)
    else:
        print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await server.wait_for_termination()
asyncio.run(main())
"""
SOCKET_SERVER = """
import mmap, os, socket, ssl, sys, threading
path, tls = sys.argv[1], sys.argv[2:]
context = None
if tls:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tls[0] + "/tls.crt", tls[0] + "/tls.key")
    context.load_verify_locations(tls[0] + "/ca.crt")
    context.verify_mode = ssl.CERT_REQUIRED
def serve(connection):
    with connection, open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        if context is not None:
            connection = context.wrap_socket(connection, server_side=True)
        view = memoryview(mapped)
        while asked := connection.recv(64):
            start, end = map(int, asked.split())
            if context is None:
                connection.sendfile(file, start, end - start)
                continue
            for at in range(start, end, 1 << 20):
                connection.sendall(view[at : min(end, at + (1 << 20))])
        view.release()
with socket.create_server(("127.0.0.1", 0)) as server:
    print(server.getsockname()[1], flush=True)
    while True:
        threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()
"""
FLIGHT_SERVER = """
import sys
import pyarrow as pa
import pyarrow.flight as flight
path, tls = sys.argv[1], sys.argv[2:]
data = open(path, "rb").read()
rows = [data[at : at + (1 << 20)] for at in range(0, len(data), 1 << 20)]
table = pa.table({"chunk": pa.array(rows, pa.large_binary())})
class Server(flight.FlightServerBase):
    def do_get(self, context, ticket):
        return flight.RecordBatchStream(table.to_reader(max_chunksize=1))
if tls:
    read = lambda name: open(tls[0] + "/" + name, "rb").read()
    server = Server("grpc+tls://127.0.0.1:0", tls_certificates=[(read("tls.crt"), read("tls.key"))])
else:
    server = Server("grpc://127.0.0.1:0")
print(server.port, flush=True)
server.serve()
"""


@contextlib.contextmanager
def served(*command: str) -> Iterator[tuple[str, int]]:
    """Run a child process. Returns the first line that the child process prints, and the child's process id."""
    child = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert child.stdout is not None
    try:
        yield child.stdout.readline().strip(), child.pid
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


@dataclass(frozen=True)
class Way:
    """One way of carrying payloads that is measured.

    pid: the server's process id.  carry: transfers all bytes once.  check: checks the bytes if the client keeps them.
    """

    pid: int
    nbytes: int
    carry: Callable[[], object]
    check: Callable[[], object] = lambda: None


def at_once(parts: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """Run each of the calls in a separate thread."""

    def run() -> None:
        with ThreadPoolExecutor(len(parts)) as threads:
            for done in [threads.submit(part) for part in parts]:
                done.result()

    return run


def grpc_stream(target: str, credentials: Path | None, num_chunks: int) -> Callable[[], object]:
    # Two channels to one address share a connection unless they keep their own.
    options = [("grpc.max_receive_message_length", 16 * MIB), ("grpc.use_local_subchannel_pool", 1)]
    if credentials is None:
        channel = grpc.insecure_channel(target, options=options)
    else:
        made = grpc.ssl_channel_credentials(*(_read(credentials, name) for name in ("ca.crt", "tls.key", "tls.crt")))
        options.append(("grpc.ssl_target_name_override", "localhost"))
        channel = grpc.secure_channel(target, made, options=options)

    def run() -> None:
        for _ in channel.unary_stream("/Bare/Stream")(str(num_chunks).encode()):
            pass

    return run


def socket_read(port: int, credentials: Path | None, start: int, end: int) -> Callable[[], object]:
    into = memoryview(mmap.mmap(-1, end - start))
    connection = socket.create_connection(("127.0.0.1", port))
    if credentials is not None:
        context = ssl.create_default_context(cafile=str(credentials / "ca.crt"))
        context.load_cert_chain(credentials / "tls.crt", credentials / "tls.key")
        connection = context.wrap_socket(connection, server_hostname="localhost")

    def run() -> None:
        connection.sendall(f"{start} {end}".encode())
        at = 0
        while at < len(into) and (count := connection.recv_into(into[at:], min(_CHUNK, len(into) - at))):
            at += count
        assert at == len(into)

    return run


def flight_read(port: int, credentials: Path | None) -> Callable[[], object]:
    import pyarrow.flight as flight

    if credentials is None:
        client = flight.FlightClient(f"grpc://127.0.0.1:{port}")
    else:
        client = flight.FlightClient(
            f"grpc+tls://127.0.0.1:{port}", tls_root_certs=_read(credentials, "ca.crt"), override_hostname="localhost"
        )

    def run() -> None:
        for _ in client.do_get(flight.Ticket(b"")):
            pass

    return run


class Readers:
    """Clients of a store that restore all bytes at the same time, each with an event loop in its own thread."""

    def __init__(self, address: str, credentials: Path | None, names: Any, fingerprint: bytes, into: Any) -> None:
        """into: the buffers that the clients restore into."""
        self._names, self._fingerprint, self._into = names, fingerprint, into
        self._loops = [asyncio.new_event_loop() for _ in into]
        for loop in self._loops:
            threading.Thread(target=loop.run_forever, daemon=True).start()
        self._stores = [open_store(address, credentials) for _ in into]

    def restore(self, num: int) -> None:
        """Restore with the first `num` clients."""
        readers = list(zip(self._stores, self._into, self._loops, strict=True))[:num]
        for done in [asyncio.run_coroutine_threadsafe(self._one(store, into), loop) for store, into, loop in readers]:
            done.result()

    async def _one(self, store: RemoteStore, into: Any) -> None:
        views = [row.data for row in into]
        assert await store.get_blocks(self._names.hashes, views, fingerprint=self._fingerprint) == len(into)

    def check(self, num: int, payloads: Any) -> None:
        for into in self._into[:num]:
            assert np.array_equal(into, payloads)
            into[:] = 0


def measure(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    layout = layout_of("flash")
    num_blocks = max(1, args.mib * MIB // layout.block_bytes)
    payloads = blocks(layout, num_blocks)
    names = chain(num_blocks)
    made = [dataclasses.replace(each, tenant=KEYRING.owner(TENANT)) for each in records(names, payloads)]
    with tempfile.TemporaryDirectory(prefix="antefix-bench-", dir=args.dir) as name, contextlib.ExitStack() as stack:
        directory = Path(name)
        plain = directory / "payloads"
        plain.write_bytes(payloads.tobytes())
        credentials = make_credentials(directory)
        into = [np.zeros_like(payloads) for _ in range(max(args.readers))]
        ways: dict[str, Way] = {}
        for suffix, own, callers in (("", None, None), ("_tls", credentials["kvstore"], credentials["prefill"])):
            shown = [] if own is None else [str(own)]
            line, pid = stack.enter_context(served("-c", GRPC_SERVER, *shown))
            num_chunks = payloads.nbytes // MIB // 2 * 2
            halves = [grpc_stream(f"127.0.0.1:{line}", callers, num_chunks // 2) for _ in range(2)]
            whole = grpc_stream(f"127.0.0.1:{line}", callers, num_chunks)
            ways[f"grpc{suffix}"] = Way(pid, num_chunks * MIB, whole)
            ways[f"grpc_2{suffix}"] = Way(pid, num_chunks * MIB, at_once(halves))
            line, pid = stack.enter_context(served("-c", SOCKET_SERVER, str(plain), *shown))
            middle, end = payloads.nbytes // 2, payloads.nbytes
            ways[f"socket{suffix}"] = Way(pid, end, socket_read(int(line), callers, 0, end))
            halves = [socket_read(int(line), callers, *part) for part in ((0, middle), (middle, end))]
            ways[f"socket_2{suffix}"] = Way(pid, end, at_once(halves))
            line, pid = stack.enter_context(served("-c", FLIGHT_SERVER, str(plain), *shown))
            ways[f"flight{suffix}"] = Way(pid, end, flight_read(int(line), callers))
            flags = ["--dir", str(directory / f"store{suffix}"), "--address", "127.0.0.1:0", "--budget-bytes", "4G"]
            flags += [] if own is None else ["--credentials", str(own)]
            line, pid = stack.enter_context(served("-m", "antefix_console", "serve", "kvstore", *flags))
            address = json.loads(line)["address"]
            asyncio.run(_put(address, callers, made))
            readers = Readers(address, callers, names, made[0].fingerprint, into)
            for num in args.readers:
                restore, check = partial(readers.restore, num), partial(readers.check, num, payloads)
                ways[f"restore_{num}{suffix}"] = Way(pid, num * end, restore, check)
        ways = {name: way for name, way in ways.items() if not args.only or name in args.only}
        found = in_turn(ways, args.repeats, console)
    shape = {"mib": payloads.nbytes / MIB, "repeats": args.repeats}
    return {**shape, **{kind: medians(each) for kind, each in found.items()}, "ratios": ratios(found["bytes_per_s"])}


async def _put(address: str, credentials: Path | None, made: Any) -> None:
    store = open_store(address, credentials)
    result = await store.put(made)
    assert not result.refused, result
    await store.close()


def open_store(address: str, credentials: Path | None) -> RemoteStore:
    """A client of the store, with a grant for the records' tenant if the store requires a grant."""
    if credentials is None:
        return RemoteStore(address)
    shown = Credentials(Role.PREFILL, files=CredentialFiles(credentials))
    operator = Credentials(Role.OPERATOR, files=CredentialFiles(credentials.parent / "operator"), keyring=KEYRING)
    grants.hold(operator.grant_for(TENANT, np.arange(grants.ROOT_TOKENS, dtype=np.uint32), ttl_s=3600.0))
    return RemoteStore(address, credentials=shown)


def in_turn(ways: dict[str, Way], repeats: int, console: Console) -> dict[str, dict[str, list[float]]]:
    """Measure all ways of transfer in turn. Returns one figure per way and round."""
    rates: dict[str, list[float]] = {}
    used: dict[str, list[float]] = {}
    for number in range(repeats + 1):
        for name, way in ways.items():
            before_s, start = _cpu_s(way.pid) + time.process_time(), time.perf_counter()
            way.carry()
            took_s = time.perf_counter() - start
            cpu_s = _cpu_s(way.pid) + time.process_time() - before_s
            way.check()
            # The first round fills buffers and caches.
            if number:
                rates.setdefault(name, []).append(way.nbytes / took_s)
                used.setdefault(name, []).append(cpu_s / way.nbytes * (1 << 30))
        console.print(f"[dim]round {number} of {repeats}[/dim]")
    return {"bytes_per_s": rates, "cpu_s_per_gib": used}


def medians(found: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in found.items()}


def ratios(rates: dict[str, list[float]]) -> dict[str, float]:
    """The store's ratios to its limits, and the gain of the other ways: medians of each round's ratio."""
    pairs = {
        "restore_over_grpc": ("restore_1", "grpc"),
        "restore_tls_over_grpc": ("restore_1_tls", "grpc"),
        "restore_tls_over_grpc_tls": ("restore_1_tls", "grpc_tls"),
        "grpc_tls_over_grpc": ("grpc_tls", "grpc"),
        "two_connections_over_one": ("grpc_2", "grpc"),
        "two_connections_over_one_tls": ("grpc_2_tls", "grpc_tls"),
        "eight_readers_over_one": ("restore_8", "restore_1"),
        "eight_readers_over_one_tls": ("restore_8_tls", "restore_1_tls"),
        "socket_tls_over_grpc_tls": ("socket_tls", "grpc_tls"),
        "two_sockets_tls_over_grpc_tls": ("socket_2_tls", "grpc_tls"),
        "flight_tls_over_grpc_tls": ("flight_tls", "grpc_tls"),
    }
    return {
        name: statistics.median(a / b for a, b in zip(rates[ours], rates[limit], strict=True))
        for name, (ours, limit) in pairs.items()
        if ours in rates and limit in rates
    }


def make_credentials(directory: Path) -> dict[str, Path]:
    """A CA and a certificate each for the store, a worker, and an operator, who signs the worker's grant."""
    call = [sys.executable, "-m", "antefix_console", "certs"]
    subprocess.run([*call, "init", str(directory / "ca")], check=True, stdout=subprocess.DEVNULL)
    made = {}
    for role in ("kvstore", "prefill", "operator"):
        made[role] = directory / role
        hosts = ["--host", "localhost", "--host", "127.0.0.1"]
        command = [*call, "issue", role, role, "--ca", str(directory / "ca"), "--out", str(made[role]), *hosts]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return made


def _read(directory: Path, name: str) -> bytes:
    return (directory / name).read_bytes()


def table_of(report: dict[str, Any]) -> Table:
    table = Table(title=f"{report['mib']:.0f} MiB, medians of {report['repeats']}")
    for title in ("way", "GB/s, higher is better", "CPU s per GiB, lower is better"):
        table.add_column(title, justify="left" if title == "way" else "right")
    for name, rate in report["bytes_per_s"].items():
        table.add_row(name, f"{rate / 1e9:.2f}", f"{report['cpu_s_per_gib'][name]:.2f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=256, help="MiB of payloads that each reader reads (default: 256)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--readers",
        type=int,
        nargs="+",
        default=list(READERS),
        help="how many readers read one store at the same time, as a list of numbers (default: 1 4 8)",
    )
    parser.add_argument("--only", nargs="+", help="measure only these ways of reading, by their names in the figures")
    parser.add_argument("--dir", type=Path, help="directory to write to; it needs room for three times the payloads")
    parser.add_argument("--json", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    keep_large_buffers()
    console = Console(stderr=True)
    report = measure(args, console)
    print(json.dumps(report, indent=2))
    if args.json:
        write(args.json, report, "grpcio", "pyarrow")
    console.print(table_of(report))


if __name__ == "__main__":
    main()
