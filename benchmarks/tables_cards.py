"""Tables of what was measured on GPUs; benchmarks/tables.py says how tables are made."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.tables import Row, table

STEPS = ("antefix/model", "kernels/antefix_kernels", "decode/antefix_decode/card_choice.py")
PRODUCTS = (
    "kernels/antefix_kernels/packed_fp8.py",
    "kernels/antefix_kernels/packed_linear.py",
    "antefix/model/packed.py",
)
KERNELS = ("kernels/antefix_kernels",)
_PRODUCT_NAMES = {
    "fp4 experts w1 and w3": "FP4 experts, w1 and w3 of those picked, activated",
    "fp4 experts w2": "FP4 experts, w2",
    "fp8 wq_b": "FP8 wq_b, 32,768 x 1,024",
    "fp8 wo_b": "FP8 wo_b, 4,096 x 8,192",
    "fp8 shared w1": "FP8 shared expert's w1, 2,048 x 4,096",
    "fp8 wq_a": "FP8 wq_a, 1,024 x 4,096",
}
_FEW_ROWS = {
    "wq_a": "1,024 x 4,096 (`wq_a`)",
    "wkv": "512 x 4,096 (`wkv`)",
    "wo_b": "4,096 x 8,192 (`wo_b`)",
    "wq_b": "32,768 x 1,024 (`wq_b`): stays",
    "experts w1 and w3": "experts' 4,096 x 4,096, 6 picks per row",
}


def _ms(value: float) -> str:
    """Milliseconds with three digits, or with all digits before the point."""
    return f"{value:,.{2 if value < 10 else 1 if value < 100 else 0}f}"


@table("decode_on_card.json", *STEPS)
def decode_steps(record: Any) -> Iterable[Row]:
    found = {(step["sequences"], step["reproducible"]): step for step in record["steps"]}
    yield (
        *("sequences, tokens behind", "a step, ms", "floor, ms", "times the floor (1.5 wanted, lower is better)"),
        *("the same, `--reproducible`", "launches per step", "the GPU is busy, ms"),
    )
    for number in sorted({sequences for sequences, _ in found}):
        step = found[number, False]
        yield (
            f"{number}, {step['tokens']:,} each",
            _ms(step["ms"]),
            f"{step['floor_ms']:.2f}",
            f"{step['times_floor']:.2f}",
            f"{found[number, True]['times_floor']:.2f}",
            f"{step['launches']}",
            f"{step['card_ms']:.1f}",
        )


@table("decode_on_card_launched.json", *STEPS)
def launches_of_steps(record: Any) -> Iterable[Row]:
    yield "sequences, tokens behind", "launches per step, one by one", "as a graph", "one by one, ms", "as a graph, ms"
    found = {(step["sequences"], step["way"]): step for step in record["steps"] if not step["reproducible"]}
    for number in sorted({sequences for sequences, _ in found}):
        steps = [found[number, way] for way in ("batched", "graphs")]
        launches = (f"{step['launches']}" for step in steps)
        yield f"{number}, {steps[0]['tokens']:,} each", *launches, *(_ms(step["ms"]) for step in steps)


@table("rests_on_card.json", *STEPS)
def short_prefills(record: Any) -> Iterable[Row]:
    yield (
        *("new tokens, tokens behind", "alone, ms", "together, ms", "as a graph, ms", "floor, ms"),
        *("graph over floor (2 wanted, lower is better)", "launches: alone", "together", "as a graph"),
    )
    cases: dict[tuple[int, tuple[int, ...]], dict[str, Any]] = {}
    for row in record["times"]:
        cases.setdefault((row["tokens"], tuple(row["new_tokens"])), {})[row["way"]] = row
    for (context, counts), ways in cases.items():
        listed = [ways[way] for way in ("alone", "together", "graphs")]
        sizes = " + ".join(f"{counts.count(size)} x {size}" for size in dict.fromkeys(counts))
        yield (
            f"{sizes}, {context:,} each",
            *(_ms(row["ms"]) for row in listed),
            f"{listed[2]['floor_ms']:.2f}",
            f"{listed[2]['times_floor']:.2f}",
            *(f"{row['launches']:,}" for row in listed),
        )


@table("rests_on_card.json", *STEPS)
def checked_short_prefills(record: Any) -> Iterable[Row]:
    yield "against each sequence alone", "logits equal", "window states equal", "bytes of the pool that are equal"
    for row in record["check"]:
        mode = "`--reproducible`" if row["reproducible"] else "default"
        said = ("yes" if row[key] else "no" for key in ("logits_equal", "states_equal"))
        yield f"{row['check']}, {mode}", *said, f"{row['rows_equal']:.2%}"


@table("packed_candidates.json", "kernels/antefix_kernels/packed_fp4_shared.py")
def candidate_products(record: Any) -> Iterable[Row]:
    tiles = ("128x16x4x3", "64x64x4x3", "128x64x4x3")
    yield "product", "tokens", "floor, ms", "kernel in use, ms", *(f"candidate, tile {tile[:-4]}, ms" for tile in tiles)
    for row in record["candidates"]:
        if "tiles" in row:
            times = (f"{row['tiles'][tile]:.3g}" for tile in tiles)
            name = row["name"].removeprefix("shared ").replace("fp4", "FP4")
            yield name, f"{row['tokens']:,}", f"{row['floor_ms']:.3g}", f"{row['in_use_ms']:.3g}", *times


@table("prefill_on_card.json", *KERNELS, "antefix/model")
def prefill_behind(record: Any) -> Iterable[Row]:
    yield "tokens behind a chunk of 8,192", "seconds", "tokens/s (higher is better)", *_FLOOR
    # The last chunk of the longest context lies within that context.
    longest = max(row["context"] for row in record["prefill"])
    for row in record["prefill"]:
        behind = row["context"] - (row["chunk"] if row["context"] == longest else 0)
        yield _chunk(behind, row, row["floor_s"])


@table("prefill_kinds.json", *KERNELS, "antefix/model")
def prefill_kinds(record: Any) -> Iterable[Row]:
    """One row for each kind of kernel, the longest first; a column for each context."""
    chunks = record["chunks"]
    columns = [f"behind {chunk['context']:,}: ms, share, fraction of the BF16 rate" for chunk in chunks]
    yield f"kind of kernel, {record['layers']} layers", *columns
    for kind in sorted(chunks[-1]["kinds"], key=lambda name: -chunks[-1]["kinds"][name]["ms"]):
        cells = []
        for chunk in chunks:
            of = chunk["kinds"][kind]
            rate = f", {of['of_rate']:.2f}" if "of_rate" in of else ""
            cells.append(f"{of['ms']:.1f}, {of['ms'] / chunk['ms']:.0%}{rate}")
        yield kind, *cells
    yield "all", *(f"{chunk['ms']:.1f}" for chunk in chunks)


_FLOOR = ("floor, s", "times the floor (2 wanted, lower is better)")


def _chunk(behind: int, row: Any, floor_s: float) -> Row:
    seconds, speed = row["chunk_s"], row["tokens_per_s"]
    return f"{behind:,}", f"{seconds:.2f}", f"{speed:,.0f}", f"{floor_s:.3f}", f"{seconds / floor_s:.1f}"


# Kernels and shapes of the short table: the table's name of a shape, then the record's, {} standing for each length.
_LENGTHS = ("8K", "64K", "256K", "1M")
_IN_SHORT = (
    ("pack_csa", "{} tokens", "{}", _LENGTHS[:3]),
    ("pack_keys", "{}", "{}", _LENGTHS[:3]),
    ("pack_hca", "{}", "{}", _LENGTHS[:3]),
    ("window_pack", "{}", "{}", _LENGTHS[:3]),
    ("window_pack", "slots in order: {}", "{} in order", _LENGTHS[:3]),
    ("unpack_entries", "{} entries", "{}", _LENGTHS[:3]),
    ("copy_records", "{}", "{}", _LENGTHS[:3]),
    ("index_scores", "decode, S=32: {}", "{} flash S=32 Q=1", _LENGTHS[1:]),
    ("indexer_topk", "decode, Flash, S=32: {}", "{} flash S=32 Q=1", _LENGTHS[1:]),
    ("index_scores", "prefill, Q=2048: {}", "{} flash S=1 Q=2048", _LENGTHS),
    ("indexer_topk", "prefill, Flash, Q=2048: {}", "{} flash S=1 Q=2048", _LENGTHS),
    ("sparse_attention", "decode, Flash, S=128: {}", "{} flash S=128 Q=1", _LENGTHS[1:]),
    ("sparse_attention", "decode, Pro, S=128: {}", "{} pro S=128 Q=1", _LENGTHS[1:]),
    ("sparse_attention", "prefill, Flash, Q=2048: {}", "{} flash S=1 Q=2048", _LENGTHS[1:]),
    ("sparse_attention", "prefill, Pro, Q=2048: {}", "{} pro S=1 Q=2048", _LENGTHS[1:]),
    ("hca_attention", "decode, Flash, S=32: {}", "{} flash S=32 Q=1", _LENGTHS[1:]),
    ("hca_attention", "decode, Pro, S=32: {}", "{} pro S=32 Q=1", _LENGTHS[1:]),
    ("hca_attention", "prefill, Flash, Q=2048: {}", "{} flash S=1 Q=2048", _LENGTHS[1:]),
    ("hca_attention", "prefill, Pro, Q=2048: {}", "{} pro S=1 Q=2048", _LENGTHS[1:]),
)


@table("kernels.json", *KERNELS)
def kernels_in_short(record: Any) -> Iterable[Row]:
    yield "kernel", "shape", "us (lower is better)", "of floor (1 is best)", "of bandwidth", "eager us", "times eager"
    found = {(row["kernel"], row["shape"]): row for row in record["rows"]}
    for kernel, said, shape, lengths in _IN_SHORT:
        rows = [found[kernel, shape.format(length)] for length in lengths]
        eager = [row for row in rows if row.get("eager_us")]
        yield (
            *(kernel, said.format(" / ".join(lengths))),
            " / ".join(f"{row['us']:.{1 if row['us'] < 99.95 else 0}f}" for row in rows),
            " / ".join(f"{row['fraction']:.2f}" for row in rows),
            " / ".join(f"{row['bandwidth_fraction']:.2f}" for row in rows),
            " / ".join(f"{row['eager_us']:.0f}" for row in eager),
            " / ".join(f"{row['eager_us'] / row['us']:.2g}" for row in eager),
        )


@table("sanitizer.json", *KERNELS)
def sanitizer(record: Any) -> Iterable[Row]:
    yield "tool", "parts that ended", "errors (0 wanted)"
    for row in record["tools"]:
        yield row["tool"], ", ".join(row["parts_ended"]), f"{row['errors']}"


@table("racecheck.json", *KERNELS)
def racecheck_by_part(record: Any) -> Iterable[Row]:
    yield "part", f"ended within {record['limit_s']} s", "errors until then (0 wanted)"
    for row in record["parts"]:
        yield row["part"], "yes" if row["ended"] else "no", f"{row['errors']}"


@table("verify_released_card.json", *KERNELS, "antefix/model", "console/antefix_console/verify")
def verified_released_on_a_card(record: Any) -> Iterable[Row]:
    yield (
        *("strategy", "plan", "cases per release", "equal to the bit: Flash, base release"),
        *("within bounds: Flash, base release", "failed: Flash, base release (0 wanted)"),
    )
    for row, other in zip(record["rows"], record["base_rows"], strict=True):
        counts = (f"{row[key]}, {other[key]}" for key in ("bit_identical", "within_bounds", "failed"))
        yield row["strategy"], row["plan"], f"{row['cases']}", *counts


@table("verify_released_cpu.json", "antefix/model", "console/antefix_console/verify")
def verified_released_on_a_cpu(record: Any) -> Iterable[Row]:
    yield "strategy", "cases per release", "equal to the bit: Flash, base release", "failed (0 wanted)"
    for row, other in zip(record["rows"], record["base_rows"], strict=True):
        equal, failed = (f"{row[key]}, {other[key]}" for key in ("bit_identical", "failed"))
        yield row["strategy"], f"{row['cases']}", equal, failed


@table("decode_products.json", "kernels/antefix_kernels/linear.py")
def products_of_few_rows(record: Any) -> Iterable[Row]:
    counts = (1, 32, 128)
    yield (
        "outputs x addends; us for many rows' tile, us for the best other one",
        *(f"{count} row{'s' * (count > 1)}" for count in counts),
    )
    for name, said in _FEW_ROWS.items():
        cells = []
        for count in counts:
            ours = [row for row in record["products"] if (row["name"], row["tokens"]) == (name, count)]
            before = next(row["us"] for row in ours if row["tile"] is None)
            best = min(row["us"] for row in ours if row["tile"] is not None and row["same_bits"])
            cells.append(f"{_ms(before)}, {_ms(best)}")
        yield said, *cells


@table("packed_products.json", *PRODUCTS)
def packed_products(record: Any) -> Iterable[Row]:
    counts = (1, 32, 128, 2048, 8192)
    yield (
        "product; ms (times the floor; times as fast as before)",
        *(f"{count:,} token{'s' * (count > 1)}" for count in counts),
    )
    found = {(row["name"], row["tokens"]): row for row in record["products"]}
    for name, said in _PRODUCT_NAMES.items():
        rows = [found[name, count] for count in counts]
        yield (
            said,
            *(f"{r['ms']:.3g} ({r['ms'] / r['floor_ms']:.1f}; {r['before_ms'] / r['ms']:.1f})" for r in rows),
        )


@table("packed_products.json", *PRODUCTS)
def layers_of_packed_products(record: Any) -> Iterable[Row]:
    yield (
        *("tokens", "experts, shared expert and routing, ms", "times as fast as before"),
        *("attention's projections, norms and turns, ms", "times as fast as before"),
    )
    for row in record["layers"]:
        yield (
            f"{row['tokens']:,}",
            f"{row['mlp_fp8_ms']:.2f}",
            f"{row['mlp_before_ms'] / row['mlp_fp8_ms']:.2f}",
            f"{row['projections_fp8_ms']:.3f}",
            f"{row['projections_before_ms'] / row['projections_fp8_ms']:.2f}",
        )


@table("weights_on_card.json", "antefix/model", "kernels/antefix_kernels")
def whole_steps(record: Any) -> Iterable[Row]:
    yield "36 layers, contexts of 8,192 tokens", "seconds", "floor, s", "times the floor (lower is better)", "tokens/s"
    model = record["model"]
    for row in model["decode"]:
        yield f"a decode step of {row['sequences']}", *_over_floor(row, "step_s")
    yield f"a prefill chunk of {model['prefill']['chunk']:,}", *_over_floor(model["prefill"], "chunk_s")


def _over_floor(row: Any, key: str) -> Row:
    ratio = row[key] / row["floor_s"]
    return f"{row[key]:.3g}", f"{row['floor_s']:.4f}", f"{ratio:,.3g}", f"{row['tokens_per_s']:,.1f}"


@table("card_restore.json", *KERNELS, "antefix/model", "prefill/antefix_prefill/worker")
def restored_on_a_card(record: Any) -> Iterable[Row]:
    yield from _restored(record, "checkpoint, ms")


@table("card_restore_h200.json", *KERNELS, "antefix/model", "prefill/antefix_prefill/worker")
def restored_on_an_h200(record: Any) -> Iterable[Row]:
    yield from _restored(record, "of the reading: checkpoint, ms")


def _restored(record: Any, checkpoint: str) -> Iterable[Row]:
    yield (
        *("tokens", "cold, ms", "restored, ms", "times (higher is better)", "look-up, ms", "reading, ms"),
        *("read, MB", "copy to the GPU, ms", checkpoint, "recomputing 100 tokens, ms", "other, ms"),
    )
    for row in record["rows"]:
        cold, hit = row["cold"]["until_logits_s"], row["checkpoint"]
        reading_s = hit.get("reading_s", hit["read_s"])
        parts = [f"{1000 * hit[key]:.1f}" for key in ("copy_to_card_s", "checkpoint_s", "compute_s", "other_s")]
        yield (
            f"{row['tokens']:,}",
            f"{1000 * cold:,.0f}",
            _ms(1000 * hit["until_logits_s"]),
            f"{cold / hit['until_logits_s']:.1f}",
            *(f"{1000 * seconds:.1f}" for seconds in (hit["lookup_s"], reading_s)),
            f"{hit['bytes_read'] / 1e6:.2g}",
            *parts,
        )


@table("steps_next_to_chunks.json", *KERNELS, "antefix/model", "prefill/antefix_prefill/worker")
def steps_next_to_chunks(record: Any) -> Iterable[Row]:
    yield (
        *("chunks run", "sequences", "a step alone, ms", "delay, p50, ms"),
        *("delay, p99, ms (50 wanted, lower is better)", "longest delay, ms", "the prompt, s", "steps meanwhile"),
    )
    for row in record["rows"]:
        delays = (f"{row[key]:.1f}" for key in ("step_alone_ms", "delay_p50_ms", "delay_p99_ms", "delay_max_ms"))
        yield row["way"], str(row["sequences"]), *delays, f"{row['prompt_s']:.2f}", str(row["num_steps"])


@table("card_transformers.json", *KERNELS, "antefix/model")
def next_to_transformers(record: Any) -> Iterable[Row]:
    yield "tokens", "transformers, ms", "ours, ms", "times as fast (higher is better)"
    for row in record["rows"]:
        theirs, ours = row["transformers_ms"], row["ours_ms"]
        yield f"{row['tokens']:,}", _ms(theirs), _ms(ours), f"{theirs / ours:.1f}"


@table("verify_card.json", *KERNELS, "antefix/model", "console/antefix_console/verify")
def verified_on_a_card(record: Any) -> Iterable[Row]:
    yield "command", "cases", "equal to the bit", "within bounds", "failed (0 wanted)"
    for run in [*record["parts"], record["fast"]]:
        counts = (run[key] for key in ("cases", "bit_identical", "within_bounds", "failed"))
        yield f"`{run['command']}`", *(f"{count:,}" for count in counts)
