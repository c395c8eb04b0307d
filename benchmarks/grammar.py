"""What does a grammar cost per output token? Runs decode's own path for one sequence: mask, choice, push.

Times are processor times, so that they are the same on a busy machine.

The vocabulary is made up and has DeepSeek-V4's size: all bytes, then words of letters, drawn from a fixed seed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from antefix.grammar import Vocabulary
from antefix.sampling import Sampling
from antefix.tokenizer import ByteTokenizer
from antefix_decode.grammar_state import Grammars, Matcher
from antefix_decode.penalties import Penalties
from antefix_decode.token_choice import Sampler
from antefix_router.chat.answer_grammar import json_grammar
from antefix_router.chat.deepseek_v4 import DeepSeekV4Format
from antefix_router.chat.messages import ChatRole, Conversation, Message, ToolRule
from benchmarks.run_record import write

VOCAB_SIZE = 129_280
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}},
        "note": {"type": ["string", "null"]},
    },
    "required": ["name", "age", "tags", "note"],
    "additionalProperties": False,
}


class MadeUpTokenizer(ByteTokenizer):
    """A vocabulary of bytes, and of words of two to eight letters, half of which begin with a space."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__({"<|end|>": 256})
        draw = np.random.default_rng(0)
        sizes, letters = draw.integers(2, 9, vocab_size), draw.integers(97, 123, (vocab_size, 8), np.uint8)
        spaces = draw.integers(0, 2, vocab_size)
        self._words = [b" " * spaces[i] + letters[i, : sizes[i]].tobytes() for i in range(vocab_size)]
        self.num_tokens = vocab_size

    def token_bytes(self, token: int) -> bytes:
        return super().token_bytes(token) if token <= 256 else self._words[token]


def grammars() -> dict[str, str]:
    tool = {"name": "person", "parameters": SCHEMA}
    conversation = Conversation(
        messages=(Message(role=ChatRole.USER, content="x"),), tools=(tool,), tool_rule=ToolRule(must_call=True)
    )
    return {"json": json_grammar(SCHEMA), "forced call": DeepSeekV4Format().grammar(conversation)}


def follow(matcher: Matcher, num_tokens: int, logits: np.ndarray) -> tuple[list[float], list[float]]:
    """Processor microseconds for masks and for pushes; tokens are drawn uniformly from the allowed ones."""
    draw, mask_us, push_us = np.random.default_rng(1), list[float](), list[float]()
    while not matcher.is_over and len(mask_us) < num_tokens:
        started = time.process_time()
        masked = matcher.mask(logits)
        mask_us.append((time.process_time() - started) * 1e6)
        token = int(draw.choice(np.flatnonzero(np.isfinite(masked))))
        if token == 256:
            break
        started = time.process_time()
        matcher.push(token)
        push_us.append((time.process_time() - started) * 1e6)
    return mask_us, push_us


def spent_us(work: Callable[[], object], num_times: int = 50) -> float:
    started = time.process_time()
    for _ in range(num_times):
        work()
    return (time.process_time() - started) / num_times * 1e6


async def main(num_tokens: int, record: Path | None) -> None:
    started = time.process_time()
    vocabulary = Vocabulary(MadeUpTokenizer(VOCAB_SIZE), VOCAB_SIZE)
    report: dict[str, object] = {"vocabulary_s": round(time.process_time() - started, 2)}
    logits = np.random.default_rng(2).normal(size=VOCAB_SIZE).astype(np.float32)
    for name, grammar in grammars().items():
        ready = Grammars(vocabulary)
        started = time.process_time()
        matcher = await ready.matcher(grammar)
        ready_ms = (time.process_time() - started) * 1e3
        mask_us, push_us = follow(matcher, num_tokens, logits)
        report[name] = {
            "tokens": len(mask_us),
            "ready_ms": round(ready_ms, 2),
            "mask_us": round(float(np.mean(mask_us)), 1),
            "mask_us_p99": round(float(np.percentile(mask_us, 99)), 1),
            "push_us": round(float(np.mean(push_us)), 1),
        }
    settings = {"presence_penalty": 0.5, "repetition_penalty": 1.1, "logit_bias": ((5, 1.0),), "min_tokens": 9}
    sampling = Sampling(max_tokens=10, temperature=1.0, top_p=0.9, seed=1, **settings)  # type: ignore[arg-type]
    penalties = Penalties(sampling, stop_ids=[256], prompt=np.arange(8192), emitted=range(1000))
    plain = Sampler(Sampling(max_tokens=10, temperature=1.0, top_p=0.9, seed=1))
    report["choose_us"] = round(spent_us(lambda: plain.choose(logits, 0)), 1)
    report["penalties_us"] = round(spent_us(lambda: penalties.apply(logits)), 1)
    print(json.dumps(report, indent=2))
    if record is not None:
        write(record, report, "llguidance", "numpy")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=400, help="number of tokens to generate under each grammar")
    parser.add_argument("--json", type=Path, help="also write the record here")
    args = parser.parse_args()
    asyncio.run(main(args.tokens, args.json))
