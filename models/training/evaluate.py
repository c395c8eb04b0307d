"""Measure a trained model with the whole-sequence forward: bits per byte, and retrieval over distance.

    python -m models.training.evaluate --model models/antefix-tiny --corpus .corpus --out quality.json

Four ways to run it: `released` (top-k selection, FP8 and FP4 rounding), `float32` (no rounding), `all_entries` (no
selection) and `window_only` (compressed entries hidden). models/training/cached.py measures the same through the cache.
"""

from __future__ import annotations

import argparse
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from antefix.model.model_config import ModelConfig
from models.training import dense
from models.training.corpus import Tokens, load
from models.training.dense_attention import DenseOptions
from models.training.parameters import Parameters, load_parameters, read_config
from models.training.tasks import random_slice, retrieval_sequence

DISTANCES = [128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32000]
TEXT_LENGTH = 8192
# Positions at which the bits of text are averaged apart: later bytes have more context.
POSITION_EDGES = [0, 64, 256, 1024, 4096, 8192]


class Evaluator:
    """A model on a device, in float32."""

    def __init__(self, config: dict[str, Any], parameters: Parameters, device: torch.device) -> None:
        self.config = ModelConfig.from_dict(config)
        self.device = device
        self.parameters = {name: value.to(device) for name, value in parameters.items()}
        topk = self.config.index_topk
        self.variants = {
            "released": DenseOptions(topk=topk, quantise=True),
            "float32": DenseOptions(topk=topk, quantise=False),
            "all_entries": DenseOptions(topk=0, quantise=True),
            "window_only": DenseOptions(topk=0, quantise=True, drop_compressed=True),
        }

    @torch.no_grad()
    def logits(self, tokens: Tensor, options: DenseOptions) -> Tensor:
        """[B, T, vocab] for tokens [B, T]."""
        rope = dense.rope_tables(self.config, tokens.shape[1], self.device)
        no_rows = torch.empty(tokens.shape[0], 0, dtype=torch.int64, device=self.device)
        return dense.forward(self.parameters, self.config, tokens, options=options, rope=rope, rows=no_rows)[0]

    def text_bits(self, text: Tokens, variant: str, *, sequences: int) -> dict[str, float]:
        """Mean bits per byte over slices of `text`, whole and by position."""
        rng = np.random.default_rng(1)
        bits = np.zeros(TEXT_LENGTH)
        for _ in range(sequences):
            tokens = self._tensor(random_slice(rng, text, TEXT_LENGTH + 1))
            logits = self.logits(tokens[:, :-1], self.variants[variant]).float()
            losses = F.cross_entropy(logits.flatten(0, 1), tokens[0, 1:], reduction="none")
            bits += losses.double().cpu().numpy() / math.log(2) / sequences
        by_position = {f"{low}-{high}": float(bits[low:high].mean()) for low, high in pairwise(POSITION_EDGES)}
        return {"all": float(bits.mean())} | by_position

    def retrieval(self, text: Tokens, variant: str, *, sequences: int, distances: list[int]) -> dict[int, float]:
        """Share of planted values that greedy decoding gives back in full, by distance in tokens."""
        rng = np.random.default_rng(2)
        right = dict.fromkeys(distances, 0)
        length = -(-(max(distances) + 768) // 1024) * 1024
        for _ in range(sequences):
            raw, spans = retrieval_sequence(rng, text, length, distances)
            tokens = self._tensor(raw)
            guesses = self.logits(tokens, self.variants[variant])[0].argmax(-1)
            for distance, (start, end) in zip(distances, spans, strict=True):
                # A value is decoded right, byte after byte, exactly when every byte is the most likely one.
                right[distance] += bool(torch.equal(guesses[start - 1 : end - 1], tokens[0, start:end]))
        return {distance: count / sequences for distance, count in right.items()}

    def _tensor(self, tokens: Tokens) -> Tensor:
        return torch.from_numpy(tokens.astype(np.int64)).to(self.device)[None]


def measure(evaluator: Evaluator, text: Tokens, *, sequences: int) -> dict[str, Any]:
    """All figures as one JSON object; the released way gets four times the retrieval samples."""
    result: dict[str, Any] = {"distances": DISTANCES, "chance": 1 / (2 * len(DISTANCES)), "variants": {}}
    for name in evaluator.variants:
        count = sequences if name == "released" else max(sequences // 4, 1)
        result["variants"][name] = {
            "bits_per_byte": evaluator.text_bits(text, name, sequences=sequences),
            "retrieval": evaluator.retrieval(text, name, sequences=count, distances=DISTANCES),
            "retrieval_samples": count,
        }
        print(name, json.dumps(result["variants"][name]), flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="directory with config.json")
    parser.add_argument("--weights", type=Path, help="default: model.safetensors in --model")
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sequences", type=int, default=48)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weights = arguments.weights or arguments.model / "model.safetensors"
    evaluator = Evaluator(read_config(arguments.model), load_parameters(weights), device)
    text = load(arguments.corpus / "valid.xz")
    arguments.out.write_text(json.dumps(measure(evaluator, text, sequences=arguments.sequences), indent=1) + "\n")


if __name__ == "__main__":
    main()
