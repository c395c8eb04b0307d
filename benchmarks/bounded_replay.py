"""How wrong is a bounded replay of k windows, and how fast does the error fall with k?

    python benchmarks/bounded_replay.py --tokens 4096 --points 24 --json benchmarks/results/bounded_replay.json

The benchmark runs a document cold, with the kind of text that the model was trained on. At each resume point it
rebuilds window state by replaying k windows, where tokens before the replay's start are not visible, and compares the
next tokens' logits with the cold run's. The benchmark reports for each k the largest and median logit error relative to
the largest logit, the KL divergence of the next-token distributions, and how often the likeliest token differs. The
last k is at least as long as an exact replay, so its error must be 0.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

from antefix.layout import KVFormat
from antefix.model import BlockPool, Model, Sequence, WindowState, forward, load_model
from antefix.tokenizer import load_tokenizer
from benchmarks.run_record import write

ROOT = Path(__file__).parents[1]
TEXT = ("docs/ARCHITECTURE.md", "docs/FORMAT.md", "docs/WINDOW_STATE.md", "docs/BILLING.md", "LICENSE")
# Tokens after the resume point whose logits are compared.
NEXT_TOKENS = 16
CHUNK = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "antefix-tiny")
    parser.add_argument("--kv-format", default="fp8", choices=["fp8", "float32"])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--points", type=int, default=24, help="resume points, at block boundaries")
    parser.add_argument("--json", type=Path, help="also write the record here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model(args.model, kv_format=KVFormat(args.kv_format))
    text = "\n\n".join((ROOT / name).read_text() for name in TEXT if (ROOT / name).is_file())
    tokens = np.array(load_tokenizer(args.model).encode(text)[: args.tokens], np.uint32)
    rows = measure(model, tokens, args.points)
    print(f"{'windows':>8} {'tokens':>7} {'max error':>10} {'median':>10} {'mean KL':>10} {'other argmax':>13}")
    for row in rows:
        print(
            f"{row['windows']:>8} {row['replayed_tokens']:>7} {row['max_error']:>10.3g} {row['median_error']:>10.3g}"
            f" {row['mean_kl']:>10.3g} {row['argmax_differs']:>12.1%}"
        )
    if args.json:
        record = {"model": args.model.name, "kv_format": args.kv_format, "tokens": len(tokens), "rows": rows}
        write(args.json, record, "torch")


def measure(model: Model, tokens: np.ndarray, num_points: int) -> list[dict[str, Any]]:
    geometry = model.layout.geometry
    size, window = geometry.block_size, geometry.window
    windows_max = -(-geometry.replay_tokens // window)
    first = -(-windows_max * window // size)
    points = np.unique(np.linspace(first, (len(tokens) - NEXT_TOKENS) // size, num_points).astype(int)) * size
    pool = BlockPool(model.layout, -(-len(tokens) // size))
    cold = Sequence(pool.allocate(pool.num_blocks), WindowState.zeros(model.layout, 0))
    windows: dict[int, WindowState] = {}
    # The cold run keeps its window state at every resume point. The comparisons run after all entries are written.
    for start in sorted({*range(0, len(tokens), CHUNK), *points}):
        while cold.position < start:
            end = min(start, cold.position + CHUNK)
            forward(model, pool, [(cold, tokens[cold.position : end])])
        if start in points:
            windows[start] = cold.window.clone()
    while cold.position < len(tokens):
        forward(model, pool, [(cold, tokens[cold.position : cold.position + CHUNK])])
    want = {point: look_ahead(model, pool, cold.block_table, state, tokens) for point, state in windows.items()}
    rows = []
    for num_windows in range(1, windows_max + 1):
        span = -(-num_windows * window // size) * size
        pairs = []
        for point in points:
            replayed = Sequence(cold.block_table, WindowState.cut_at(model.layout, point - span))
            forward(model, pool, [(replayed, tokens[point - span : point])], write_global_kv=False)
            pairs.append((want[point], look_ahead(model, pool, cold.block_table, replayed.window, tokens)))
        rows.append({"windows": num_windows, "replayed_tokens": span, "points": len(points)} | errors(pairs))
    return rows


def look_ahead(
    model: Model, pool: BlockPool, table: list[int], window: WindowState, tokens: np.ndarray
) -> torch.Tensor:
    """Logits [NEXT_TOKENS, V] float64 of the next tokens. The call does not change the global KV of the cold run."""
    sequence = Sequence(table, window)
    part = tokens[window.position : window.position + NEXT_TOKENS]
    return forward(model, pool, [(sequence, part)], logits="all", write_global_kv=False).double()


def errors(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, float]:
    relative = torch.stack([(a - b).abs().max() / a.abs().max() for a, b in pairs])
    log_p = torch.cat([a.log_softmax(-1) for a, _ in pairs])
    log_q = torch.cat([b.log_softmax(-1) for _, b in pairs])
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    return {
        "max_error": float(relative.max()),
        "median_error": float(relative.median()),
        "mean_kl": float(kl.mean()),
        "max_kl": float(kl.max()),
        "argmax_differs": float((log_p.argmax(-1) != log_q.argmax(-1)).double().mean()),
    }


if __name__ == "__main__":
    main()
