"""Compares the KV entries that two engines store for one V4 prompt: Antefix's model (FP8, float32) and transformers.

python benchmarks/engine_entries.py [--model DIR] [--tokens N]

The model has five layers with random weights, unless --model names one. The script prints a table that shows where
entries differ, and why.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from antefix.layout import KVFormat
from antefix_engines.transformers.small_models import write_v4
from antefix_engines.v4_entries import StoredV4, compare
from antefix_engines.v4_runs import antefix_entries, transformers_entries


def show(one: StoredV4, other: StoredV4, title: str) -> None:
    table = Table(title=title)
    for column in ("layer", "group", "rows", "equal", "largest difference", "why"):
        table.add_column(column)
    for each in compare(one, other):
        counts = (str(each.num_rows), str(each.num_equal), f"{each.largest:.1e}")
        table.add_row(str(each.layer), each.group, *counts, each.why)
    Console(width=160).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--tokens", type=int, default=1024)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="antefix-entries-") as scratch:
        model = args.model or write_v4(Path(scratch) / "model")
        prompt = [(7 * i * i + 3 * i) % 256 for i in range(args.tokens)]
        theirs = transformers_entries(model, prompt, Path(scratch) / "store")
        for kv_format in (KVFormat.FLOAT32, KVFormat.FP8):
            ours = antefix_entries(model, prompt, kv_format)
            show(ours, theirs, f"Antefix in {kv_format} against transformers in float32, {ours.num_tokens} tokens")


if __name__ == "__main__":
    main()
