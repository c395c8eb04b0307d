"""Several outputs for one prompt, as OpenAI's APIs show them: numbered as they arrive, or only the best ones."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Sequence

from antefix_router.chat.messages import Delta
from antefix_router.front import Front
from antefix_router.gateway.output import Output
from antefix_router.open_bill import Bill


class Choices:
    """All outputs of one admitted request. If fewer are shown than made, those with the largest sum of log
    probabilities are shown, which is vLLM's ranking. The choices to show are known when all outputs have ended.
    """

    def __init__(self, front: Front, bill: Bill, outputs: Sequence[Output], *, num_shown: int) -> None:
        self._front = front
        self._bill = bill
        self._outputs = list(outputs)
        self._num_shown = num_shown

    @property
    def request_id(self) -> str:
        return self._bill.generation.request.request_id

    @property
    def shown(self) -> list[Output]:
        """The outputs to show, by number. With `best_of`, these outputs are known only after all outputs have ended."""
        return self._outputs[: self._num_shown]

    async def deltas(self, timeout_s: float, *, held: bool = False) -> AsyncGenerator[tuple[int, Delta], None]:
        """Pairs of an output's number and new text of that output. Closing this iterator early cancels the request.

        held: no part of the output is sent before all of the output is there.
        """
        if len(self._outputs) == 1:
            async with contextlib.aclosing(self._outputs[0].deltas(timeout_s, held=held)) as deltas:
                async for delta in deltas:
                    yield 0, delta
            return
        chooses = self._num_shown < len(self._outputs)
        self._bill.is_held = held or chooses
        kept: list[list[Delta]] = [[] for _ in self._outputs]
        async with contextlib.aclosing(self._front.run(self._bill, timeout_s)) as pieces:
            async for index, tokens in pieces:
                output = self._outputs[index]
                for delta in output.read(tokens):
                    if chooses:
                        kept[index].append(delta)
                    else:
                        yield index, delta
                if output.has_ended:
                    self._bill.generation.samples[index].end(output.num_output_tokens)
        for index, output in enumerate(self._outputs):
            output.is_held = held
            kept[index] += output.finish()
        if chooses:
            order = sorted(range(len(self._outputs)), key=lambda index: -self._outputs[index].total_logprob)
            self._outputs, kept = [self._outputs[index] for index in order], [kept[index] for index in order]
        for index, deltas_left in enumerate(kept[: self._num_shown]):
            for delta in deltas_left:
                yield index, delta
