"""The wheel and the sdist: their contents, and that a clean environment outside the checkout runs from them.

The default run puts the wheel into an empty environment that sees this one's dependencies, but not this checkout. The
long run (`make test-wheel`) installs everything from the package index, including Hugging Face's `kernels`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.waiting import AT_MOST_S

pytestmark = pytest.mark.services


ROOT = Path(__file__).parents[2]
# Packages that roles without tensors must not import.
TENSORS = ("torch", "triton", "transformers", "safetensors")
# Foreign packages with our folders' names. `marker` distinguishes theirs from ours.
FOREIGN = ("kernels", "router", "prefill", "decode", "simulate")


def run(*command, timeout=AT_MOST_S, **options):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=timeout, **options)
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The sdist, and the wheel built from the unpacked sdist, as pip does if there is no wheel."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", out, cwd=ROOT)
    (sdist,) = out.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(out / "source", filter="data")
    (source,) = (out / "source").iterdir()
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", out, cwd=source)
    (wheel,) = out.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="session")
def environment(built, tmp_path_factory):
    """An empty environment with the wheel, foreign packages of our folders' names, and this one's dependencies."""
    directory = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", directory)
    # What a test imports is compiled when it is imported.
    pip = [sys.executable, "-m", "pip", "--python", directory / "bin/python", "install", "-q"]
    run(*pip, "--no-deps", "--no-compile", built[1])
    (site,) = directory.glob("lib/python3*/site-packages")
    # A path in a .pth file is not searched for further .pth files, so the checkout's editable install is not found.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    for name in FOREIGN:
        (site / name).mkdir()
        (site / name / "__init__.py").write_text("marker = 'theirs'\n")
    metadata = site / "kernels-0.11.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.11.0\n")
    return directory


def outside(tmp_path, **extra):
    """Arguments to run a command like a user: from another directory, with no part of the checkout on the path."""
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    return {"cwd": tmp_path, "env": {**env, **extra}}


def test_what_is_installed_is_called_antefix(built):
    names = zipfile.ZipFile(built[1]).namelist()
    tops = {name.split("/")[0] for name in names}
    assert all(top == "antefix" or top.startswith(("antefix_", "antefix-")) for top in tops), tops
    assert {"antefix/v1/router_pb2.py", "antefix/v1/kvstore_pb2_grpc.py"} <= set(names)
    packages = {name.split("/")[0] for name in names if name.endswith("/__init__.py")}
    assert len(packages) > 8 and {f"{package}/py.typed" for package in packages} <= set(names)
    shipped = "antefix_console/shipped/"
    assert {shipped + "models/antefix-tiny/model.safetensors", shipped + "docs/FORMAT.md"} <= set(names)
    assert not [name for name in names if "/tests/" in name or name.endswith(".log")]


def test_the_sdist_holds_sources_alone(built):
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "proto/antefix/v1/kvstore.proto", "router/antefix_router/server.py", "Makefile"} <= names
    assert not [name for name in names if name.startswith(("antefix/v1/", ".venv", ".git/"))]


def test_other_peoples_packages_keep_their_names(environment, tmp_path):
    program = f"""
import importlib
for name in {FOREIGN!r}:
    assert importlib.import_module(name).marker == "theirs", name
import antefix, antefix_kernels.torch_reference, antefix_router.server, antefix_prefill.server, antefix_decode.server
import antefix_engines.engine_store
import torch
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM
config = DeepseekV4Config(
    vocab_size=8, hidden_size=16, num_hidden_layers=1, head_dim=16, num_attention_heads=2, q_lora_rank=8, o_groups=1,
    o_lora_rank=8, moe_intermediate_size=8, n_routed_experts=2, num_experts_per_tok=1, num_hash_layers=0,
    index_n_heads=2, index_head_dim=16, layer_types=["sliding_attention"],
)
assert DeepseekV4ForCausalLM(config)(torch.zeros(1, 3, dtype=torch.long)).logits.shape == (1, 3, 8)
print(antefix.__file__)
"""
    where = run(environment / "bin/python", "-c", program, **outside(tmp_path))
    assert where.startswith(str(environment)), where


@pytest.mark.timeout(600)
def test_doctor_and_demo_run_from_the_wheel(environment, tmp_path):
    assert json.loads(run(environment / "bin/antefix", "doctor", "--json", **outside(tmp_path)))["ok"]
    # A folder with the package's name in the working directory, as in the checkout's parent, changes nothing.
    (tmp_path / "antefix").mkdir()
    document = tmp_path / "document.txt"
    document.write_text((ROOT / "LICENSE").read_text()[:1500])
    command = [environment / "bin/antefix", "demo", "--json", "--document", document, "--max-tokens", "8"]
    report = json.loads(run(*command, timeout=500, **outside(tmp_path)))
    assert report["outputs_identical"] and report["restart_hit_tokens"] > 0 and report["processes_left"] == 0


@pytest.fixture
def without_tensors(tmp_path):
    """An environment variable with which importing torch and similar packages fails in any process."""
    blocker = tmp_path / "blocker"
    blocker.mkdir()
    (blocker / "sitecustomize.py").write_text(
        "import sys\n"
        "class Blocker:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {TENSORS!r}:\n"
        "            raise ModuleNotFoundError(f'{name} is blocked', name=name)\n"
        "sys.meta_path.insert(0, Blocker())\n"
    )
    return str(blocker)


def started(environment, role, *flags, **options):
    """Start one role, and wait until it announces its address. Gives (process, address)."""
    process = subprocess.Popen(
        [environment / "bin/antefix", "serve", role, *map(str, flags)], stdout=subprocess.PIPE, text=True, **options
    )
    return process, json.loads(process.stdout.readline())["address"]


def test_router_store_and_command_line_start_without_torch(environment, tmp_path, without_tensors):
    options = outside(tmp_path, PYTHONPATH=without_tensors)
    blocked = subprocess.run([environment / "bin/python", "-c", "import torch"], capture_output=True, **options)
    assert blocked.returncode != 0, "the blocker must block"
    secret = tmp_path / "secret"
    secret.write_text(bytes(range(32)).hex())
    (site,) = environment.glob("lib/python3*/site-packages")
    processes = []
    try:
        store, address = started(environment, "kvstore", "--dir", tmp_path / "store", **options)
        processes.append(store)
        flags = ["--model", site / "antefix_console/shipped/models/antefix-tiny", "--secret-file", secret]
        router, _ = started(environment, "router", *flags, "--store-address", address, "--leases", "true", **options)
        processes.append(router)
    finally:
        for process in processes:
            process.terminate()
        ends = [process.wait(AT_MOST_S) for process in processes]
    assert ends == [0, 0]
    for command in (["--help"], ["up", "--help"], ["inspect", tmp_path / "store"], ["fsck", tmp_path / "store"]):
        run(environment / "bin/antefix", *command, **options)


def test_a_worker_without_torch_says_what_to_install(built, environment, tmp_path, without_tensors):
    command = [environment / "bin/antefix", "serve", "prefill", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, **outside(tmp_path, PYTHONPATH=without_tensors))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"pip install '{built[1]}[worker]'" in done.stderr


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("archive", [0, 1], ids=["sdist", "wheel"])
def test_a_clean_environment_from_the_package_index(built, tmp_path, archive):
    """Installs everything from the index.

    torch is named as in the Makefile, because a plain `torch` takes gigabytes.
    """
    directory = tmp_path / "environment"
    run(sys.executable, "-m", "venv", directory)
    pip = [directory / "bin/python", "-m", "pip", "install", "-q", "--constraint", ROOT / "constraints.txt"]
    run(*pip, "torch==2.13.0", timeout=900)
    run(*pip, f"{built[archive]}[worker]", "transformers", "kernels", timeout=900)
    (site,) = directory.glob("lib/python3*/site-packages")
    (site / "router").mkdir()
    (site / "router" / "__init__.py").write_text("marker = 'theirs'\n")
    program = "import kernels, router, transformers, antefix_kernels; print(kernels.__file__, router.marker)"
    where = run(directory / "bin/python", "-c", program, **outside(tmp_path))
    assert "antefix" not in where.partition(str(directory))[2] and "theirs" in where
    assert json.loads(run(directory / "bin/antefix", "doctor", "--json", **outside(tmp_path)))["ok"]
    report = json.loads(run(directory / "bin/antefix", "demo", "--json", timeout=900, **outside(tmp_path)))
    assert report["outputs_identical"] and report["answers_right"]
