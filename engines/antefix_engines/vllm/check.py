"""`antefix verify --engine vllm`: compares vLLM's answers from restored rows with its own, and plants faults.

One process computes prompts cold, stores them, and runs them again to hit vLLM's own cache. After it has ended, another
process restores them: the whole prompt, a fork inside it, five prompts at once, and for V4 a prompt that ends at the
end of a block. Tokens and log probabilities must equal the cold run's in all digits of a float. If vLLM's own hits
differ from its cold runs (MLA on a CPU, the uncached parts of several prompts in one batch), they must equal those of
its own hit. After that, bits in the store are flipped, which must give a miss, and one kind of KV is zeroed on restore,
which must be detected.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from antefix.errors import InternalError
from antefix_engines.verify import CheckRequest, Finding
from antefix_engines.vllm.check_models import (
    HYBRID,
    MLA,
    PLAIN,
    V4,
    VOCAB_SIZE,
    CheckModel,
    antefix_tier,
    llm_arguments,
    write_model,
)
from antefix_engines.vllm.faults import NONE
from antefix_engines.vllm.run_prompts import MARK

if importlib.util.find_spec("vllm") is None:
    raise ModuleNotFoundError("vllm is not installed", name="vllm")

NUM_TOKENS: Final = 4
NUM_STREAMS: Final = 5
STREAMS: Final = "prompts at once"
ENDS: Final = "a block's end"
FIRST_BLOCK: Final = "the first block's hit"
# Time limit of a process on a busy machine; with a GPU it takes seconds.
PROCESS_S: Final = 3600.0
Answers = dict[str, dict[str, Any]]


def findings(request: CheckRequest) -> Iterator[Finding]:
    """Check a V4 model and a plain one, with `is_long` also MLA and sliding windows; or the model that is given."""
    if request.model is not None:
        given = CheckModel(name=request.model.name, llm={}, hit_tokens=1, faults=())
        yield from _findings_of(given, request.model, request)
        return
    for model in (V4, PLAIN, MLA, HYBRID) if request.is_long else (V4, PLAIN):
        yield from _findings_of(model, write_model(model, request.scratch), request)


def _findings_of(model: CheckModel, path: Path, request: CheckRequest) -> Iterator[Finding]:
    prompts = prompts_of(random.Random(request.seed))
    if not model.tries_ends:
        del prompts[ENDS]
    if not model.hits_are_cold:
        # This model's bits depend on the other sequences of a batch, and restored prompts join a batch when they are
        # loaded.
        del prompts[STREAMS]
    data = request.scratch / f"data-{model.name.replace(' ', '-')}"
    revision = {"weights_revision": f"random-{model.name}"} if model.config else {}
    arguments = llm_arguments(model, path, [antefix_tier(data, **revision)])
    # 1. Run cold, and from vLLM's own cache, in one process. Only prompts on which others depend are stored.
    own_hits = [step for name in prompts for step in own_steps(name, prompts[name])]
    own = run_process({"llm": arguments, "steps": [*_first_block_steps(model, prompts["whole"][0]), *own_hits]})
    # 2. Restore in another process; between runs, vLLM's own caches are emptied.
    steps = [
        step for name, each in prompts.items() for step in (run_step(name, each, is_stored=False), {"do": "forget"})
    ]
    for fault in model.faults:
        steps += [{"do": "fault", "name": fault}, run_step(fault, prompts["whole"], is_stored=False), {"do": "forget"}]
    steps += [
        {"do": "fault", "name": NONE},
        {"do": "damage", "directory": str(data), "position": 2 * model.hit_tokens},
        run_step("damaged", prompts["whole"], is_stored=False),
    ]
    restored = run_process({"llm": arguments, "steps": steps})
    for name, each in prompts.items():
        yield from _compared(model, name, each, own, restored[name])
    for fault in model.faults:
        yield _planted(model, fault, own, restored[fault])
    if model.config:
        yield _missed(model, own, restored["damaged"])


def prompts_of(draw: random.Random) -> dict[str, list[list[int]]]:
    """Prompts, by the case that they test."""
    whole = [draw.randrange(2, VOCAB_SIZE) for _ in range(840)]
    fork = whole[:600] + [draw.randrange(2, VOCAB_SIZE) for _ in range(90)]
    streams = [[draw.randrange(2, VOCAB_SIZE) for _ in range(300)] for _ in range(NUM_STREAMS)]
    return {"whole": [whole], "a fork inside it": [fork], ENDS: [whole[:768]], STREAMS: streams}


def run_process(job: dict[str, Any]) -> Answers:
    """Run a job in a process. Returns the answers of all runs, by the runs' names. Raises: InternalError: it failed."""
    done = subprocess.run(
        [sys.executable, "-m", "antefix_engines.vllm.run_prompts"],
        input=json.dumps(job),
        text=True,
        capture_output=True,
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        timeout=PROCESS_S,
    )
    lines = [line[len(MARK) :] for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode:
        raise InternalError(f"vLLM ended with {done.returncode}: {done.stderr[-2000:]}")
    return {answer["name"]: answer for answer in map(json.loads, lines)}


def run_step(name: str, prompts: list[list[int]], *, is_stored: bool, is_cold: bool = False) -> dict[str, Any]:
    return {
        "do": "run",
        "name": name,
        "prompts": prompts,
        "num_tokens": NUM_TOKENS,
        "is_stored": is_stored,
        "is_cold": is_cold,
    }


def own_steps(name: str, prompts: list[list[int]]) -> list[dict[str, Any]]:
    """Runs that are computed cold, and runs that hit vLLM's own cache. Prompts that are to be stored come first;
    prompts that depend on them must not be in vLLM's cache before.
    """
    is_stored = name in ("whole", STREAMS)
    cold = run_step(name, prompts, is_cold=True, is_stored=is_stored)
    again = run_step(f"{name}, own cache", prompts, is_stored=False)
    return [cold, again] if is_stored else [again, cold]


def _first_block_steps(model: CheckModel, prompt: list[int]) -> list[dict[str, Any]]:
    """Runs that hit only the first block in vLLM's own cache: chunks then end at other positions than in a cold run."""
    begun = run_step("first block", [prompt[: model.hit_tokens + 8]], is_stored=False)
    return [begun, run_step(FIRST_BLOCK, [prompt], is_stored=False), {"do": "forget"}]


def _compared(
    model: CheckModel, name: str, prompts: list[list[int]], own: Answers, restored: dict[str, Any]
) -> Iterator[Finding]:
    for number, (prompt, other) in enumerate(zip(prompts, restored["answers"], strict=True)):
        told = _differs_from_both(own, name, number, other) or ("" if other["num_cached"] else "nothing was hit")
        yield Finding(
            subject=model.name,
            check=f"{name} {number + 1}" if len(prompts) > 1 else name,
            is_right=not told,
            num_tokens=len(prompt),
            num_cached=other["num_cached"],
            told=told,
        )


def _planted(model: CheckModel, fault: str, own: Answers, restored: dict[str, Any]) -> Finding:
    told = _differs_from_both(own, "whole", 0, restored["answers"][0])
    return Finding(
        subject=model.name,
        check=f"{fault} restored as zeros",
        is_right=bool(told),
        is_planted=True,
        num_cached=restored["answers"][0]["num_cached"],
        told=told or "it does not show",
    )


def _missed(model: CheckModel, own: Answers, restored: dict[str, Any]) -> Finding:
    """No row after the first block may be hit. The uncached tokens are computed, from token 0 or from the end of that
    block.
    """
    answer = restored["answers"][0]
    is_hit = answer["num_cached"] > model.hit_tokens
    told = f"{answer['num_cached']} tokens were hit, of which the block up to {2 * model.hit_tokens} is damaged"
    if not is_hit:
        told = difference(own["whole"]["answers"][0], answer) if model.hits_are_cold else ""
        told = told and difference(own[FIRST_BLOCK]["answers"][0], answer) and told
    return Finding(
        subject=model.name,
        check="a flipped bit",
        is_right=not told,
        num_cached=answer["num_cached"],
        told=told,
    )


def _differs_from_both(own: Answers, name: str, number: int, answer: dict[str, Any]) -> str:
    """The difference between an answer and the cold one, or that of a hit in vLLM's own cache; empty if it equals one
    of the two.
    """
    from_cold = difference(own[name]["answers"][number], answer)
    return from_cold and difference(own[f"{name}, own cache"]["answers"][number], answer) and from_cold


def difference(one: dict[str, Any], other: dict[str, Any]) -> str:
    """The difference between two answers; empty if there is none."""
    if one["tokens"] != other["tokens"]:
        return f"other tokens: {one['tokens']}, restored {other['tokens']}"
    largest = max(abs(a - b) for a, b in zip(one["logprobs"], other["logprobs"], strict=True))
    return f"log probabilities differ by up to {largest:.3g}" if largest else ""
