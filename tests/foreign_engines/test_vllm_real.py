"""vLLM itself with the tier, on a CPU with the shim of `vllm_cpu/`: `make test-engines`. All models are random."""

import json
import shlex
import subprocess
import sys
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


def test_one_checkpoint_in_three_engines_is_stored_alike(tmp_path):
    """Compares entries. Rounding explains the differences, and could not explain another layout, order or rotation.

    The top layer's window has the largest differences, which have gone through all layers and the choice of experts.
    """
    report = tmp_path / "report.json"
    command = [
        sys.executable,
        vllm.REPO / "benchmarks" / "engines_three_way.py",
        "--vllm",
        vllm.PYTHON,
        "--json",
        report,
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=3500)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(report.read_text())["pairs"]
    assert len(found) == 3 and all(len(groups) == 14 for groups in found.values())
    for name, groups in found.items():
        unexplained = {(each["layer"], each["group"]) for each in groups if not each["is_explained"]}
        assert unexplained <= {(4, "window")}, name
        # If the order differed, only one in a hundred numbers would be equal.
        shares = {(each["layer"], each["group"]): each["share_rounded"] for each in groups}
        assert shares[0, "window"] > 0.7 and shares[4, "window"] > 0.1, name
        assert shares[2, "csa_main"] > 0.2 and shares[3, "hca_main"] > 0.2, name


TAKEN = """
import json, sys
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser
told = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(sys.argv[1:])
told.kv_connector = told.kv_transfer_config.kv_connector
names = ("block_size", "prefix_cache_retention_interval", "kv_cache_dtype", "kv_connector")
print(json.dumps({name: getattr(told, name) for name in names}))
"""


@pytest.mark.parametrize(
    ("document", "told"), [("docs/ENGINES.md", {"block_size": 256, "kv_cache_dtype": "fp8"}), ("README.md", {})]
)
def test_vllm_takes_the_documents_command(document, told):
    document = (vllm.REPO / document).read_text()
    (block,) = [piece for piece in document.split("```")[1::2] if "vllm serve" in piece]
    words = shlex.split(block[block.index("vllm serve") :].replace("\\\n", " "))[3:]
    done = run("-c", TAKEN, *words)
    assert done.stdout, done.stderr[-2000:]
    taken = json.loads(done.stdout.splitlines()[-1])
    told = {"prefix_cache_retention_interval": 2048, "kv_connector": "OffloadingConnector"} | told
    assert told.items() <= taken.items()


COUNTED = """
import json, sys
from pathlib import Path
from antefix_engines.vllm.check import run_process, run_step
from antefix_engines.vllm.check_models import PLAIN, antefix_tier, llm_arguments, write_model
scratch = Path(sys.argv[1])
tier = antefix_tier(scratch / "data", weights_revision="random")
llm = llm_arguments(PLAIN, write_model(PLAIN, scratch), [tier])
prompt = [list(range(2, 202))]
steps = [run_step("cold", prompt, is_stored=True, is_cold=True), {"do": "forget"}]
steps += [run_step("restored", prompt, is_stored=False), run_step("last", [[2, 3, 4]], is_stored=False)]
print(json.dumps(run_process({"llm": llm, "steps": steps})))
"""


def test_vllm_shows_the_tiers_counters(tmp_path):
    done = run("-c", COUNTED, tmp_path)
    assert done.stdout, done.stderr[-3000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    assert answers["restored"]["answers"][0]["num_cached"] == 192
    shown = answers["last"]["metrics"]
    assert (shown["antefix_vllm_stored_blocks"], shown["antefix_vllm_restored_blocks"]) == (6, 6)
