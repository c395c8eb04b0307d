"""How should a process that does not own the store read its index? The benchmark measures four ways over one store, in
one run.

    python -m benchmarks.index_readers --blocks 200000 --json benchmarks/results/index_readers.json

map     LMDB, mapped read-only: if the file is truncated, the process dies (SIGBUS)
pages   `antefix.store_files.index_pages`: pread of LMDB's pages
child   LMDB in a separate process, asked over a pipe: if the file is truncated, only the child dies
owner   the store's service, asked over gRPC (look-ups only: the service has no call that says where blocks lie)

Look-ups are of a fully stored prompt of 1M tokens. Places are the file positions of the prompt's 7,813 blocks, which
a restore needs before it reads segments. Each figure is the minimum of all rounds, so that other load on the machine
counts little. In `busy` the owner commits 100 times per second at the same time.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from antefix import rpc
from antefix.record import RecordKind
from antefix.store.remote_store import RemoteStore
from antefix.store_files.index import Index
from antefix.v1 import kvstore_pb2
from antefix_kvstore.kvstore_config import KvStoreConfig
from antefix_kvstore.server import KvStoreServicer, register
from antefix_kvstore.storage_engine import StorageEngine
from benchmarks.run_record import write
from benchmarks.store_scale import FINGERPRINT, PROMPT_BLOCKS, small_prompt

_context = multiprocessing.get_context("spawn")
Figures = dict[str, float]


def least_ms(call: Callable[[int], object], num_prompts: int, rounds: int) -> float:
    taken = []
    for number in range(rounds):
        start = time.perf_counter()
        call(number % num_prompts)
        taken.append(1e3 * (time.perf_counter() - start))
    return min(taken)


def places(index: Index, hashes: list[bytes]) -> list[Any]:
    with index.txn() as txn:
        return list(index.entries(txn, RecordKind.BLOCK, hashes))


def read_directly(index: Index, chains: list[list[bytes]], rounds: int) -> Figures:
    def lookup(number: int) -> None:
        found = index.lookup(chains[number], fingerprint=FINGERPRINT, now_ms=0)
        assert found.num_blocks == PROMPT_BLOCKS

    def locate(number: int) -> None:
        assert all(places(index, chains[number]))

    return {
        "lookup_ms": least_ms(lookup, len(chains), rounds),
        "places_ms": least_ms(locate, len(chains), rounds),
        "one_place_ms": least_ms(lambda number: places(index, chains[number][:1]), len(chains), 20 * rounds),
    }


def child(directory: str, pipe: Connection) -> None:
    index = Index(Path(directory), mapped=True)
    while (asked := pipe.recv()) is not None:
        what, hashes = asked
        pipe.send(
            index.lookup(hashes, fingerprint=FINGERPRINT, now_ms=0) if what == "lookup" else places(index, hashes)
        )


def read_in_child(directory: Path, chains: list[list[bytes]], rounds: int) -> Figures:
    ours, theirs = _context.Pipe()
    process = _context.Process(target=child, args=(str(directory), theirs))
    process.start()

    def ask(what: str, hashes: list[bytes]) -> None:
        ours.send((what, hashes))
        assert ours.recv()

    ask("places", chains[0])
    figures = {
        "lookup_ms": least_ms(lambda number: ask("lookup", chains[number]), len(chains), rounds),
        "places_ms": least_ms(lambda number: ask("places", chains[number]), len(chains), rounds),
        "one_place_ms": least_ms(lambda number: ask("places", chains[number][:1]), len(chains), 20 * rounds),
    }
    ours.send(None)
    process.join()
    return figures


def own(directory: str, pipe: Connection) -> None:
    """The process that owns the store, separate from the readers. The owner serves, and commits 100 times per second
    once it is told to.
    """
    asyncio.run(_own(directory, pipe))


async def _own(directory: str, pipe: Connection) -> None:
    engine = StorageEngine(KvStoreConfig(dir=directory, budget_bytes=8 << 30, compression="off", durable=False))
    servicer = KvStoreServicer(engine)
    server = await rpc.start_server("127.0.0.1:0", lambda it: register(servicer, it), [kvstore_pb2.DESCRIPTOR])
    pipe.send(server.address)
    loop = asyncio.get_running_loop()
    first_spare = 1_000_000
    await loop.run_in_executor(None, pipe.recv)
    records = small_prompt(first_spare)
    for at in range(0, len(records), 2):
        if pipe.poll():
            break
        await loop.run_in_executor(None, engine.put, records[at : at + 2])
        await asyncio.sleep(0.01)
    await server.drain(0)
    await servicer.close()


async def ask_owner(address: str, chains: list[list[bytes]], rounds: int) -> Figures:
    store = RemoteStore(address)
    taken = []
    for number in range(rounds):
        start = time.perf_counter()
        found = await store.lookup(chains[number % len(chains)], fingerprint=FINGERPRINT)
        taken.append(1e3 * (time.perf_counter() - start))
        assert found.num_blocks == PROMPT_BLOCKS
    await store.close()
    return {"lookup_ms": min(taken)}


def measure(directory: Path, num_blocks: int, rounds: int) -> dict[str, Figures]:
    engine = StorageEngine(KvStoreConfig(dir=str(directory), budget_bytes=8 << 30, compression="off", durable=False))
    chains = []
    for number in range(max(1, num_blocks // PROMPT_BLOCKS)):
        records = small_prompt(number)
        engine.put(records)
        chains.append([record.hash for record in records])
    engine.close()
    index = directory / "index"
    found = {}
    for name, mapped in (("map", True), ("pages", False)):
        opened = Index(index, mapped=mapped)
        found[name] = read_directly(opened, chains, rounds)
        opened.close()
    found["child"] = read_in_child(index, chains, rounds)
    ours, theirs = _context.Pipe()
    owner = _context.Process(target=own, args=(str(directory), theirs))
    owner.start()
    found["owner"] = asyncio.run(ask_owner(ours.recv(), chains, rounds))
    ours.send("commit")
    opened = Index(index)
    found["pages, busy"] = read_directly(opened, chains, rounds)
    opened.close()
    ours.send("stop")
    owner.join()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        found = measure(Path(directory), args.blocks, args.rounds)
    for name, figures in found.items():
        sys.stdout.write(f"{name:12}" + "".join(f"  {key} {value:.3f}" for key, value in figures.items()) + "\n")
    if args.json:
        figures = {"blocks": args.blocks, "rounds": args.rounds, "least": found}
        write(args.json, {"figures": figures}, "lmdb")
    return 0


if __name__ == "__main__":
    sys.exit(main())
