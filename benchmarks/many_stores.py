"""What do several stores cost a look-up and a restore? One store, and the same blocks behind `ManyStores`, in one run.

    python -m benchmarks.many_stores --blocks 2048 --rounds 9 --json benchmarks/results/many_stores.json

one      an embedded store, asked directly
behind   the same store behind `ManyStores`, next to a second store that is empty
halves   two stores that hold half of the prompt each, alternating every 256 blocks; where they alternate, a store holds
         a block but not the block's parent

Look-ups are of a prompt of `--prompt` blocks, in processor time. Restores are of `--blocks` blocks from the page cache,
in wall time. Each figure is the minimum of all rounds, so that other load counts little. A ratio above 1 means that
`ManyStores` is slower.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from antefix.block import chain_of
from antefix.record import Record, RecordKind
from antefix.store.many_stores import ManyStores
from antefix.store.store_members import Member
from antefix.store.tier import Tier
from antefix.tier_kind import TierKind
from antefix_kvstore.embedded_store import EmbeddedStore
from antefix_kvstore.kvstore_config import KvStoreConfig
from benchmarks.run_record import write

FINGERPRINT = b"F" * 32
# Bytes of a block's FP8 global KV in V4-Flash.
BLOCK_BYTES = 449_824
BLOCK_TOKENS = 128
TURN = 256


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--blocks",
        type=int,
        default=1024,
        help="number of blocks that a restore reads (default: 1024, which is 131,072 tokens)",
    )
    parser.add_argument(
        "--prompt",
        type=int,
        default=7_813,
        help="number of blocks that a look-up asks for (default: 7813, which is 1M tokens)",
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    figures = asyncio.run(_measure(args))
    for name, value in figures.items():
        sys.stdout.write(f"{name:<28} {value}\n")
    if args.json:
        write(args.json, {"blocks": args.blocks, "prompt_blocks": args.prompt, "figures": figures}, "lmdb")
    return 0


async def _measure(args: argparse.Namespace) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as directory:
        stores = [_store(Path(directory) / name, args.blocks) for name in ("one", "a", "b", "empty")]
        one, first, second, empty = stores
        await _fill(one, args, lambda _: True)
        await _fill(first, args, lambda index: index // TURN % 2 == 0)
        await _fill(second, args, lambda index: index // TURN % 2 == 1)
        ways = {"one": one, "behind": _many(one, empty), "halves": _many(first, second)}
        hashes = _hashes(args.prompt)
        into = [memoryview(bytearray(BLOCK_BYTES)) for _ in range(args.blocks)]
        restored = _hashes(args.blocks, tokens=1)
        look_ups = {name: _look_up(store, hashes) for name, store in ways.items()}
        restores = {name: _restore(store, restored, into) for name, store in ways.items()}
        look_up_s = await _least(look_ups, args.rounds, time.process_time)
        restore_s = await _least(restores, args.rounds, time.perf_counter)
        for store in stores:
            await store.close()
    return {
        **{f"look_up_{name}_cpu_ms": round(1000 * seconds, 2) for name, seconds in look_up_s.items()},
        **{f"restore_{name}_gb_s": round(args.blocks * BLOCK_BYTES / s / 1e9, 2) for name, s in restore_s.items()},
        **{f"look_up_ratio_{name}": round(look_up_s[name] / look_up_s["one"], 2) for name in ("behind", "halves")},
        **{f"restore_ratio_{name}": round(restore_s[name] / restore_s["one"], 2) for name in ("behind", "halves")},
    }


def _store(directory: Path, num_blocks: int) -> EmbeddedStore:
    budget = max(1 << 30, 3 * num_blocks * BLOCK_BYTES)
    config = KvStoreConfig(
        dir=str(directory), budget_bytes=budget, compression="off", durable=False, scrub_bytes_per_s=0
    )
    store = EmbeddedStore(config)
    store.engine.register(FINGERPRINT, BLOCK_TOKENS, {})
    return store


def _many(near: EmbeddedStore, other: EmbeddedStore) -> ManyStores:
    members = [
        Member(tier=Tier(name, kind, store), store=store, near=kind is TierKind.DISK)
        for name, kind, store in (("near", TierKind.DISK, near), ("other", TierKind.PEER, other))
    ]
    return ManyStores(members)


def _hashes(num_blocks: int, tokens: int = 0) -> list[bytes]:
    """Block hashes of a prompt that repeats the token `tokens`, so that each token gives a different prompt."""
    prompt = [tokens] * (num_blocks * BLOCK_TOKENS)
    return chain_of(prompt, fingerprint_digest=FINGERPRINT, key=b"k" * 32, block_size=BLOCK_TOKENS).hashes


async def _fill(store: EmbeddedStore, args: argparse.Namespace, has: Callable[[int], bool]) -> None:
    """Store a prompt of tiny blocks for look-ups, and one of full-size blocks for restores."""
    for hashes, nbytes in ((_hashes(args.prompt), 64), (_hashes(args.blocks, tokens=1), BLOCK_BYTES)):
        payload = bytes(range(256)) * (nbytes // 256 + 1)
        record = Record(
            kind=RecordKind.BLOCK,
            hash=b"",
            parent=bytes(32),
            fingerprint=FINGERPRINT,
            position=0,
            payload=payload[:nbytes],
            parent_elsewhere=True,
        )
        records = [
            replace(
                record,
                hash=name,
                parent=hashes[index - 1] if index else bytes(32),
                position=(index + 1) * BLOCK_TOKENS,
            )
            for index, name in enumerate(hashes)
            if has(index)
        ]
        for first in range(0, len(records), TURN):
            await store.put(records[first : first + TURN])


def _look_up(store: Any, hashes: list[bytes]) -> Callable[[], Awaitable[None]]:
    async def look_up() -> None:
        assert (await store.lookup(hashes, fingerprint=FINGERPRINT)).num_blocks == len(hashes)

    return look_up


def _restore(store: Any, hashes: list[bytes], into: list[memoryview]) -> Callable[[], Awaitable[None]]:
    async def restore() -> None:
        assert await store.get_blocks(hashes, into, fingerprint=FINGERPRINT) == len(hashes)

    return restore


async def _least(
    ways: dict[str, Callable[[], Awaitable[None]]], rounds: int, clock: Callable[[], float]
) -> dict[str, float]:
    """The minimum seconds of each call by this clock. The calls take turns."""
    least = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, way in ways.items():
            started = clock()
            await way()
            least[name] = min(least[name], clock() - started)
    return least


if __name__ == "__main__":
    sys.exit(main())
