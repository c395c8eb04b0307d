"""Selects the models, formats and cases to verify, in a short and a long form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from antefix.layout import KVFormat
from antefix_console.verify.drawn_models import drawn_subject
from antefix_console.verify.models import Subject, load_subject, random_subject
from antefix_console.verify.suite import LARGE_BLOCK, Coverage
from antefix_prefill.worker.rank_processes import RankProcesses

_FORMATS = (KVFormat.FP8, KVFormat.FLOAT32)
NUM_DRAWN_SHORT = 2
NUM_DRAWN_LONG = 40
# Plans whose layers and ratios are of interest. The other plans test one extreme, under two strategies only.
FULL_PLANS = ("flash", "pro", "small-ratios", "odd-ratios")
SERVED_PLAN = "pro"
# Blocks have 4 to 128 tokens in the random models and 64 in the shipped one. Short prompts are also decoded as a whole.
# Nine blocks: an exact replay of the shipped model takes seven, so replays for the last boundaries start inside the
# document.
SHORT_SHIPPED = Coverage(
    num_blocks=9,
    num_output_blocks=0,
    num_forks=1,
    num_handoffs=2,
    bounded_windows=(1,),
    every_pair=False,
    num_cuts=1,
    num_batches=1,
    stride=4,
)
SHORT_RANDOM = Coverage(
    num_blocks=7,
    num_output_blocks=1,
    num_forks=1,
    num_handoffs=4,
    bounded_windows=(1, 2),
    every_pair=False,
    num_cuts=2,
    num_batches=1,
)
# Checks that do not depend on a model's shape are run with one model only.
SHORT_SERVED = replace(SHORT_RANDOM, num_served=2)
SHORT_EXTREME = replace(
    SHORT_RANDOM,
    num_blocks=5,
    num_output_blocks=0,
    num_forks=0,
    num_handoffs=1,
    bounded_windows=(),
    num_cuts=1,
    is_extreme=True,
)
SHORT_DRAWN = replace(SHORT_EXTREME, num_served=2)
SHORT_LARGE_BLOCKS = Coverage(
    num_blocks=3, num_output_blocks=0, num_forks=1, num_handoffs=3, bounded_windows=(1,), every_pair=False, num_cuts=1
)
LONG_SHIPPED = Coverage(
    num_blocks=24,
    num_output_blocks=2,
    num_forks=4,
    num_handoffs=16,
    bounded_windows=(1, 2, 4),
    every_pair=True,
    num_cuts=12,
    num_batches=12,
    num_served=4,
)
LONG_RANDOM = replace(LONG_SHIPPED, num_output_blocks=3, num_forks=6, num_handoffs=32, num_cuts=24, num_batches=24)
LONG_EXTREME = replace(LONG_RANDOM, bounded_windows=(), num_served=8, is_extreme=True)
LONG_LARGE_BLOCKS = replace(LONG_SHIPPED, num_blocks=10, num_output_blocks=1, num_cuts=6, num_batches=6)


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """model: a directory, or None. plans: which of the fixed models are verified. num_drawn: None for the default
    number of the short or long form.

    ranks: processes over which every model is loaded; None for one process.
    """

    model: Path | None
    is_long: bool
    device: str
    plans: tuple[str, ...]
    seed: int
    num_drawn: int | None = None
    ranks: RankProcesses | None = None

    def subjects(self) -> Iterator[tuple[Subject, Coverage]]:
        """Load each model when it is needed. In the short form each plan is tried in one format, the formats in turn,
        and the model in the served format.

        On a GPU, all models use FP8, the format that the GPU kernels support.
        """
        formats = _FORMATS if self.device == "cpu" else _FORMATS[:1]
        for number, plan in enumerate(self.plans):
            which = number % len(formats)
            for kv_format in formats if self.is_long else formats[which : which + 1]:
                subject = random_subject(plan, kv_format, device=self.device, ranks=self.ranks)
                yield subject, self._seeded(self._coverage(subject, is_extreme=plan not in FULL_PLANS))
        form = NUM_DRAWN_LONG if self.is_long else NUM_DRAWN_SHORT
        for number in range(form if self.num_drawn is None else self.num_drawn):
            fp8_only = self.device != "cpu"
            subject = drawn_subject(self.seed, number, device=self.device, fp8_only=fp8_only, ranks=self.ranks)
            coverage = self._coverage(subject, is_extreme=True)
            yield subject, self._seeded(coverage if self.is_long else SHORT_DRAWN)
        for kv_format in formats if self.is_long else formats[:1]:
            if self.model is not None:
                subject = load_subject(self.model, kv_format, device=self.device, ranks=self.ranks)
                yield subject, self._seeded(LONG_SHIPPED if self.is_long else SHORT_SHIPPED)

    def _coverage(self, subject: Subject, *, is_extreme: bool) -> Coverage:
        if subject.block_size >= LARGE_BLOCK:
            return LONG_LARGE_BLOCKS if self.is_long else SHORT_LARGE_BLOCKS
        if is_extreme:
            return LONG_EXTREME if self.is_long else SHORT_EXTREME
        if self.is_long:
            return LONG_RANDOM
        return SHORT_SERVED if subject.name == SERVED_PLAN else SHORT_RANDOM

    def _seeded(self, coverage: Coverage) -> Coverage:
        return replace(coverage, seed=self.seed)


def strategies_of(subject: Subject, coverage: Coverage) -> tuple[str, ...]:
    if coverage.is_extreme:
        return "full", "zero"
    return "full", f"periodic({3 * subject.block_size})", "boundary", "auto", "zero"
