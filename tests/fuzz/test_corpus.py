"""Every run tries the inputs that fuzzing found, and small changes of them; `make fuzz` looks for more."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from antefix.errors import InternalError, InvalidRequest
from tests.fuzz.run import effort_of, note, summary
from tests.fuzz.targets import TARGETS, target

CORPUS = Path(__file__).parent / "corpus"
NUM_CHANGES = 20
# Targets that send requests to an HTTP API, or import torch.
SLOW = {"http_bodies", "settings_files", "model_configs"}


def inputs(name):
    return [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]


def changed(data, draw):
    """One change that fuzzers make: cut, flip, repeat or insert."""
    at = draw.randrange(len(data) + 1)
    some = bytes(draw.choices((0, 1, 0x7F, 0x80, 0xFF, 0x30, 0x22, 0x5B), k=draw.randint(1, 4)))
    return draw.choice(
        (data[:at], data[:at] + some + data[at + len(some) :], data[:at] * 2, data[:at] + some + data[at:])
    )


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_known_and_what_is_near_it_is_read_or_refused(name):
    draw = random.Random(name)
    known = inputs(name)
    assert known
    for data in known:
        TARGETS[name](data)
        for _ in range(2 if name in SLOW else NUM_CHANGES):
            TARGETS[name](changed(data, draw))


def test_every_corpus_is_of_a_target_and_small():
    assert {path.name for path in CORPUS.iterdir()} == set(TARGETS)
    assert sum(path.stat().st_size for path in CORPUS.rglob("*")) < 150_000


def test_a_target_lets_errors_of_ours_through_and_nothing_else(monkeypatch):
    def reads(data):
        if data == b"refuse":
            raise InvalidRequest("no")
        if data == b"bug":
            raise InternalError("a bug")
        if data == b"long":
            raise InvalidRequest("x" * 100_000)
        if data == b"trace":
            raise KeyError("x")

    guarded = target(reads)
    del TARGETS["reads"]
    guarded(b"refuse")
    for data, error in ((b"bug", InternalError), (b"long", AssertionError), (b"trace", KeyError)):
        with pytest.raises(error):
            guarded(data)


def test_the_effort_of_a_run_is_read_from_what_libfuzzer_says():
    assert effort_of("#2\tINITED cov: 2\nDone 8950 runs in 11 second(s)\n") == (11.0, 8950)
    assert effort_of("#4096\tpulse  cov: 8 exec/s: 1024 rss: 60Mb\n==1== ERROR") == (4.0, 4096)
    assert effort_of("") == (0.0, 0)


def test_hours_add_up_over_runs(tmp_path):
    for name, crashed in (("a", False), ("a", True), ("b", False)):
        note(tmp_path / "hours.json", name, 1800.0, 10, crashed)
    told = summary(json.loads((tmp_path / "hours.json").read_text()))
    assert (told["hours"], told["executions"], told["crashes"]) == (1.5, 30, 1)
    assert told["targets"]["a"] == {"seconds": 3600.0, "executions": 20, "crashes": 1}


@pytest.mark.services
def test_without_atheris_it_says_how_to_get_it():
    probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec('atheris') is not None)"
    if subprocess.run([sys.executable, "-c", probe], check=False).returncode:
        pytest.skip("atheris is installed here")
    run = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.run", "sizes", "--seconds", "1"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 2 and "make fuzz" in run.stderr
