"""How well do V4 rows, FP8 entries and FP4 indexer keys of a real model and real text compress without loss?

    python -m benchmarks.store_ratio [--model DIR] [--text FILE] [--tokens N] [--json]

The benchmark prefills a text, takes the blocks from the pool as they would be stored, and compresses them as the store
does. The benchmark reports the ratio per part. For comparison it also reports the ratio of blocks with V4-Flash's
shapes that are packed from Gaussian vectors.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from antefix.layout import BlockLayout, KVFormat, PartKind
from antefix.model import BlockPool, load_model
from antefix.model.runner import forward
from antefix.model.window_state import Sequence, WindowState
from antefix.store_files import codec
from benchmarks.store_payloads import blocks, layout_of

CHUNK_TOKENS = 256
ROOT = Path(__file__).parents[1]


def part_plan(layout: BlockLayout, kinds: Iterable[PartKind]) -> tuple[codec.PlanePlan, np.ndarray]:
    """The codec's plan for parts of these kinds only, and a mask of their bytes in a payload."""
    parts, wanted = [], np.zeros(layout.block_bytes, bool)
    for part in layout.parts:
        if part.kind in kinds:
            fields = tuple((f.nbytes, f.width) for f in part.record.fields)
            parts.append(codec.PlanePart(num_rows=part.num_rows, fields=fields))
            wanted[part.offset : part.offset + part.nbytes] = True
    return codec.PlanePlan(parts=tuple(parts)), wanted


def speeds(row: np.ndarray, plan: codec.PlanePlan) -> dict[str, float]:
    """The codec's speed on one core. The best of 20 runs counts, because other load can only make a run slower."""
    into = memoryview(bytearray(row.nbytes))
    encode_s, decode_s = [], []
    for _ in range(20):
        start = time.perf_counter()
        coded = codec.encode(row.data, plan)
        encode_s.append(time.perf_counter() - start)
        if coded is not None:
            start = time.perf_counter()
            codec.decode(coded, into)
            decode_s.append(time.perf_counter() - start)
            assert into == row.data
    out = {"encode_gb_per_s": row.nbytes / min(encode_s) / 1e9}
    return out | ({"decode_gb_per_s": row.nbytes / min(decode_s) / 1e9} if decode_s else {})


def ratios(layout: BlockLayout, payloads: np.ndarray) -> dict[str, float]:
    """Bytes divided by coded bytes, over all blocks, and the codec's speed on one core."""
    out = {}
    groups = {
        "block": tuple(PartKind),
        "entries": (PartKind.CSA_MAIN, PartKind.HCA_MAIN),
        "indexer_keys": (PartKind.INDEXER_KEYS,),
    }
    for name, kinds in groups.items():
        plan, wanted = part_plan(layout, kinds)
        rows = [np.ascontiguousarray(row[wanted]) for row in payloads]
        coded = [codec.encode(row.data, plan) for row in rows]
        nbytes = sum(row.nbytes for row in rows)
        coded_bytes = sum(row.nbytes if c is None else len(c) for row, c in zip(rows, coded, strict=True))
        out[f"{name}_ratio"] = nbytes / coded_bytes
        # zstd learns little from a small block. All blocks coded together show the ratio that the rows allow.
        together = codec.encode(np.concatenate(rows).data, codec.PlanePlan(parts=plan.parts * len(rows)))
        out[f"{name}_ratio_together"] = nbytes / (nbytes if together is None else len(together))
        if name == "block":
            out |= speeds(rows[0], plan)
    return out


def checkpoint_ratio(layout: BlockLayout, checkpoint: bytes) -> float:
    coded = codec.encode(checkpoint, codec.plan_of_checkpoint(layout))
    return 1.0 if coded is None else len(checkpoint) / len(coded)


def model_blocks(model_dir: Path, text: bytes, num_tokens: int) -> tuple[BlockLayout, np.ndarray, bytes]:
    """Prefill bytes as tokens (the shipped model is byte-level). Returns the pool's blocks and the final checkpoint."""
    torch.set_num_threads(1)
    model = load_model(model_dir, kv_format=KVFormat.FP8)
    size = model.layout.geometry.block_size
    tokens = list(text[: num_tokens // size * size])
    tokens = tokens[: len(tokens) // size * size]
    pool = BlockPool(model.layout, len(tokens) // size)
    sequence = Sequence(pool.allocate(len(tokens) // size), WindowState.zeros(model.layout, 0))
    for first in range(0, len(tokens), CHUNK_TOKENS):
        forward(model, pool, [(sequence, tokens[first : first + CHUNK_TOKENS])])
    rows = [np.frombuffer(pool.payloads([block_id])[0], np.uint8).copy() for block_id in sequence.block_table]
    return model.layout, np.stack(rows), sequence.window.to_bytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "antefix-tiny")
    parser.add_argument("--text", type=Path, default=ROOT / "docs" / "FORMAT.md")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    layout, payloads, checkpoint = model_blocks(args.model, args.text.read_bytes(), args.tokens)
    flash = layout_of("flash")
    out = {
        "model": {
            "num_blocks": len(payloads),
            "block_bytes": layout.block_bytes,
            **ratios(layout, payloads),
            "checkpoint_ratio": checkpoint_ratio(layout, checkpoint),
        },
        "flash_gaussian": ratios(flash, blocks(flash, 8)),
    }
    print(json.dumps(out) if args.json else json.dumps(out, indent=2))


if __name__ == "__main__":
    main()
