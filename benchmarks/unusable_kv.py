"""What does checking stored KV for NaN, infinity and far too large numbers cost, compared with decoding it?

    python -m benchmarks.unusable_kv --json benchmarks/results/unusable_kv.json

Layers have V4's shapes (head 512, indexer 128, ratios 4 and 128) and run on one thread. The figures are the CPU times
to check restored blocks (`BlockPool.unusable`) and to decode them (`note_filled`), which every restore does. Each
figure is the minimum of all rounds.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from antefix.layout import BlockLayout, KVFormat, KVGeometry, LayerKind
from antefix.model.pool import BlockPool
from antefix.model.quant import pack, width_of
from benchmarks.run_record import write

NUM_BLOCKS = 32


def pool_of(num_pairs: int) -> BlockPool:
    """A pool whose blocks hold random entries and keys."""
    geometry = KVGeometry(
        layers=(LayerKind.CSA, LayerKind.HCA) * num_pairs,
        head_dim=512,
        rope_dim=64,
        indexer_dim=128,
        csa_ratio=4,
        hca_ratio=128,
        window=128,
    )
    layout = BlockLayout(geometry=geometry, kv_format=KVFormat.FP8)
    pool = BlockPool(layout, NUM_BLOCKS)
    for part in layout.parts:
        values = torch.randn(NUM_BLOCKS, part.num_rows, width_of(part, layout))
        pool.records(part)[:] = pack(part.kind, values, layout)
    return pool


def least_ms(call: object, rounds: int) -> float:
    assert callable(call)
    taken = []
    for _ in range(rounds):
        began = time.process_time()
        call()
        taken.append(1e3 * (time.process_time() - began))
    return min(taken)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    pool = pool_of(10)
    ids = list(range(NUM_BLOCKS))
    nbytes = NUM_BLOCKS * pool.layout.block_bytes
    looking, decoding = (
        least_ms(lambda call=call: call(ids), args.rounds) for call in (pool.unusable, pool.note_filled)
    )
    figures = {
        "mib": nbytes / (1 << 20),
        "look_ms": looking,
        "look_gb_per_s": nbytes / looking / 1e6,
        "decode_ms": decoding,
        "look_of_decode": looking / decoding,
    }
    for name, value in figures.items():
        sys.stdout.write(f"{name:16} {value:.3g}\n")
    if args.json:
        write(args.json, figures, "torch", "numpy")
    return 0


if __name__ == "__main__":
    sys.exit(main())
