"""What does TLS cost a remote restore, and would another way to carry payloads be faster than gRPC?

One run, all over loopback, each server a process of its own, in turn and repeated:

    grpc       a bare stream of 1 MiB chunks: the least that a Python gRPC server can do
    socket     the file of the payloads over a TCP socket: sendfile in clear, a buffer at a time over TLS
    flight     Arrow Flight: one table of 1 MiB binary rows
    restore    the store's own restore of the same bytes, every block verified; by 1, 4 and 8 readers

each in clear and with TLS (certificates of `antefix certs`, mutual where the way allows it). Figures are medians of
bytes per second (higher is better) and of processor seconds of both sides per GiB (lower is better).

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
from collections.abc import Callable, Iterator
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
from antefix.store.client import RemoteStore
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
    with connection, open(path, "rb") as file:
        if context is None:
            connection.recv(1)
            connection.sendfile(file)
            return
        with context.wrap_socket(connection, server_side=True) as wrapped:
            wrapped.recv(1)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                view = memoryview(mapped)
                for at in range(0, len(view), 1 << 20):
                    wrapped.sendall(view[at : at + (1 << 20)])
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
    """The first line that a child prints, and its process id."""
    child = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert child.stdout is not None
    try:
        yield child.stdout.readline().strip(), child.pid
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


class Ways:
    """Every way that is measured: its name, the server's process, and what carries all bytes once."""

    def __init__(self) -> None:
        self.runs: dict[str, tuple[int, Callable[[], object]]] = {}
        self.left_out: dict[str, str] = {}


def grpc_stream(target: str, credentials: Path | None, num_chunks: int) -> Callable[[], object]:
    options = [("grpc.max_receive_message_length", 16 * MIB)]
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


def socket_read(port: int, credentials: Path | None, nbytes: int) -> Callable[[], object]:
    into = memoryview(mmap.mmap(-1, nbytes))
    context = None
    if credentials is not None:
        context = ssl.create_default_context(cafile=str(credentials / "ca.crt"))
        context.load_cert_chain(credentials / "tls.crt", credentials / "tls.key")

    def run() -> None:
        connection = socket.create_connection(("127.0.0.1", port))
        if context is not None:
            connection = context.wrap_socket(connection, server_hostname="localhost")
        with connection:
            connection.sendall(b"x")
            at = 0
            while at < nbytes and (count := connection.recv_into(into[at:], min(_CHUNK, nbytes - at))):
                at += count
            assert at == nbytes

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


def store_reads(
    address: str, credentials: Path | None, names: Any, fingerprint: bytes, payloads: Any, readers: int
) -> Callable[[], object]:
    """All bytes, restored by each of `readers` clients at once, in threads with event loops of their own."""
    buffers = [np.zeros_like(payloads) for _ in range(readers)]

    async def restore(into: Any) -> None:
        store = open_store(address, credentials)
        views = [row.data for row in into]
        assert await store.get_blocks(names.hashes, views, fingerprint=fingerprint) == len(payloads)
        await store.close()

    def run() -> None:
        threads = [threading.Thread(target=lambda into=into: asyncio.run(restore(into))) for into in buffers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(np.array_equal(into, payloads) for into in buffers)

    return run


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
        ways = Ways()
        for suffix, own, callers in (("", None, None), ("_tls", credentials["kvstore"], credentials["prefill"])):
            shown = [] if own is None else [str(own)]
            line, pid = stack.enter_context(served("-c", GRPC_SERVER, *shown))
            ways.runs[f"grpc{suffix}"] = (pid, grpc_stream(f"127.0.0.1:{line}", callers, payloads.nbytes // MIB))
            line, pid = stack.enter_context(served("-c", SOCKET_SERVER, str(plain), *shown))
            ways.runs[f"socket{suffix}"] = (pid, socket_read(int(line), callers, payloads.nbytes))
            line, pid = stack.enter_context(served("-c", FLIGHT_SERVER, str(plain), *shown))
            ways.runs[f"flight{suffix}"] = (pid, flight_read(int(line), callers))
            flags = ["--dir", str(directory / f"store{suffix}"), "--address", "127.0.0.1:0", "--budget-bytes", "4G"]
            flags += [] if own is None else ["--credentials", str(own)]
            line, pid = stack.enter_context(served("-m", "antefix_console", "serve", "kvstore", *flags))
            address = json.loads(line)["address"]
            asyncio.run(_put(address, callers, made))
            for readers in READERS:
                run = store_reads(address, callers, names, made[0].fingerprint, payloads, readers)
                ways.runs[f"restore_{readers}{suffix}"] = (pid, run)
        found = in_turn(ways, payloads.nbytes, args.repeats, console)
    return {"mib": payloads.nbytes / MIB, "repeats": args.repeats, **found, "ratios": ratios(found["bytes_per_s"])}


async def _put(address: str, credentials: Path | None, made: Any) -> None:
    store = open_store(address, credentials)
    result = await store.put(made)
    assert not result.refused, result
    await store.close()


def open_store(address: str, credentials: Path | None) -> RemoteStore:
    """With a grant for the tenant of the records, where the store asks for one."""
    if credentials is None:
        return RemoteStore(address)
    shown = Credentials(Role.PREFILL, files=CredentialFiles(credentials))
    operator = Credentials(Role.OPERATOR, files=CredentialFiles(credentials.parent / "operator"), keyring=KEYRING)
    grants.hold(operator.grant_for(TENANT, np.arange(grants.ROOT_TOKENS, dtype=np.uint32), ttl_s=3600.0))
    return RemoteStore(address, credentials=shown)


def in_turn(ways: Ways, nbytes: int, repeats: int, console: Console) -> dict[str, dict[str, float]]:
    rates: dict[str, list[float]] = {}
    used: dict[str, list[float]] = {}
    for number in range(repeats + 1):
        for name, (pid, run) in ways.runs.items():
            carried = nbytes * (int(name.split("_")[1]) if name.startswith("restore") else 1)
            before_s, start = _cpu_s(pid) + time.process_time(), time.perf_counter()
            run()
            took_s = time.perf_counter() - start
            # The first round fills buffers and caches.
            if number:
                rates.setdefault(name, []).append(carried / took_s)
                used.setdefault(name, []).append((_cpu_s(pid) + time.process_time() - before_s) / carried * (1 << 30))
        console.print(f"[dim]round {number} of {repeats}[/dim]")
    return {
        "bytes_per_s": {name: statistics.median(values) for name, values in rates.items()},
        "cpu_s_per_gib": {name: statistics.median(values) for name, values in used.items()},
    }


def ratios(rates: dict[str, float]) -> dict[str, float]:
    """What the store is held against, and what another way would bring."""
    return {
        "restore_over_grpc": rates["restore_1"] / rates["grpc"],
        "restore_tls_over_grpc": rates["restore_1_tls"] / rates["grpc"],
        "restore_tls_over_grpc_tls": rates["restore_1_tls"] / rates["grpc_tls"],
        "eight_readers_over_one": rates["restore_8"] / rates["restore_1"],
        "eight_readers_over_one_tls": rates["restore_8_tls"] / rates["restore_1_tls"],
        "socket_tls_over_grpc_tls": rates["socket_tls"] / rates["grpc_tls"],
        "flight_tls_over_grpc_tls": rates["flight_tls"] / rates["grpc_tls"],
        "socket_tls_over_restore_tls": rates["socket_tls"] / rates["restore_1_tls"],
        "flight_tls_over_restore_tls": rates["flight_tls"] / rates["restore_1_tls"],
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
    parser.add_argument("--mib", type=int, default=256, help="of payloads per reader (default 256)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dir", type=Path, help="where to write three times the payloads")
    parser.add_argument("--json", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    console = Console(stderr=True)
    report = measure(args, console)
    print(json.dumps(report, indent=2))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    console.print(table_of(report))


if __name__ == "__main__":
    main()
