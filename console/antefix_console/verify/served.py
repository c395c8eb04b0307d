"""Runs whole requests through a decode worker's service: alone, with others, and continued by another worker.

Tokens are sampled with a seed and have log probabilities, so two answers are equal only if every logit that mattered
was equal. A request that continues on another worker must draw the same random numbers as on the first one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence as Many
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from antefix.clients import Tokens
from antefix.sampling import Sampling
from antefix.store.api import Store
from antefix.tokenizer import Tokenizer
from antefix.v1 import decode_pb2
from antefix.window import PlanKind
from antefix.wire import (
    TokenLogprob,
    logprobs_from_wire,
    sampling_to_wire,
    tokens_from_wire,
    tokens_to_wire,
)
from antefix_console.verify.paired_runs import WorkerPair
from antefix_console.verify.stores import EmptyStore, MemoryStore
from antefix_console.verify.verdict import Cases
from antefix_decode.server import DecodeConfig, DecodeServicer

_NUM_TOP = 4
_TEMPERATURE = 0.9


@dataclass(frozen=True, slots=True)
class ServedAnswer:
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]

    def unlike(self, other: ServedAnswer) -> str:
        """Where another answer differs from this one; empty if the answers are equal."""
        for number, pair in enumerate(zip(self.tokens, other.tokens, strict=False)):
            if pair[0] != pair[1]:
                return f"output token {number} is {pair[1]}, not {pair[0]}"
            if self.logprobs[number] != other.logprobs[number]:
                return f"log probabilities of output token {number} differ"
        if len(self.tokens) != len(other.tokens):
            return f"{len(other.tokens)} output tokens, not {len(self.tokens)}"
        return ""


async def check_served(workers: WorkerPair, prompts: Many[Tokens], cases: Cases, *, num_tokens: int) -> None:
    """prompts: of different lengths. num_tokens: tokens of each answer."""
    # 1. Each request alone, cold.
    alone = []
    for n, prompt in enumerate(prompts):
        server = _Server(workers, EmptyStore(), PlanKind.COLD, [prompt], num_tokens)
        alone.append(await server.ask(prompt, n, num_tokens))
        await server.close()
    # 2. All at once, twice: the second time they hit what the first time stored.
    store = MemoryStore()
    for plan in (PlanKind.COLD, PlanKind.REPLAY):
        server = _Server(workers, store, plan, prompts, num_tokens)
        answers = await asyncio.gather(*(server.ask(prompt, n, num_tokens) for n, prompt in enumerate(prompts)))
        await server.close()
        for prompt, wanted, got in zip(prompts, alone, answers, strict=True):
            cases.add("served", f"batch, {plan.value}", len(prompt), problem=wanted.unlike(got))
    # 3. Another worker continues an answer from its middle.
    number, prompt, wanted = 0, prompts[0], alone[0]
    for emitted in (1, num_tokens // 2):
        server = _Server(workers, store, PlanKind.REPLAY, prompts, num_tokens)
        longer = np.concatenate((prompt, np.array(wanted.tokens[:emitted], np.uint32)))
        got = await server.ask(longer, number, num_tokens, num_emitted=emitted)
        await server.close()
        rest = ServedAnswer(wanted.tokens[emitted:], wanted.logprobs[emitted:])
        problem = rest.unlike(got)
        cases.add("served", "continued", len(longer), problem=problem and f"continued after {emitted}: {problem}")


# Random models have no tokenizer. Without grammars, a worker needs only the end tokens from it.
_NO_TEXT = cast(Tokenizer, SimpleNamespace(eos_ids=frozenset(), special_ids=frozenset()))


class _Server:
    """A decode worker, called as its service calls it, without a network."""

    def __init__(
        self, workers: WorkerPair, store: Store, kind: PlanKind, prompts: Many[Tokens], num_tokens: int
    ) -> None:
        size = workers.subject.block_size
        room = sum(-(-(len(prompt) + num_tokens) // size) + 2 for prompt in prompts) * size
        self._engine = workers.new(store, room, kind=kind)
        config = DecodeConfig(model=workers.subject.name, store_address="none", secret_file="none")
        self._servicer = DecodeServicer(self._engine, _NO_TEXT, config)

    async def ask(self, prompt: Tokens, seed: int, num_tokens: int, *, num_emitted: int = 0) -> ServedAnswer:
        sampling = Sampling(max_tokens=num_tokens, temperature=_TEMPERATURE, seed=seed, num_top_logprobs=_NUM_TOP)
        request = decode_pb2.DecodeRequest(
            prompt=tokens_to_wire(prompt), sampling=sampling_to_wire(sampling), num_emitted=num_emitted
        )
        tokens: list[int] = []
        logprobs: list[TokenLogprob] = []
        async for message in self._servicer.Decode(request, cast(Any, None)):
            tokens += [int(token) for token in tokens_from_wire(message.tokens)]
            logprobs += logprobs_from_wire(message.logprobs)
        return ServedAnswer(tuple(tokens), tuple(logprobs))

    async def close(self) -> None:
        await self._servicer.scheduler.close()
