"""The fixed strategies: they place checkpoints by position alone."""

from __future__ import annotations

from dataclasses import dataclass

from antefix.errors import ConfigError
from antefix.window.marks import Mark, OutputFacts, PromptFacts, Reason, aligned, output_marks, prompt_marks
from antefix.window.sizes import Sizes


@dataclass(frozen=True, slots=True)
class Zero:
    """No checkpoints are left: the window state of every hit is replayed."""

    def at_prompt(self, facts: PromptFacts, sizes: Sizes) -> tuple[Mark, ...]:
        return ()

    def at_output(self, facts: OutputFacts, sizes: Sizes) -> tuple[Mark, ...]:
        return ()

    def __str__(self) -> str:
        return "zero"


@dataclass(frozen=True, slots=True)
class Full:
    """A checkpoint at every block boundary: nothing is ever recomputed, at about seven times the bytes of global KV."""

    def at_prompt(self, facts: PromptFacts, sizes: Sizes) -> tuple[Mark, ...]:
        return _prompt_multiples(facts, sizes, facts.align_blocks, Reason.EVERY_BLOCK)

    def at_output(self, facts: OutputFacts, sizes: Sizes) -> tuple[Mark, ...]:
        return _output_multiples(facts, sizes, facts.align_blocks, Reason.EVERY_BLOCK)

    def __str__(self) -> str:
        return "full"


@dataclass(frozen=True, slots=True)
class Periodic:
    """A checkpoint every `period_tokens` tokens, counted from token 0, so that sequences with a common prefix share its
    checkpoints.
    """

    period_tokens: int

    def __post_init__(self) -> None:
        if self.period_tokens < 1:
            raise ConfigError(
                f"the window strategy periodic(p) needs a positive number of tokens p, is {self.period_tokens}"
            )

    def at_prompt(self, facts: PromptFacts, sizes: Sizes) -> tuple[Mark, ...]:
        return _prompt_multiples(facts, sizes, self._step(facts.align_blocks, sizes), Reason.PERIOD)

    def at_output(self, facts: OutputFacts, sizes: Sizes) -> tuple[Mark, ...]:
        return _output_multiples(facts, sizes, self._step(facts.align_blocks, sizes), Reason.PERIOD)

    def _step(self, align_blocks: int, sizes: Sizes) -> int:
        return -(-sizes.blocks_up(self.period_tokens) // align_blocks) * align_blocks

    def __str__(self) -> str:
        return f"periodic({self.period_tokens})"


@dataclass(frozen=True, slots=True)
class Boundary:
    """Checkpoints at the end of the prompt and at the end of the output, from which the next turn of a conversation
    resumes.
    """

    def at_prompt(self, facts: PromptFacts, sizes: Sizes) -> tuple[Mark, ...]:
        end = aligned(facts.num_tokens // sizes.block_size, facts.align_blocks)
        return prompt_marks(facts, sizes, [(end, Reason.PROMPT_END)])

    def at_output(self, facts: OutputFacts, sizes: Sizes) -> tuple[Mark, ...]:
        return output_marks(facts, sizes, output_end(facts, sizes))

    def __str__(self) -> str:
        return "boundary"


def output_end(facts: OutputFacts, sizes: Sizes) -> list[tuple[int, Reason]]:
    """The last block boundary of the output, if the output has a boundary of its own; without one, the output ends at
    the prompt's checkpoint.
    """
    end = aligned(facts.num_tokens // sizes.block_size, facts.align_blocks)
    return [(end, Reason.OUTPUT_END)] if end > facts.prompt_tokens // sizes.block_size else []


def _prompt_multiples(facts: PromptFacts, sizes: Sizes, step: int, reason: Reason) -> tuple[Mark, ...]:
    end = facts.num_tokens // sizes.block_size
    first = -(-max(facts.resume_block, 1) // step) * step
    return prompt_marks(facts, sizes, [(block, reason) for block in range(first, end + 1, step)])


def _output_multiples(facts: OutputFacts, sizes: Sizes, step: int, reason: Reason) -> tuple[Mark, ...]:
    first = (facts.prompt_tokens // sizes.block_size // step + 1) * step
    blocks = range(first, facts.num_tokens // sizes.block_size + 1, step)
    return output_marks(facts, sizes, [(block, reason) for block in blocks])
