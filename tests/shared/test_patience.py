"""Tests wait longer for peers than services do, in this process and in processes that tests start."""

import importlib
import subprocess
import sys

import pytest

from antefix.pulse import Pulse
from antefix.store.breaker import SLACK_S, Breaker
from tests.child_environment import child_environment
from tests.patient_services import sitecustomize

ASK = """
from antefix.clients import RouterClient
from antefix.linear_law import LinearLaw
from antefix.pulse import Pulse
from antefix.store.breaker import Breaker
print(Breaker()._slack_s, Pulse("a peer", print).limit_s, RouterClient.status.__kwdefaults__["timeout_s"])
law = LinearLaw((1.0,), (1.0,))
law.observe((1.0,), 50.0)
print(law.seconds((1.0,)))
"""


@pytest.mark.parametrize("module", sitecustomize.LIMITS)
def test_every_limit_is_one(module):
    for values, limit, longer_s in sitecustomize.limits_of(importlib.import_module(module)):
        assert isinstance(values[limit], float) and values[limit] <= longer_s, limit


def test_peers_are_waited_for():
    assert Breaker()._slack_s == Pulse("a peer", print).limit_s == sitecustomize.PATIENCE_S


@pytest.mark.impatient
def test_a_test_of_the_limits_has_those_of_services():
    assert Breaker()._slack_s == SLACK_S < Pulse("a peer", print).limit_s * 10 < sitecustomize.PATIENCE_S


@pytest.mark.services
def test_other_processes_have_the_longer_limits_too_and_learn_no_speeds():
    done = subprocess.run(
        [sys.executable, "-c", ASK], capture_output=True, text=True, env=child_environment(), check=True
    )
    assert done.stdout.split() == [str(sitecustomize.PATIENCE_S)] * 3 + ["1.0"]
