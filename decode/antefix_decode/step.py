"""One step of the model for a batch of sequences: runs each one's chosen token, and after it a drafted one, if any.

    draft -> run both tokens -> keep the first -> the sampler chooses what follows -> if that is the draft, keep it too

A drafted token is kept only if the sampler chooses it from the main model's own logits. The sampler's random number
depends on seed and position alone, so the output is, token for token, the one without drafting, greedy or not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from antefix.errors import AntefixError
from antefix.model import Ran, Sequence, can_draft, draft, follow_ran, run_tokens
from antefix.sampling import Sampling
from antefix_decode.card_choice import Choice, Wish, choose_tokens
from antefix_decode.token_choice import Sampler
from antefix_prefill.worker.engine import Engine

# A sampler, and for how many of the likeliest tokens log probabilities are wanted; None: no log probabilities.
Chooser = tuple[Sampler, int | None]
_ANY = Wish(sampling=Sampling(max_tokens=1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Stepped:
    """A sequence after a step, which has advanced it by one token.

    drafted: the token that was run after the chosen one; None if none was. logits: [1 or 2, vocab] float32: for the
    token after the chosen one, and for the token after the drafted one.
    """

    number: int
    ran: Ran
    drafted: int | None
    logits: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenStep:
    """A sequence after a step that also chose the next token on the GPU; or the error that prevented it."""

    choice: Choice | AntefixError


def chooses_on_card(engine: Engine) -> bool:
    """Whether steps choose their tokens on the GPU. Models that draft do not choose on the GPU, because the host's
    choice is compared with the draft.
    """
    return engine.ops.step_runner is not None and not engine.model.mtp


def run_and_choose(
    engine: Engine, items: list[tuple[Sequence, int, bool]], choosers: list[Chooser]
) -> list[ChosenStep]:
    """`run_step` without drafts, which also chooses the next tokens on the GPU. Runs in the compute thread.

    choosers: for each item, its sampler, and for how many of the likeliest tokens log probabilities are wanted.
    """
    batch = [(sequence, np.array([token], np.uint32)) for sequence, token, _ in items]
    ran = run_tokens(engine.model, engine.pool, batch, ops=engine.ops)
    # While the GPU computes, the host evaluates the grammars.
    wishes = [_wish(sampler, sequence.position + 1, num_top)
              for (sequence, _, _), (sampler, num_top) in zip(items, choosers, strict=True)]  # fmt: skip
    fine = [wish if isinstance(wish, Wish) else _ANY for wish in wishes]
    choices = choose_tokens(ran.logits, fine)
    ran.keep_all()
    return [
        ChosenStep(choice=choice if isinstance(wish, Wish) else wish)
        for wish, choice in zip(wishes, choices, strict=True)
    ]


def _wish(sampler: Sampler, position: int, num_top: int | None) -> Wish | AntefixError:
    try:
        return sampler.wish(position, num_top)
    except AntefixError as err:
        return err  # for example an error of its grammar


def run_step(engine: Engine, items: list[tuple[Sequence, int, bool]]) -> list[Stepped]:
    """items: a sequence, its chosen token, and whether there is room for a second token. Runs in the compute thread."""
    drafted = _draft(engine, items)
    given = [[token] if extra is None else [token, extra] for (_, token, _), extra in zip(items, drafted, strict=True)]
    batch = [(item[0], np.array(tokens, np.uint32)) for item, tokens in zip(items, given, strict=True)]
    ran = run_tokens(engine.model, engine.pool, batch, logits="all", ops=engine.ops)
    logits = ran.logits.float().cpu().numpy()
    stepped = []
    for number, extra in enumerate(drafted):
        keep(engine, ran, number, batch[number], count=1)
        stepped.append(Stepped(number=number, ran=ran, drafted=extra, logits=logits[ran.rows(number)]))
    return stepped


def keep_drafted(engine: Engine, right: list[tuple[Sequence, Stepped]]) -> None:
    """This method must be called when drafted tokens were chosen: it advances these sequences past them. Runs in the
    compute thread.
    """
    for sequence, step in right:
        tokens = np.array([0, step.drafted], np.uint32)
        keep(engine, step.ran, step.number, (sequence, tokens), count=2)


def keep(engine: Engine, ran: Ran, number: int, item: tuple[Sequence, npt.NDArray[np.uint32]], *, count: int) -> None:
    """Keep the sequence's first `count` tokens, the last of which is new."""
    sequence, tokens = item
    ran.keep(number, count)
    if engine.model.mtp:
        new = tokens[count - 1 : count]
        follow_ran(engine.model, ran, number, sequence.window, new, stop=count, ops=engine.ops)


def _draft(engine: Engine, items: list[tuple[Sequence, int, bool]]) -> list[int | None]:
    able = [
        number
        for number, (sequence, _, has_room) in enumerate(items)
        if has_room and can_draft(engine.model, sequence.window)
    ]
    if not able:
        return [None] * len(items)
    windows = [items[number][0].window for number in able]
    found = draft(engine.model, windows, [items[number][1] for number in able], engine.ops)
    by_number = dict(zip(able, found, strict=True))
    return [by_number.get(number) for number in range(len(items))]
