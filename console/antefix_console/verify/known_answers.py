"""Known answers: logits of the fixed random models, computed by another implementation.

Comparing cold runs with hits cannot find an error that both have. So the last token's logits of one prompt are compared
with those of transformers, which are in known_answers.json (written and checked by
tests/console/test_known_answers.py). The KV is float32, so that no value is rounded to another one: set-ups differ in
the last digits only.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt

from antefix.clients import Tokens
from antefix.layout import KVFormat
from antefix_console.verify.compare import Difference
from antefix_console.verify.cuts import run_pieces
from antefix_console.verify.models import Subject, random_subject
from antefix_console.verify.paired_runs import WorkerPair
from antefix_console.verify.verdict import Cases, Report
from antefix_prefill.worker.compute_thread import ComputeThread

FILE = Path(__file__).with_name("known_answers.json")
# Relative to the largest logit. Two float32 implementations differ by 1e-5 here; a wrong entry, slot or position by
# 0.1.
BOUND = 1e-3


def prompt_of_answer(block_size: int, vocab_size: int) -> Tokens:
    """A prompt of some blocks and a remainder, so that every kind of state affects the last token."""
    num_tokens = max(2 * block_size, 40) + 3 if block_size < 64 else block_size + 35
    return (np.arange(num_tokens) ** 2 * 7 + np.arange(num_tokens) * 3).astype(np.uint32) % vocab_size


def check_answer(subject: Subject, report: Report) -> None:
    """Compare the model's logits with the known answer, if the model has one."""
    wanted = _answers().get(subject.name)
    if wanted is None:
        return
    twin = random_subject(subject.name, KVFormat.FLOAT32)
    tokens = prompt_of_answer(twin.block_size, twin.identity.vocab_size)
    workers = WorkerPair(twin, ComputeThread("known answer"), len(tokens))
    got = run_pieces(workers, tokens, ()).logits
    workers.compute.close()
    error = float(np.abs(got - wanted).max() / np.abs(wanted).max())
    found = Difference(identical=False, error=max(error, 1e-12), where="logits against transformers")
    # NaN is beyond any bound.
    problem = "" if error <= BOUND else f"logits are {error:.2g} of the largest away from transformers'"
    cases = Cases(report=report, subject=twin.name, kv_format=twin.kv_format.value)
    cases.add("known answer", "cold", len(tokens), found, bound=BOUND, problem=problem)


@functools.cache
def _answers() -> dict[str, npt.NDArray[np.float32]]:
    return {name: np.array(logits, np.float32) for name, logits in json.loads(FILE.read_text()).items()}
