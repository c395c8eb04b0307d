"""The figures of docs/results/window_state.md, from their own traces. Skipped if the traces are missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from antefix.window import parse
from antefix_simulate.machine import RATE_CARDS, Machine, model_sizes
from antefix_simulate.simulated_store import StoreLimits
from antefix_simulate.trace import Trace, load
from antefix_simulate.trace_replay import ReplaySetup, ideal_hit_tokens, simulate

TRACES = Path(__file__).resolve().parents[3] / "shared" / "traces"
SETUP = ReplaySetup(
    sizes=model_sizes("v4-flash"), machine=Machine(), card=RATE_CARDS["v4-flash"], limits=StoreLimits(), replay=True
)


def _load(name: str, trace_format: str) -> Trace:
    path = TRACES / name
    if not path.is_file():
        pytest.skip(f"the trace {name} is not next to the repository")
    return load(path, trace_format, block_size=128)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "trace_format", "share_of_ideal", "checkpoints_per_request"),
    [
        ("claude_code_80.jsonl.gz", "claude-code", 0.999, 1.3),
        ("mooncake_conversation.jsonl.gz", "mooncake", 0.985, 1.5),
        ("mooncake_synthetic.jsonl.gz", "mooncake", 0.985, 1.5),
    ],
)
def test_auto_is_near_ideal_with_few_checkpoints(
    name: str, trace_format: str, share_of_ideal: float, checkpoints_per_request: float
) -> None:
    result = simulate(_load(name, trace_format), parse("auto"), SETUP)
    # Here, replayed tokens do not count as hits.
    assert result.share_of_ideal >= share_of_ideal
    assert result.checkpoints_per_request <= checkpoints_per_request


@pytest.mark.parametrize(
    ("name", "trace_format", "rate"),
    [("mooncake_conversation.jsonl.gz", "mooncake", 0.373), ("mooncake_synthetic.jsonl.gz", "mooncake", 0.650)],
)
def test_the_ideal_is_the_published_block_prefix_hit_rate(name: str, trace_format: str, rate: float) -> None:
    trace = _load(name, trace_format)
    assert ideal_hit_tokens(trace) / trace.num_tokens == pytest.approx(rate, abs=0.001)
