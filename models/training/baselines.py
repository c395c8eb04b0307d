"""Plain references for the validation figure: an n-gram model as large as the network's file, and xz.

    python -m models.training.baselines --corpus .corpus --size 7715650 --out baselines.json

The n-gram model interpolates orders 0 to k by Witten and Bell's rule; the best k up to 7 is taken. The n-gram model
keeps the most frequent (context, byte) pairs of all orders that fit `--size`, pairs and contexts at ENTRY_BYTES each:
a hash and a count. The weight that a context loses by pruning goes to the order below, so that pruning does not make
it too sure of itself.
"""

from __future__ import annotations

import argparse
import json
import lzma
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.training.corpus import load

Keys = NDArray[np.uint64]
Counts = NDArray[np.int64]

MAX_ORDER = 7
# A four-byte hash and a two-byte count: what a compact table would store.
ENTRY_BYTES = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """The kept pairs of one order, sorted; each context's sum of kept counts, and what it leaves to the order below.

    The share of the order below is Witten and Bell's number of different followers, and the counts of pairs that were
    not kept.
    """

    pairs: Keys
    counts: Counts
    contexts: Keys
    totals: Counts
    escapes: Counts

    @property
    def num_entries(self) -> int:
        return len(self.pairs) + len(self.contexts)


def pair_keys(data: NDArray[np.uint8], order: int) -> Keys:
    """For each position from `order` on: the `order` bytes before it and the byte itself, packed into 64 bits."""
    length = len(data) - order
    keys = np.zeros(length, dtype=np.uint64)
    for offset in range(order + 1):
        keys = (keys << np.uint64(8)) | data[offset : offset + length].astype(np.uint64)
    return keys


def count(data: NDArray[np.uint8], max_order: int = MAX_ORDER) -> list[tuple[Keys, Counts]]:
    """All pairs of every order, sorted, and how often they occur."""
    return [np.unique(pair_keys(data, order), return_counts=True) for order in range(max_order + 1)]


def prune(counted: list[tuple[Keys, Counts]], *, size_bytes: int) -> list[Order]:
    """Keep the most frequent pairs of tokens, as many as fit into the baseline's size."""
    budget = size_bytes // ENTRY_BYTES
    frequencies = np.sort(np.concatenate([counts for _, counts in counted]))[::-1]
    least = int(frequencies[budget]) + 1 if len(frequencies) > budget else 1
    # That leaves no room for contexts yet: raise the bar until they fit too.
    while True:
        orders = [_kept(keys, counts, least) for keys, counts in counted]
        if sum(order.num_entries for order in orders) <= budget:
            return orders
        least += max(least // 10, 1)


def _kept(keys: Keys, counts: Counts, least: int) -> Order:
    keep = counts >= least
    pairs, kept = keys[keep], counts[keep]
    contexts, starts = np.unique(pairs >> np.uint64(8), return_index=True)
    totals = np.add.reduceat(kept, starts) if len(kept) else kept
    # All pairs of a context are neighbours, kept or not.
    shifted = keys >> np.uint64(8)
    first, last = np.searchsorted(shifted, contexts, side="left"), np.searchsorted(shifted, contexts, side="right")
    running = np.concatenate([[0], np.cumsum(counts)])
    escapes = (last - first) + (running[last] - running[first]) - totals
    return Order(pairs=pairs, counts=kept, contexts=contexts, totals=totals, escapes=escapes)


def bits_per_byte(orders: list[Order], data: NDArray[np.uint8]) -> float:
    """Mean bits of each byte of `data` under the interpolated model."""
    probability = np.full(len(data), 1 / 256)
    for order, table in enumerate(orders):
        keys = pair_keys(data, order)
        count = _find(table.pairs, table.counts, keys)
        total = _find(table.contexts, table.totals, keys >> np.uint64(8))
        escape = _find(table.contexts, table.escapes, keys >> np.uint64(8))
        lower = probability[order:]
        mixed = (count + escape * lower) / np.maximum(total + escape, 1)
        probability[order:] = np.where(total > 0, mixed, lower)
    return float(-np.log2(probability).mean())


def _find(keys: Keys, values: Counts, wanted: Keys) -> Counts:
    """The value of each wanted key, 0 for a key that is not in the table."""
    if not len(keys):
        return np.zeros(len(wanted), dtype=np.int64)
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)


def xz_bits(train_text: bytes, valid_text: bytes) -> dict[str, float]:
    """Bits a byte of the held-out text alone, and what it adds behind the training text in one window of 64 MiB."""
    alone = len(lzma.compress(valid_text, preset=9))
    added = len(lzma.compress(train_text + valid_text, preset=9)) - len(lzma.compress(train_text, preset=9))
    return {"xz_alone": 8 * alone / len(valid_text), "xz_after_training_text": 8 * added / len(valid_text)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--size", type=int, required=True, help="bytes of the n-gram table")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    halves = [load(arguments.corpus / f"{half}.xz") for half in ("train", "valid")]
    # A document starts with a NUL here, as in the files.
    train_data, valid_data = (np.where(half > 255, 0, half).astype(np.uint8) for half in halves)
    counted = count(train_data)
    figures: dict[str, float] = {}
    for max_order in range(3, MAX_ORDER + 1):
        orders = prune(counted[: max_order + 1], size_bytes=arguments.size)
        figures[f"ngram_{max_order}"] = bits_per_byte(orders, valid_data)
    figures["ngram"] = min(figures.values())
    figures |= xz_bits(train_data.tobytes(), valid_data.tobytes())
    arguments.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
