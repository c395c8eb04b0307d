"""What a replay that is too short costs: bits per byte and retrieval after a hit, by replay length and hit offset.

    python -m models.training.window_quality --model models/antefix-tiny --corpus .corpus --out window_quality.json

Every document is prefilled cold up to the hit. Then the window state is thrown away and rebuilt from the last k windows
of tokens and the stored global KV (k = 0: not at all), and the same continuation is run from there: the text that
follows, questions about facts planted shortly and long before the hit, and a question that the hit cuts in two. The
exact window state is the reference.
`python -m models.training.window_plot` draws the result.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from antefix.model import Sequence, WindowState
from benchmarks.run_record import write
from models.training import tasks
from models.training.cached import CachedModel, bits
from models.training.corpus import BOS, Tokens, load
from models.training.tasks import Fact, random_slice

OFFSETS = [1024, 4096, 16384]
# Windows replayed; the exact replay of all layers is measured next to them.
WINDOWS = [0, 1, 2, 3, 4, 6]
CONTINUATION = 1024
# Bytes after the hit over which bits are averaged apart.
SPANS = [(0, 64), (64, 256), (256, 1024)]
# How far before the hit a fact is planted: inside the window, just outside it, and far away.
NEAR, BEYOND, FAR = 40, 200, 800
# The question that the hit cuts in two is cut so many tokens before the answer's value.
CUT = 8
# Both endings of a prefix, text and half a question, lie within its last tokens.
ENDING = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A prefix [P] and what follows it, questions with the place of their answers; `asked` ends in half a question."""

    prefix: Tokens
    text: Tokens
    questions: dict[str, tuple[Tokens, slice]]
    asked: Tokens
    rest: tuple[Tokens, slice]


def make_document(rng: np.random.Generator, corpus: Tokens, offset: int) -> Document:
    """A prefix of exactly `offset` tokens that holds three facts, and the text that truly follows it."""
    body = random_slice(rng, corpus, offset + CONTINUATION + 1)
    prefix = body[:offset].copy()
    facts = tasks.random_facts(rng, 3, test=True)
    for fact, distance in zip(facts, (NEAR, BEYOND, FAR), strict=True):
        planted = tasks.encode(f"\n{fact.planted}{fact.value}.\n")
        # The statement ends `distance` tokens before the hit; the nearest one may reach over the window's edge.
        end = offset - distance
        prefix[end - len(planted) : end] = planted
    prefix[0] = BOS
    names = ("near", "beyond", "far")
    questions = {name: _question(fact) for name, fact in zip(names, facts, strict=True)}
    question, answer = _question(facts[2])
    cut = answer.start - CUT
    asked = np.concatenate([prefix[: offset - cut], question[:cut]])
    rest = question[cut:], slice(CUT, CUT + answer.stop - answer.start)
    return Document(prefix=prefix, text=body[offset:], questions=questions, asked=asked, rest=rest)


def _question(fact: Fact) -> tuple[Tokens, slice]:
    sequence = tasks.empty_sequence()
    tasks.add_question(sequence, fact)
    tokens = np.concatenate(sequence.tokens)
    # After the value come ".", <|end|> and <|user|>.
    return tokens, slice(len(tokens) - 3 - len(fact.value), len(tokens) - 3)


class Measurement:
    """Sums over documents, by replay length."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = defaultdict(list)

    def add_text(self, logits: Tensor, exact: Tensor, targets: Tokens) -> None:
        loss = bits(logits, targets)
        for low, high in SPANS:
            self.values[f"bits_{low}_{high}"].append(float(loss[low:high].mean()))
        divergence = torch.nn.functional.kl_div(
            logits.double().log_softmax(-1), exact.double().log_softmax(-1), reduction="none", log_target=True
        ).sum(-1)
        self.values["divergence_bits"].append(float(divergence.mean()) / float(np.log(2.0)))
        self.values["largest_difference"].append(float((logits - exact).abs().max()))

    def add_answer(self, name: str, right: bool) -> None:
        self.values[f"retrieval_{name}"].append(float(right))

    def summary(self) -> dict[str, float]:
        means = {name: float(np.mean(values)) for name, values in self.values.items()}
        means["largest_difference"] = max(self.values["largest_difference"])
        return means


def run_document(model: CachedModel, document: Document, windows: list[int], results: dict[int, Measurement]) -> None:
    """One document: prefill, then the continuations from every kind of window state."""
    geometry = model.layout.geometry
    # 1. Two cold prefixes that share all but their endings.
    base = model.start()
    shared = len(document.prefix) - ENDING
    model.extend(base, document.prefix[:shared])
    cold, asked = model.fork(base), model.fork(base)
    model.extend(cold, document.prefix[shared:])
    model.extend(asked, document.asked[shared:])
    exact = _continue(model, cold, document.text[:-1], cold.window)
    # 2. The same continuations from rebuilt window states.
    for count in windows:
        replay = geometry.replay_tokens if count < 0 else count * geometry.window
        window = model.replayed_window(cold, document.prefix, replay)
        results[count].add_text(_continue(model, cold, document.text[:-1], window), exact, document.text[1:])
        for name, (tokens, answer) in document.questions.items():
            results[count].add_answer(name, _answered(_continue(model, cold, tokens, window), tokens, answer))
        window = model.replayed_window(asked, document.asked, replay)
        tokens, answer = document.rest
        results[count].add_answer("cut", _answered(_continue(model, asked, tokens, window), tokens, answer))
    for sequence in (base, cold, asked):
        model.release(sequence)


def _continue(model: CachedModel, prefix: Sequence, tokens: Tokens, window: WindowState) -> Tensor:
    """Logits of tokens behind a prefix, from the given window state."""
    fork = model.fork(prefix, window.clone())
    logits = model.extend(fork, tokens)
    model.release(fork)
    return logits


def _answered(logits: Tensor, tokens: Tokens, answer: slice) -> bool:
    """Whether greedy decoding would give the whole value."""
    wanted = torch.from_numpy(tokens[answer].astype(np.int64))
    return torch.equal(logits[answer.start - 1 : answer.stop - 1].argmax(-1), wanted)


def measure(model: CachedModel, corpus: Tokens, *, documents: int, offsets: list[int]) -> dict[str, object]:
    """Every offset and replay length. A length of -1 windows stands for the exact replay."""
    rng = np.random.default_rng(3)
    by_offset: dict[str, dict[str, dict[str, float]]] = {}
    for offset in offsets:
        results = {count: Measurement() for count in [*WINDOWS, -1]}
        for _ in range(documents):
            run_document(model, make_document(rng, corpus, offset), list(results), results)
        by_offset[str(offset)] = {_label(count): result.summary() for count, result in results.items()}
        print(offset, json.dumps(by_offset[str(offset)]), flush=True)
    geometry = model.layout.geometry
    return {
        "documents": documents,
        "window": geometry.window,
        "replay_tokens": geometry.replay_tokens,
        "continuation": CONTINUATION,
        "offsets": by_offset,
    }


def _label(count: int) -> str:
    return "exact" if count < 0 else str(count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=24)
    parser.add_argument("--offsets", type=int, nargs="+", default=OFFSETS, help="multiples of the block size")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = CachedModel(arguments.model, num_tokens_max=max(arguments.offsets) + 2 * CONTINUATION + 1024)
    result = measure(
        model, load(arguments.corpus / "valid.xz"), documents=arguments.documents, offsets=arguments.offsets
    )
    write(arguments.out, result, "numpy", "torch")


if __name__ == "__main__":
    main()
