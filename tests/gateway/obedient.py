"""Workers that draw random tokens as a request's grammar and settings allow, for schemas beyond any script."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from antefix.grammar import Vocabulary
from antefix.restore_report import RestoreReport
from antefix.tokenizer import load_tokenizer
from antefix.wire import TokenLogprob
from antefix_decode.grammar_state import Grammars, Matcher
from antefix_decode.penalties import Penalties
from antefix_decode.stopping import Stopper
from antefix_decode.token_choice import Sampler
from antefix_router.generation import OutputPiece
from tests.gateway.scripted import MODEL

VOCAB_SIZE = 264
TOKENIZER = load_tokenizer(MODEL)
# Closing characters are likelier, so that texts and lists end. Some patterns need a letter.
CLOSERS = [ord(char) for char in '"]}<ab'] + sorted(TOKENIZER.eos_ids)


_TAGS = [list(tag.encode()) for tag in ("</｜DSML｜parameter>", "</think>")]


def random_logits(seed: int, before: Sequence[int]) -> np.ndarray:
    """Random logits for the token after these. A closing tag that was begun is usually continued."""
    noise = np.random.default_rng((seed, len(before))).normal(size=VOCAB_SIZE).astype(np.float32)
    logits = noise.copy()
    logits[CLOSERS] += 3.0
    logits[128:256] -= 4.0
    for tag in _TAGS:
        for size in range(1, len(tag)):
            if list(before[-size:]) == tag[:size]:
                logits[tag[size]] = 8.0 + noise[tag[size]]
    return logits


def walk(matcher: Matcher, seed: int, num_max: int = 4000) -> list[int]:
    """Random tokens that a grammar allows, up to its end."""
    tokens: list[int] = []
    while not matcher.is_over:
        token = int(np.argmax(matcher.mask(random_logits(seed, tokens))))
        matcher.push(token)
        if token in TOKENIZER.eos_ids:
            return tokens
        tokens.append(token)
        assert len(tokens) < num_max, bytes(tokens[:400])
    return tokens


def text_of(tokens: Sequence[int]) -> str:
    return bytes(tokens).decode()


@dataclass
class Obedient:
    """Workers of a router that draw random allowed tokens."""

    seed: int = 0
    generations: list = field(default_factory=list)
    _grammars: Grammars | None = None

    async def run(self, generation, timeout_s):
        self.generations.append(generation)
        self._grammars = self._grammars or Grammars(Vocabulary(TOKENIZER, VOCAB_SIZE))
        num_tokens = len(generation.tokens)
        generation.restore = RestoreReport(plan="cold", miss_tokens=num_tokens)
        for index, sample in enumerate(generation.samples):
            # The draw follows the request's settings and is never greedy, because greedy choices of random logits may
            # never end.
            sampling = replace(generation.sampling(index), num_top_logprobs=None)
            grammar = sampling.grammar
            constraint = await self._grammars.matcher(grammar) if grammar else None
            penalties = Penalties(sampling, stop_ids=TOKENIZER.eos_ids, prompt=generation.tokens)
            sampler, stopper = Sampler(sampling, penalties, constraint), Stopper(sampling, TOKENIZER.eos_ids)
            while not stopper.finish_reason and not sample.is_ended:
                token = sampler.choose(random_logits(self.seed, sample.emitted), num_tokens + len(sample.emitted))
                shown = stopper.push(token, is_last=sampler.is_over)
                sample.emitted += shown
                if generation.request.sampling.num_top_logprobs is not None:
                    sample.logprobs += [TokenLogprob(logprob=-float(each)) for each in shown]
                if shown:
                    yield OutputPiece(index, np.array(shown, np.uint32))
                await asyncio.sleep(0)
            sample.finish_reason = stopper.finish_reason or "stop"
