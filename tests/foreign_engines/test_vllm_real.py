"""vLLM itself over the tier: `make test-engines`. On a CPU, with the shim of `vllm_cpu/`; all models are random."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.foreign_engines import vllm_environment as vllm

pytestmark = [pytest.mark.engines, pytest.mark.services, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module", autouse=True)
def installed():
    if reason := vllm.missing():
        pytest.skip(reason)


def run(*arguments):
    return subprocess.run(
        [str(vllm.PYTHON), *map(str, arguments)], env=vllm.environment(), capture_output=True, text=True, timeout=3500
    )


def test_flash_is_laid_out_as_recorded():
    done = run(vllm.SHIM / "plan_flash.py")
    made = json.loads(done.stdout[done.stdout.index("\n{\n") if "\n{\n" in done.stdout else done.stdout.index("{") :])
    assert made == json.loads(Path(__file__).with_name("vllm_flash_plan.json").read_text())


def test_verify_finds_every_hit_equal_and_every_planted_fault(tmp_path):
    done = run("-m", "antefix_console", "verify", "--engine", "vllm", "--long", "--json", "--seed", 7)
    assert done.stdout.strip(), done.stderr[-3000:]
    told = json.loads(done.stdout.strip().splitlines()[-1])
    wrong = [finding for finding in told["findings"] if not finding["is_right"]]
    assert told["ok"] and not wrong, wrong
    subjects = {finding["subject"] for finding in told["findings"]}
    assert subjects == {"V4", "plain attention", "MLA", "sliding windows"}
    cached = {finding["check"]: finding["num_cached"] for finding in told["findings"] if finding["subject"] == "V4"}
    assert (cached["whole"], cached["a fork inside it"], cached["a block's end"]) == (768, 512, 512)
    assert cached["a flipped bit"] == 256
