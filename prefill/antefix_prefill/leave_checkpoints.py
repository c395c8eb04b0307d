"""Writes checkpoints: asks the window strategy where to leave them, and makes a record for each mark. Prefill and
decode share it.
"""

from __future__ import annotations

from antefix.model import WindowState
from antefix.window import Mark, OutputFacts, PromptFacts, Reason, Tier
from antefix_prefill.record_writer import RecordWriter
from antefix_prefill.restore import Prompt, Restored
from antefix_prefill.sealed_records import checkpoint_record
from antefix_prefill.worker.engine import Engine


def marks_for_prompt(engine: Engine, prompt: Prompt, restored: Restored) -> tuple[Mark, ...]:
    """The checkpoints to write while the rest of a prompt is computed."""
    facts = PromptFacts(
        num_tokens=prompt.num_tokens,
        num_stored_blocks=max(restored.num_stored_blocks, restored.plan.resume_block),
        resume_block=restored.plan.resume_block,
        checkpoints=restored.checkpoints,
        align_blocks=engine.align_blocks,
        budget=engine.budget.state,
    )
    marks = {mark.block: mark for mark in engine.strategy.at_prompt(facts, engine.sizes)}
    for num_tokens, ttl_s in prompt.breakpoints:
        # Whatever the strategy is, the client has said that later prompts will branch off here.
        block = num_tokens // engine.block_size // engine.align_blocks * engine.align_blocks
        if restored.plan.resume_block <= block and block and block not in restored.checkpoints:
            known = marks.get(block)
            marks[block] = Mark(
                block=block,
                reason=Reason.CLIENT,
                tier=Tier.DISK,
                ttl_s=max(ttl_s, known.ttl_s if known else 0.0),
                saved_tokens=engine.sizes.exact_replay_work_tokens,
            )
    return tuple(marks[block] for block in sorted(marks))


def marks_for_output(engine: Engine, *, num_tokens: int, prompt_tokens: int) -> tuple[Mark, ...]:
    """The checkpoints to write for an output; `num_tokens` counts the prompt as well."""
    facts = OutputFacts(
        num_tokens=num_tokens,
        prompt_tokens=prompt_tokens,
        align_blocks=engine.align_blocks,
        budget=engine.budget.state,
    )
    return engine.strategy.at_output(facts, engine.sizes)


async def leave_checkpoint(
    engine: Engine, prompt: Prompt, window: WindowState, mark: Mark, writer: RecordWriter
) -> None:
    """Queue the window state for the tier that the mark names. When this returns, `window` may be changed.

    Window state with NaN or infinity is not written; the same error shows in the logits, which fail the request.
    """
    data = await engine.copied(lambda: window.to_bytes() if window.is_usable else None)
    if data is None:
        return
    engine.budget.add(len(data))
    await writer.put(checkpoint_record(engine, prompt, mark, data), tier=mark.tier)
