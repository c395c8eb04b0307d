"""Other set-ups of this machine: processes with other numbers of threads and other code paths of the math library.

If two set-ups have the same name of arithmetic, one may hit what the other has stored. So set-ups with equal names must
compute equal bits. Each process runs the same prompts of the same models cold, and reports its arithmetic's name and
the results. Set-ups with different bits are no fault as long as the names of their arithmetic differ.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from antefix.errors import AntefixError
from antefix.layout import KVFormat
from antefix.model import probe
from antefix_console.verify.compare import RunOutcome
from antefix_console.verify.cuts import run_pieces
from antefix_console.verify.models import Subject, random_subject
from antefix_console.verify.paired_runs import WorkerPair
from antefix_console.verify.verdict import Cases, Report
from antefix_prefill.worker.compute_thread import ComputeThread

# Models with product shapes for which set-ups are known to differ: 24 columns, odd widths, three streams.
PLANS = ("pro", "odd-sizes")
_NUM_TOKENS = 41
# Variables with these prefixes are read when a library computes for the first time, so they need another process.
_LIBRARY_PREFIXES = ("MKL_", "ATEN_", "ONEDNN_", "DNNL_")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSetup:
    """variables: environment variables. threads: numbers of threads to try, one after another in one process."""

    threads: tuple[int, ...]
    variables: tuple[tuple[str, str], ...] = ()

    def label(self, threads: int) -> str:
        names = [f"{name}={value}" for name, value in self.variables]
        return ", ".join((f"{threads} thread{'s' * (threads > 1)}", *names))


SHORT_SETUPS = (ProcessSetup(threads=(2, 3)), ProcessSetup(threads=(1,), variables=(("MKL_CBWR", "COMPATIBLE"),)))
LONG_SETUPS = (
    *(ProcessSetup(threads=(number,)) for number in (2, 3, 4, 8, 16)),
    ProcessSetup(threads=(1, 3), variables=(("MKL_CBWR", "COMPATIBLE"),)),
    ProcessSetup(threads=(1, 3), variables=(("ATEN_CPU_CAPABILITY", "default"),)),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SetupSaid:
    """A set-up's arithmetic name for one model, and a digest of everything that a cold run left."""

    arithmetic: str
    bits: str


async def check_setups(setups: Sequence[ProcessSetup], report: Report) -> None:
    """Run the other processes at the same time, and compare each with this one."""
    others = [asyncio.create_task(_ask(setup)) for setup in setups]
    subjects = [random_subject(plan, KVFormat.FLOAT32) for plan in PLANS]
    here = [said(subject) for subject in subjects]
    for setup, answers in zip(setups, await asyncio.gather(*others), strict=True):
        for threads, models in zip(setup.threads, answers, strict=True):
            for subject, ours, theirs in zip(subjects, here, models, strict=True):
                cases = Cases(report=report, subject=subject.name, kv_format=subject.kv_format.value)
                _compare(subject, ours, theirs, setup.label(threads), cases)


def said(subject: Subject) -> SetupSaid:
    """This process's result, with the present number of threads."""
    workers = WorkerPair(subject, ComputeThread("set-up"), _NUM_TOKENS)
    tokens = np.random.default_rng(0).integers(0, subject.identity.vocab_size, _NUM_TOKENS).astype(np.uint32)
    # The last token is run alone, as in decode.
    outcome = run_pieces(workers, tokens, (_NUM_TOKENS - 1,))
    workers.compute.close()
    return SetupSaid(arithmetic=probe(subject.model).name, bits=_digest(outcome))


def _compare(subject: Subject, ours: SetupSaid, theirs: SetupSaid, label: str, cases: Cases) -> None:
    names = [
        subject.identity.fingerprint(subject.kv_format, arithmetic=each.arithmetic).digest for each in (ours, theirs)
    ]
    problem = ""
    if names[0] == names[1] and ours.bits != theirs.bits:
        problem = f"arithmetic: other bits under the same name with {label}"
    plan = "same name" if names[0] == names[1] else "named apart"
    cases.add("set-ups", plan, _NUM_TOKENS, problem=problem)


async def _ask(setup: ProcessSetup) -> list[list[SetupSaid]]:
    """Start a process with a certain set-up. Returns its results for each number of threads and each model.

    Raises:  AntefixError: the process failed.
    """
    plain = {name: value for name, value in os.environ.items() if not name.startswith(_LIBRARY_PREFIXES)}
    path = os.pathsep.join(entry for entry in sys.path if entry)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", __name__, json.dumps(setup.threads)),
        env=plain | {"PYTHONPATH": path, "OMP_WAIT_POLICY": "PASSIVE"} | dict(setup.variables),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    if process.returncode:
        last = err.decode(errors="replace").strip().rpartition("\n")[2]
        raise AntefixError(f"the verification process with {setup.label(setup.threads[0])} failed: {last}")
    return [[SetupSaid(**model) for model in models] for models in json.loads(out)]


def _digest(outcome: RunOutcome) -> str:
    state = hashlib.blake2b(digest_size=16)
    for part in (outcome.logits.tobytes(), outcome.rows.numpy().tobytes(), outcome.window.to_bytes()):
        state.update(part)
    return state.hexdigest()


def _main() -> None:
    answers = []
    subjects = [random_subject(plan, KVFormat.FLOAT32) for plan in PLANS]
    for threads in json.loads(sys.argv[1]):
        torch.set_num_threads(threads)
        answers.append([{"arithmetic": each.arithmetic, "bits": each.bits} for each in map(said, subjects)])
    print(json.dumps(answers))


if __name__ == "__main__":
    _main()
