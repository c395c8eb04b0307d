"""Bits per byte and retrieval through the real cache, in the released KV format and in float32.

python -m models.training.cached_quality --model models/antefix-tiny --corpus .corpus --out cached_quality.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from antefix.layout import KVFormat
from models.training.cached import CachedModel, bits
from models.training.corpus import Tokens, load
from models.training.evaluate import DISTANCES
from models.training.tasks import random_slice, retrieval_sequence

TEXT_LENGTH = 8192
# Longer than any training sequence, to see how retrieval fares there: (tokens, distances).
BEYOND_TRAINING = [(65536, [48_000, 64_000]), (131072, [96_000, 128_000])]


def text_bits(model: CachedModel, text: Tokens, *, sequences: int) -> list[float]:
    """Mean bits per byte of each slice."""
    rng = np.random.default_rng(1)
    means = []
    for _ in range(sequences):
        tokens = random_slice(rng, text, TEXT_LENGTH + 1)
        sequence = model.start()
        means.append(float(bits(model.extend(sequence, tokens[:-1]), tokens[1:]).mean()))
        model.release(sequence)
    return means


def retrieval(
    model: CachedModel, text: Tokens, *, length: int, distances: list[int], sequences: int
) -> dict[int, float]:
    """Share of values that greedy decoding gives back in full, by distance."""
    rng = np.random.default_rng(4)
    right = dict.fromkeys(distances, 0)
    for _ in range(sequences):
        tokens, spans = retrieval_sequence(rng, text, length, distances)
        sequence = model.start()
        guesses = model.extend(sequence, tokens).argmax(-1)
        model.release(sequence)
        for distance, (start, end) in zip(distances, spans, strict=True):
            wanted = torch.from_numpy(tokens[start:end].astype(np.int64))
            right[distance] += bool(torch.equal(guesses[start - 1 : end - 1], wanted))
    return {distance: count / sequences for distance, count in right.items()}


def measure(directory: Path, text: Tokens, *, sequences: int) -> dict[str, Any]:
    result: dict[str, Any] = {"text_length": TEXT_LENGTH, "sequences": sequences, "bits_per_byte": {}}
    for kv_format in (KVFormat.FP8, KVFormat.FLOAT32):
        model = CachedModel(directory, num_tokens_max=TEXT_LENGTH, kv_format=kv_format)
        result["bits_per_byte"][kv_format.value] = text_bits(model, text, sequences=sequences)
        print(kv_format.value, np.mean(result["bits_per_byte"][kv_format.value]), flush=True)
    model = CachedModel(directory, num_tokens_max=max(length for length, _ in BEYOND_TRAINING))
    lengths = [(32768, DISTANCES, sequences // 2), *((length, far, 2) for length, far in BEYOND_TRAINING)]
    result["retrieval"] = {}
    for length, distances, count in lengths:
        shares = retrieval(model, text, length=length, distances=distances, sequences=count)
        result["retrieval"][str(length)] = {"sequences": count, "shares": shares}
        print(length, json.dumps(result["retrieval"][str(length)]), flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sequences", type=int, default=16)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    text = load(arguments.corpus / "valid.xz")
    result = measure(arguments.model, text, sequences=arguments.sequences)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
