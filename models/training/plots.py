"""Draw the model GPU's figures from logs and measurements.

    python -m models.training.plots --figures models/antefix-tiny/figures

reads train_1.jsonl, train_2.jsonl and quality.json there, and benchmarks/results/window_quality.json. It writes SVG
files to the figures' directory.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("svg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
# Losses are logged in nats.
BITS = 1 / np.log(2.0)


def draw_training(runs: list[list[dict[str, float]]], path: Path) -> None:
    """Loss on text and on answers over tokens, all runs in a row."""
    figure, axes = plt.subplots(figsize=(7, 3.5))
    offset = 0.0
    for number, run in enumerate(runs):
        seen = offset + np.cumsum([entry["tokens"] for entry in run])
        kept = [index for index, entry in enumerate(run) if "text" in entry]
        for name, colour in (("text", "C0"), ("answer", "C1")):
            values = np.array([run[index][name] for index in kept]) * BITS
            # A batch without answers logs zero.
            values = np.where(values > 0, values, np.nan)
            label = f"{name}, bits per byte" if number == 0 else None
            axes.plot(seen[kept] / 1e6, np.maximum(values, 1e-4), colour, linewidth=0.8, label=label)
        offset = float(seen[-1])
        axes.axvline(offset / 1e6, color="0.8", linewidth=0.8)
    axes.set(xlabel="million tokens", ylabel="training loss", yscale="log")
    axes.legend()
    _save(figure, path)


def draw_retrieval(quality: dict[str, Any], path: Path) -> None:
    """Share of values recalled over distance, with and without compressed entries, and chance."""
    figure, axes = plt.subplots(figsize=(7, 3))
    for name, label in (("released", "all parts"), ("window_only", "compressed entries dropped")):
        shares = quality["variants"][name]["retrieval"]
        axes.plot([int(d) for d in shares], list(shares.values()), "o-", label=label)
    axes.axhline(quality["chance"], color="0.6", linestyle=":", label="guessing one of the planted values")
    axes.set(xlabel="tokens between fact and question", ylabel="exact answers", xscale="log", ylim=(-0.05, 1.05))
    axes.legend(loc="center right")
    _save(figure, path)


def draw_window(window: dict[str, Any], path: Path) -> None:
    """Divergence from the exact logits, and bits per byte after the hit, over the windows replayed."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.3))
    for offset, lengths in window["offsets"].items():
        short = {int(count): value for count, value in lengths.items() if count != "exact"}
        divergence = [max(value["divergence_bits"], 1e-14) for value in short.values()]
        left.plot(list(short), divergence, "o-", label=f"hit at {offset}")
        extra = [value["bits_0_64"] - lengths["exact"]["bits_0_64"] for value in short.values()]
        right.plot(list(short), extra, "o-", label=f"hit at {offset}")
    left.set(xlabel="windows replayed", ylabel="divergence from exact, bits per token", yscale="log")
    right.set(xlabel="windows replayed", ylabel="extra bits per byte, first 64 bytes")
    left.legend()
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    # Without a date and with a fixed salt the same data give the same file.
    mpl.rcParams["svg.hashsalt"] = "antefix"
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figures", type=Path, required=True)
    figures: Path = parser.parse_args().figures
    runs = [_read_lines(figures / f"train_{number}.jsonl") for number in (1, 2)]
    draw_training(runs, figures / "training.svg")
    draw_retrieval(json.loads((figures / "quality.json").read_text()), figures / "retrieval.svg")
    draw_window(json.loads((RESULTS / "window_quality.json").read_text()), figures / "window_quality.svg")


def _read_lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    main()
