"""Compiles decode attention's kernel with roles for Hopper, on any machine, and reports what orders the roles in PTX.

    python -m tests.kernels.compile_roles [--ptx FILE]

Prints JSON. `arrivals` has, for each arrival at an mbarrier, its source line and whether all the role's threads met
just before. `pairs` has, for each pair of accesses that racecheck named, the instructions that order them (only with
Triton 3.6, which cards run, because later versions give waits other lines). `states` is about the byte that tells a
warp its role: whether barriers order its writes and reads.

This is a separate program, because in a test's process Triton's interpreter replaces the kernels.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import triton

from antefix_kernels import decode_attention_hopper as roles
from antefix_kernels import operands
from antefix_kernels.decode_attention import sparse_attention
from tests.kernels.pretended_card import pretended_card

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


@dataclass(frozen=True, slots=True)
class Event:
    """A label, or an instruction that orders, reads or writes shared memory.

    line: its line in the Gluon source, or 0 if it comes from another file.
    """

    line: int
    kind: str
    text: str


def events_of(ptx: str) -> list[Event]:
    found, own, line = [], "", 0
    for number, path in re.findall(r'\.file\s+(\d+) "([^"]+)"', ptx):
        if path.endswith("/decode_attention_hopper.py"):
            own = number
    for text in ptx.splitlines():
        if place := re.match(r"\s*\.loc\s+(\d+) (\d+)", text):
            line = int(place[2]) if place[1] == own else 0
        elif "mbarrier.arrive" in text:
            found.append(Event(line, "arrive", text))
        elif "mbarrier.try_wait" in text:
            found.append(Event(line, "wait", text))
        elif re.search(r"\bbar\.sync\s+\d+, 128;", text):
            found.append(Event(line, "meet", text))
        elif "barrier.sync" in text:
            found.append(Event(line, "all", text))
        elif _SHARED.search(text):
            found.append(Event(line, "write" if re.search(r"\bst|\bred", text) else "read", text))
        elif re.match(r"\$L__BB", text):
            found.append(Event(line, "label", text))
    return found


def line_of(function: str, text: str) -> int:
    lines = Path(roles.__file__).read_text().splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith(f"def {function}("))
    return next(n for n, line in enumerate(lines) if n > start and text in line) + 1


def arrivals(events: list[Event]) -> list[dict[str, object]]:
    """Whether the last instruction before each arrival is a meeting of the role's threads.

    If so, all earlier work of each thread is done, whichever way the thread came here.
    """
    return [
        {"line": event.line, "all_met": events[n - 1].kind == "meet"}
        for n, event in enumerate(events) if event.kind == "arrive"
    ]  # fmt: skip


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
    """Whether all warps meet after the bytes with the warps' roles are written and before they are read."""
    reads = [n for n, e in enumerate(events) if "ld.shared.b8" in e.text]
    # The writes store constants, one byte per warp.
    constants = re.compile(r"global_smem\+\d+\], (\{\d+, \d+\}|\d+);")
    writes = [n for n, e in enumerate(events) if e.kind == "write" and constants.search(e.text)]
    return {
        "found": bool(reads) and bool(writes),
        "read_behind_a_meeting": all(events[n - 1].kind == "all" for n in reads),
        "written_before_one": all(any(e.kind == "all" for e in events[n : n + 12]) for n in writes),
    }


def compiled() -> str:
    """PTX of sparse decode attention of 128 sequences in V4-Flash's shapes."""
    with pretended_card() as found:
        sequences, heads, picks = 128, 64, 512

        def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="cuda:0")

        turns = (sequences, 32)
        sparse_attention(
            empty(sequences, heads, 512, dtype=torch.float16),
            empty(64, 32, 584, dtype=torch.uint8),
            empty(sequences, picks),
            empty(sequences),
            operands.Window(
                records=empty(1, 4096, 584, dtype=torch.uint8), firsts=empty(sequences), counts=empty(sequences)
            ),
            operands.Heads(
                sinks=empty(heads, dtype=torch.float32),
                scale=1.0,
                cos=empty(*turns, dtype=torch.float32),
                sin=empty(*turns, dtype=torch.float32),
            ),
            empty(sequences, heads, 512, dtype=torch.bfloat16),
        )
    assert not found.failures, found.failures
    ptx: str = found.newest["attend_kernel"].asm["ptx"]
    return ptx


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ptx", type=Path, help="leave the PTX there too")
    args = parser.parse_args()
    ptx = compiled()
    if args.ptx:
        args.ptx.write_text(ptx)
    events = events_of(ptx)
    told: dict[str, object] = {"arrivals": arrivals(events), "states": states(events)}
    if triton.__version__.startswith("3.6."):
        told["pairs"] = {name: chain(events, pair) for name, pair in PAIRS.items()}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
