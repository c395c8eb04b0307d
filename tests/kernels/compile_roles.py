"""Compiles the kernels with roles for Hopper, on any machine, and reports what orders the roles in PTX.

    python -m tests.kernels.compile_roles [--ptx FOLDER]

Prints JSON, for each of FORMS. `arrivals` has, for each arrival at an mbarrier, its function, its source line and the
instruction before it: "meet" if all 128 threads of a role met just before, "warp" if all 32 threads of a warp did.
`turns` has, for each wait at an mbarrier, the instructions from there to the end of the loop's body. `states` is about
the byte that tells a warp its role: whether meetings of all warps order its writes and reads. Decode attention has
`pairs` too: for each pair of accesses that racecheck named, the instructions that order them (only with Triton 3.6,
which cards run, because later versions give waits other lines).

This is a separate program, because in a test's process Triton's interpreter replaces the kernels.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path

import torch
import triton

from antefix_kernels import decode_attention_hopper, index_scores_hopper, operands, prefill_attention_hopper
from antefix_kernels.decode_attention import sparse_attention
from antefix_kernels.index_scores import IndexQuery, index_scores
from antefix_kernels.prefill_attention import prefill_attention
from tests.kernels.pretended_card import pretended_card

DECODE_ATTENTION = Path(decode_attention_hopper.__file__)
INDEX_SCORES = Path(index_scores_hopper.__file__)
PREFILL_ATTENTION = Path(prefill_attention_hopper.__file__)
# For each pair: the first access, the arrival after it, the wait before the second access, and that access. Each is
# (function, text), and means the function's first source line that has the text.
PAIRS = {
    "shrinks, written and then read": (
        ("_scorer", "shrinks.index(buffer).store(shrink)"), ("_scorer", "mbarrier.arrive(ready.index(buffer)"),
        ("_summer", "mbarrier.wait(ready.index(buffer)"), ("_summer", "shrinks.index(buffer).load(rows)"),
    ),
    "shrinks, read and then written again": (
        ("_summer", "shrinks.index(buffer).load(rows)"), ("_summer", "mbarrier.arrive(empty.index(buffer)"),
        ("_scorer", "mbarrier.wait(full.index(buffer)"), ("_scorer", "shrinks.index(buffer).store(shrink)"),
    ),
    "inverses, written and then read": (
        ("_norm", "inverses.store(inverse)"), ("_scorer", "mbarrier.arrive(done"),
        ("_summer", "mbarrier.wait(done"), ("_summer", "inverses.load(rows)"),
    ),
}  # fmt: skip
_SHARED = re.compile(r"\b(ld|st|atom|red)\.shared|\b(stmatrix|ldmatrix)\b")
# An instruction is of the first kind whose pattern it has. Tensor cores start to read shared memory at "product", and
# have read it at "done". At "copy" the copy engine starts to write it. At "piece" a thread starts to copy 16 bytes, and
# at "copied" it arrives as soon as all that it started has been written.
_KINDS = {
    "copy": r"\bcp\.async\.bulk",
    "piece": r"\bcp\.async\.cg",
    "copied": r"\bcp\.async\.mbarrier\.arrive\.noinc",
    "arrive": r"mbarrier\.arrive",
    "wait": r"mbarrier\.try_wait",
    "meet": r"\bbar\.sync\s+\d+, 128;",
    "warp": r"\bbar\.warp\.sync\s+-1;",
    "all": r"barrier\.sync",
    "product": r"wgmma\.mma_async",
    "done": r"wgmma\.wait_group",
    "label": r"^\$L__BB",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Event:
    """A label, or an instruction that orders, reads or writes shared memory.

    line: its line in the kernel's source, or 0 if it comes from another file.
    """

    line: int
    kind: str
    text: str


def events_of(ptx: str, source: Path) -> list[Event]:
    found, own, line = [], "", 0
    for number, path in re.findall(r'\.file\s+(\d+) "([^"]+)"', ptx):
        if path.endswith(f"/{source.name}"):
            own = number
    for text in ptx.splitlines():
        if place := re.match(r"\s*\.loc\s+(\d+) (\d+)", text):
            line = int(place[2]) if place[1] == own else 0
        elif kind := next((kind for kind, pattern in _KINDS.items() if re.search(pattern, text)), None):
            found.append(Event(line, kind, text))
        elif _SHARED.search(text):
            found.append(Event(line, "write" if re.search(r"\bst|\bred", text) else "read", text))
    return found


def line_of(function: str, text: str) -> int:
    lines = DECODE_ATTENTION.read_text().splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith(f"def {function}("))
    return next(n for n, line in enumerate(lines) if n > start and text in line) + 1


def function_at(source: Path, line: int) -> str:
    """The function that has the line, or "" for line 0."""
    above = source.read_text().splitlines()[:line]
    return next((found[1] for text in reversed(above) if (found := re.match(r"def (\w+)\(", text))), "")


def arrivals(events: list[Event], source: Path) -> list[dict[str, object]]:
    """The kind of the last instruction before each arrival.

    If all threads of the role meet there, all earlier work of each thread is done, whichever way the thread came here.
    """
    return [
        {"function": function_at(source, event.line), "line": event.line, "before": events[n - 1].kind}
        for n, event in enumerate(events) if event.kind == "arrive"
    ]  # fmt: skip


def turns(events: list[Event]) -> list[list[str]]:
    """Kinds of the instructions from each wait to the next label, each kind once where it repeats."""
    ends = [n for n, e in enumerate(events) if e.kind == "label"] + [len(events)]
    waits = [n for n, e in enumerate(events) if e.kind == "wait"]
    bodies = [events[wait : next(end for end in ends if end > wait)] for wait in waits]
    return [[kind for kind, _ in groupby(e.kind for e in body)] for body in bodies]


def chain(events: list[Event], pair: tuple[tuple[str, str], ...]) -> list[str]:
    """Kinds of the first access, the instruction before the arrival, the arrival, the wait, and the second access."""
    first, arrival, wait, second = (line_of(*each) for each in pair)
    at = next(n for n, e in enumerate(events) if e.line == first and e.kind in ("write", "read"))
    arrive = next(n for n in range(at, len(events)) if events[n].kind == "arrive" and events[n].line == arrival)
    waited = max(n for n, e in enumerate(events) if e.kind == "wait" and e.line == wait)
    behind = (n for n in range(waited, len(events)) if events[n].line == second)
    then = next((n for n in behind if events[n].kind in ("write", "read")), None)
    if then is None:
        # In PTX the loop's end may come before its head.
        then = next(n for n, e in enumerate(events) if e.line == second and e.kind in ("write", "read"))
    return [events[at].kind, events[arrive - 1].kind, events[arrive].kind, events[waited].kind, events[then].kind]


def states(events: list[Event]) -> dict[str, bool]:
    """Whether all warps meet after the bytes with the warps' roles are written, before they are read, and between a
    read and the next write.
    """
    reads = [n for n, e in enumerate(events) if "ld.shared.b8" in e.text]
    # The writes store constants, one byte per warp, sometimes in several stores. What the roles take is written next to
    # them.
    constants = re.compile(r"global_smem\+\d+\], (\{\d+, \d+\}|\d+);")
    writes = [n for n, e in enumerate(events) if e.kind == "write" and constants.search(e.text)]
    after = [next((e.kind for e in events[n:] if e.kind != "write"), None) for n in writes]
    # No warp has met another before the first write, so none has read. Before a later write, all meet twice after the
    # earlier one: once before the reads, and once after them.
    between = [[e.kind for e in events[one:two] if e.kind != "label"] for one, two in pairwise(writes)]
    between = [kinds for kinds in between if set(kinds) != {"write"}]
    return {
        "found": bool(reads) and bool(between),
        "read_behind_a_meeting": all(events[n - 1].kind == "all" for n in reads),
        "written_before_one": all(kind == "all" for kind in after),
        "written_again_behind_one": all(kinds[-1] == "all" and kinds.count("all") >= 2 for kinds in between),
    }


def _empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda:0")


def attend() -> None:
    """Sparse decode attention of 128 sequences in V4-Flash's shapes."""
    sequences, heads, picks = 128, 64, 512
    sparse_attention(
        _empty(sequences, heads, 512, dtype=torch.float16),
        _empty(64, 32, 584, dtype=torch.uint8),
        _empty(sequences, picks),
        _empty(sequences),
        operands.Window(
            records=_empty(1, 4096, 584, dtype=torch.uint8), firsts=_empty(sequences), counts=_empty(sequences)
        ),
        operands.Heads(
            sinks=_empty(heads, dtype=torch.float32),
            scale=1.0,
            cos=_empty(sequences, 32, dtype=torch.float32),
            sin=_empty(sequences, 32, dtype=torch.float32),
        ),
        _empty(sequences, heads, 512, dtype=torch.bfloat16),
    )


def attend_chunk(*, picks: int | None) -> None:
    """Prefill attention of 2,048 queries in V4-Flash's shapes, to picked entries or to all."""
    queries, heads, entries, rows = 2048, 64, 8192, 2176
    prefill_attention(
        _empty(queries, heads, 512, dtype=torch.float16),
        _empty(1, entries + rows, 512, dtype=torch.float16),
        None if picks is None else _empty(queries, picks),
        _empty(queries),
        operands.Window(
            records=_empty(1, rows, 584, dtype=torch.uint8), firsts=_empty(queries), counts=_empty(queries)
        ),
        operands.Heads(
            sinks=_empty(heads, dtype=torch.float32),
            scale=1.0,
            cos=_empty(queries, 32, dtype=torch.float32),
            sin=_empty(queries, 32, dtype=torch.float32),
        ),
        _empty(queries, heads, 512, dtype=torch.bfloat16),
    )


def score(sequences: int, queries: int) -> None:
    """Index scores of a chunk of each sequence in V4's shapes, `queries` queries each."""
    blocks, entries = 1024, 32
    index_scores(
        IndexQuery(
            codes=_empty(sequences * queries, 64, 128, dtype=torch.float16),
            weights=_empty(sequences * queries, 64, dtype=torch.float32),
        ),
        _empty(64, entries, 68, dtype=torch.uint8),
        _empty(sequences, blocks),
        _empty(sequences * queries),
        blocks * entries,
        as_chunk=True,
    )


# Each form's source, kernel and launch. Triton compiles index scores of one query per sequence differently, because it
# takes a 1 for a constant. Index scores of decode have no roles.
FORMS: dict[str, tuple[Path, str, Callable[[], None]]] = {
    "decode attention": (DECODE_ATTENTION, "attend_kernel", attend),
    "prefill attention": (PREFILL_ATTENTION, "attend_kernel", lambda: attend_chunk(picks=None)),
    "prefill attention, picked": (PREFILL_ATTENTION, "attend_kernel", lambda: attend_chunk(picks=512)),
    "index scores": (INDEX_SCORES, "prefill_kernel", lambda: score(1, 2048)),
    "index scores, one query": (INDEX_SCORES, "prefill_kernel", lambda: score(128, 1)),
}


def compiled() -> dict[str, str]:
    """PTX of each of FORMS."""
    ptx: dict[str, str] = {}
    with pretended_card() as found:
        for name, (_, kernel, launch) in FORMS.items():
            launch()
            assert not found.failures, found.failures
            ptx[name] = found.newest[kernel].asm["ptx"]
    return ptx


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ptx", type=Path, help="leave the PTX in this folder too, a file per form")
    args = parser.parse_args()
    told: dict[str, dict[str, object]] = {}
    for name, ptx in compiled().items():
        source = FORMS[name][0]
        if args.ptx:
            args.ptx.mkdir(parents=True, exist_ok=True)
            (args.ptx / f"{name}.ptx").write_text(ptx)
        events = events_of(ptx, source)
        told[name] = {"arrivals": arrivals(events, source), "turns": turns(events), "states": states(events)}
        if source == DECODE_ATTENTION and triton.__version__.startswith("3.6."):
            told[name]["pairs"] = {pair: chain(events, each) for pair, each in PAIRS.items()}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
