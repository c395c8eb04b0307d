"""`antefix verify` over ranks: all its parts, and a fault in the ranks that it must find."""

import asyncio

import numpy as np
import pytest
import torch

from antefix.layout import KVFormat
from antefix.model.ranks import Ranks
from antefix_console.verify.models import Subject, config_of, make_share, random_subject
from antefix_console.verify.stores import MemoryStore
from antefix_console.verify.suite import Coverage, Suite
from antefix_console.verify.verdict import Report
from tests.model.rank_threads import over_ranks

SMALL = Coverage(
    num_blocks=3, num_output_blocks=0, num_forks=0, num_handoffs=1, bounded_windows=(), every_pair=False, num_cuts=1,
    num_served=1, is_extreme=True,
)  # fmt: skip
NAME, FORMAT = "odd-sizes", KVFormat.FLOAT32


def verified(parts: tuple[str, ...]) -> Report:
    alone = random_subject(NAME, FORMAT)
    report = Report()
    settings = {"fields": config_of(NAME), "kv_format": FORMAT, "seed": 1}
    with over_ranks(2, lambda ranks: make_share(ranks, "cpu", **settings)) as (model, _):
        subject = Subject(name=NAME, identity=alone.identity, model=model, alone=lambda: alone)
        asyncio.run(Suite(subject, MemoryStore(), SMALL, report, lambda _: None).run(("zero",), parts))
    return report


@pytest.mark.slow
def test_hits_over_two_ranks_equal_cold_runs_to_the_bit() -> None:
    report = verified(("conversations", "handoffs", "served", "ranks"))
    assert not report.failures
    assert report.total.bit_identical == report.total.cases > 8
    assert {"zero", "handoff", "served", "ranks"} <= set(report.by_plan)


@pytest.mark.slow
def test_ranks_that_are_gathered_in_another_order_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(self: Ranks, x: torch.Tensor) -> torch.Tensor:
        return torch.cat(self._gather(x.contiguous())[::-1], 1)

    monkeypatch.setattr(Ranks, "gather", gather)
    report = verified(("ranks",))
    assert any("ranks and one" in failure for failure in map(str, report.failures))


def test_a_share_that_is_cut_from_a_whole_is_what_a_load_would_give() -> None:
    whole = random_subject(NAME, FORMAT).model.state_dict()
    settings = {"fields": config_of(NAME), "kv_format": FORMAT, "seed": 1}
    parts = [make_share(Ranks(rank=rank, size=2), "cpu", **settings).state_dict() for rank in range(2)]
    split = [name for name, tensor in whole.items() if parts[0][name].shape != tensor.shape]
    assert all(torch.equal(torch.cat([part[name] for part in parts]), whole[name]) for name in split)
    # In each of three layers wq_b, wo_a, sinks and both stacks of experts are split.
    assert len(split) == 3 * 5
    assert np.array_equal(sorted(parts[1]), sorted(whole))
