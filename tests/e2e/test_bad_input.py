"""Bad input gives a clear error. Nothing is lost and nothing hangs."""

import asyncio
import json
import os
import shutil
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from antefix.errors import InvalidRequest
from antefix.sampling import Sampling
from antefix_console import cli
from antefix_console.deployment import Deployment

pytestmark = pytest.mark.services


MODEL = Path(__file__).parents[2] / "models" / "antefix-tiny"


async def antefix(*args, stdin=b""):
    """Run the command; returns its exit code, stdout and stderr."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "antefix_console", *(arg if isinstance(arg, bytes) else str(arg) for arg in args)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(stdin), 450)
    finally:
        if process.returncode is None:
            process.kill()
    return process.returncode, out.decode(), err.decode()


async def test_wrong_requests_are_refused_and_the_service_goes_on(running, ask, document):
    for prompt, options, named in (
        ([], {}, "empty"),
        ([264], {}, "264"),
        ([2**32 - 1], {}, "vocabulary"),
        (np.zeros(3000, np.uint32), {"sampling": Sampling(max_tokens=1_048_000)}, "1048576"),
    ):
        with pytest.raises(InvalidRequest, match=named):
            await ask(running, prompt, **options)
    output, _ = await ask(running, document[:100], max_tokens=4)
    assert len(output) <= 4


async def test_a_prompt_that_no_pool_holds_is_refused(deploy, ask):
    async with deploy(extra_flags={"prefill": ("--pool-bytes", "1M"), "decode": ("--pool-bytes", "1M")}) as deployment:
        with pytest.raises(InvalidRequest, match="pool_bytes"):
            await ask(deployment, np.zeros(20_000, np.uint32))


@pytest.fixture
def model_dir(tmp_path):
    shutil.copytree(MODEL, tmp_path / "model", ignore=shutil.ignore_patterns("*.png", "*.svg"))
    return tmp_path / "model"


@pytest.fixture
def secret(tmp_path):
    (tmp_path / "secret").write_text("00" * 32)
    return tmp_path / "secret"


def change_tensor(model_dir, change):
    path = model_dir / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    # Checkpoints spell this field either as DeepSeek does or as transformers does.
    name = min(name for name in tensors if name.endswith(("attn.wq_a.weight", "q_a_proj.weight")))
    change(tensors, name)
    safetensors.torch.save_file(tensors, path)
    return name


@pytest.fixture
def run_here(capsys, monkeypatch):
    """Run the command in this process, because a new one imports for seconds. Returns exit code and standard error."""
    monkeypatch.setattr(cli, "set_up_logs", lambda *_: None)

    def run(*args):
        capsys.readouterr()
        try:
            code = cli.main([os.fsdecode(arg) if isinstance(arg, bytes) else str(arg) for arg in args])
        except SystemExit as caught:
            code = caught.code
        return code, capsys.readouterr().err

    return run


@pytest.fixture
def serve_prefill(run_here, secret):
    def serve(model_dir, *flags):
        where = ("--model", model_dir, "--secret-file", secret, "--store-address", "127.0.0.1:1")
        return run_here("serve", "prefill", *where, *flags)

    return serve


def test_a_missing_tensor_is_named(model_dir, serve_prefill):
    change_tensor(model_dir, lambda tensors, name: tensors.pop(name))
    code, err = serve_prefill(model_dir)
    assert code == 2 and "layers.0.attn.wq_a.weight is missing" in err


def test_a_misshapen_tensor_is_named_with_both_shapes(model_dir, serve_prefill):
    name = change_tensor(model_dir, lambda tensors, name: tensors.update({name: torch.zeros(3, 5)}))
    code, err = serve_prefill(model_dir)
    assert code == 2 and name in err and "3" in err and "5" in err


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda d: (d / "config.json").unlink(), "config.json"),
        (lambda d: (d / "config.json").write_text("{"), "config.json"),
        (lambda d: (d / "config.json").write_text(json.dumps({"model_type": "llama"})), "llama"),
        (lambda d: (d / "model.safetensors").unlink(), "safetensors"),
        (lambda d: (d / "model.safetensors").write_bytes(b"\x00" * 100), "safetensors"),
        (shutil.rmtree, "not a directory"),
    ],
)
def test_a_broken_model_directory_says_what_is_wrong(model_dir, serve_prefill, change, named):
    change(model_dir)
    code, err = serve_prefill(model_dir)
    assert code == 2 and named in err, err


async def test_a_port_in_use_is_named(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        code, _, err = await antefix("serve", "kvstore", "--dir", tmp_path / "store", "--address", address)
    assert code == 2 and address in err


async def test_a_directory_that_is_no_store_is_left_alone(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "letter.txt").write_text("dear reader")
    code, _, err = await antefix("serve", "kvstore", "--dir", tmp_path / "store")
    assert code == 2 and "store" in err
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["letter.txt"]


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (["serve", "prefill"], 2),
        (["serve", "kvstore", "--budget-bytes", "lots"], 2),
        (["generate", "--router", "127.0.0.1:1", "hello"], 3),
        (["generate", "--model", "/nonexistent", "hello"], 2),
        (["generate", "--router", "127.0.0.1:1", "--seed", "-1", "hello"], 2),
        (["generate", "--router", "127.0.0.1:1", "--seed", str(2**64), "hello"], 2),
        (["generate", "--router", "127.0.0.1:1", b"\xff\xfe"], 2),
        (["up", "--data-dir", "/proc/none/data"], 2),
        (["up", "--data-dir", str(Path(__file__))], 2),
        (["up", "--num-decode", "0"], 2),
        (["up", "--num-prefill", "-1"], 2),
        (["up", "--num-routers", "0"], 2),
        (["serve", "kvstore", "--dir", "/proc/none/store"], 2),
        (["verify", "--device", "cuda:99"], 2),
        (["verify", "--data-dir", "/proc/none"], 2),
        (["frobnicate"], 2),
        (["--version"], 0),
        (["generate", "--help"], 0),
    ],
)
def test_exit_codes_mean_something(args, code, run_here):
    got, err = run_here(*args)
    assert got == code, err
    assert "Traceback" not in err


async def test_a_process_ends_with_the_code():
    code, _, err = await antefix("serve", "kvstore", "--budget-bytes", "lots")
    assert code == 2 and "lots" in err and "Traceback" not in err


async def test_a_prompt_that_is_not_utf8_is_refused_before_anything_is_sent(tmp_path):
    (tmp_path / "prompt").write_bytes(b"abc\xff")
    for args, stdin in ((["--file", tmp_path / "prompt"], b""), ([], b"abc\xff")):
        code, _, err = await antefix("generate", "--router", "127.0.0.1:1", *args, stdin=stdin)
        assert code == 2 and "not UTF-8 text (at byte 3)" in err and "Traceback" not in err


@pytest.mark.parametrize("device", ["potato", "cuda:99"])
def test_a_device_that_is_not_there_is_named(serve_prefill, device):
    code, err = serve_prefill(MODEL, "--device", device)
    assert code == 2 and f"'{device}' cannot be used" in err and "Traceback" not in err


async def test_roles_that_start_together_have_logs_of_their_own_and_no_runs_words_are_lost(make_config, tmp_path):
    (tmp_path / "data" / "logs").mkdir(parents=True)
    for _ in range(3):
        deployment = Deployment(make_config())
        try:
            stores = (["--dir", str(tmp_path / name)] for name in "ab")
            started = await asyncio.gather(*(deployment.start_role("kvstore", flags) for flags in stores))
        finally:
            await deployment.stop()
        logs = {process.log_path for process in started}
        assert len(logs) == 2
    assert all(path.read_bytes().count(b"stopping") == 3 for path in logs)


async def test_an_answer_comes_as_json(running):
    address = running.one("router").address
    code, out, _ = await antefix("generate", "--router", address, "--json", "--max-tokens", "5", "hello")
    answer = json.loads(out)
    assert code == 0
    assert answer["usage"]["prompt_tokens"] == 5 and answer["finish_reason"] in ("stop", "length")
