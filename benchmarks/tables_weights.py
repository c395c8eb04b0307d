"""Tables of released weights on a GPU: loading, time to first token, experts in host memory, drafting.

benchmarks/tables.py says how tables are made.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.tables import Row, table

MODEL = ("antefix/model", "kernels/antefix_kernels")


@table("loading_on_card.json", "antefix/model/loading.py", "antefix/model/read_spans.py")
def loaded_onto_a_card(record: Any) -> Iterable[Row]:
    yield "read from", "seconds", "GB/s", "times the disk's direct reads (higher is better)", "host memory it took, GB"
    direct = max(record["direct_1_mib_gb_per_s"], record["direct_8_mib_by_8_gb_per_s"])
    for row in record["rows"]:
        over = f"{row['gb_per_s'] / direct:.2f}" if row["from"] == "disk" else ""
        yield row["from"], f"{row['s']:.1f}", f"{row['gb_per_s']:.2f}", over, f"{row['host_gb_peak']:.2f}"


@table("restore_released.json", *MODEL, "prefill/antefix_prefill/worker")
def restored_released(record: Any) -> Iterable[Row]:
    yield (
        *("prefix, tokens", "how", "seconds to the logits (lower is better)", "floor, s", "times the floor"),
        *("times as fast as cold", "read, MB"),
    )
    for row in record["restore"]:
        cold = row["cold"]["until_logits_s"]
        yield f"{row['tokens']:,}", "cold", _s(cold), _s(row["cold_floor_s"]), f"{row['cold_over']:.1f}", "", ""
        for name, said in (("disk", "from disk"), ("page_cache", "from the page cache")):
            hit = row[f"from_{name}"]
            yield (
                *(f"{row['tokens']:,}", said, _s(hit["until_logits_s"]), _s(row[f"from_{name}_floor_s"])),
                *(f"{row[f'from_{name}_over']:.1f}", f"{row[f'times_{name}']:.0f}", f"{hit['bytes_read'] / 1e6:.0f}"),
            )


@table("restore_released.json", *MODEL, "prefill/antefix_prefill/worker")
def parts_of_restores(record: Any) -> Iterable[Row]:
    yield "prefix, tokens", "from", "reading, ms", "copying to the GPU, ms", "computing 100 tokens, ms", "rest, ms"
    for row in record["restore"]:
        for name, said in (("disk", "disk"), ("page_cache", "page cache")):
            hit = row[f"from_{name}"]
            rest = hit["other_s"] + hit["lookup_s"] + hit["checkpoint_s"]
            seconds = (hit["read_s"], hit["copy_to_card_s"], hit["compute_s"], rest)
            yield f"{row['tokens']:,}", said, *(f"{1e3 * each:.1f}" for each in seconds)


@table("offloaded_experts.json", *MODEL)
def offloaded_experts(record: Any) -> Iterable[Row]:
    cases = [key for key in record["rows"][0] if key.startswith(("step", "chunk"))]
    yield (
        *("experts on the host", "GB on the host", "GB on the GPU", "GB fetched per pass"),
        *(f"a {case}, ms (times the floor, lower is better)" for case in cases),
    )
    for row in record["rows"]:
        cells = (f"{1e3 * row[case]['s']:.1f} ({row[case]['over']:.1f})" for case in cases)
        sizes = (f"{row.get(key, 0):.1f}" for key in ("host_gb", "card_gb", "fetched_gb"))
        yield f"{row['share']:.0%}", *sizes, *cells


@table("drafting_on_card.json", *MODEL, "decode/antefix_decode")
def drafted_steps(record: Any) -> Iterable[Row]:
    yield "sequences", "drafts", "ms per step", "tokens per step", "tokens/s (higher is better)", "pays from"
    for row in record["times"]:
        pays = ""
        if row["way"] != "plain":
            # A step gives at most one more token than one without drafts.
            pays = f"{row['pays_from']:.0%} right drafts" if row["pays_from"] <= 1 else "never"
        speeds = (f"{row['ms_per_step']:.1f}", f"{row['tokens_per_step']:.1f}", f"{row['tokens_per_s']:,.0f}")
        yield f"{row['sequences']}", "none" if row["way"] == "plain" else row["way"].split()[0], *speeds, pays


@table("drafting_check.json", *MODEL, "decode/antefix_decode")
def drafting_checks(record: Any) -> Iterable[Row]:
    yield (
        *("kernels", "tokens chosen", "drafts", "drafted", "kept"),
        *("answers equal to those without drafting", "tokens equal"),
    )
    for row in record["check"]:
        for name, said in (("own", "the layer's own"), ("right", "three in five right")):
            yield (
                *("reproducible" if row["reproducible"] else "faster", row["sampling"], said),
                *(f"{row[f'{name}_drafted']}", f"{row[f'{name}_kept']}"),
                *(f"{row[f'{name}_equal_answers']} of {row['answers']}",),
                *(f"{row[f'{name}_equal_tokens']} of {row['tokens']}",),
            )


@table("failed_recordings.json", "antefix/model/step_runner.py")
def failed_recordings(record: Any) -> Iterable[Row]:
    yield "what happened before", "the worker's stream is", "outcomes", "unlike the first cold run (0 wanted)"
    for row in record["rows"]:
        yield row["after"], "its own" if row["stream"] == "default" else "another", f"{row['cases']}", f"{row['wrong']}"


def _s(seconds: float) -> str:
    return f"{seconds:.3f}" if seconds < 1 else f"{seconds:.2f}"
