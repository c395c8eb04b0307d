"""`antefix store` and `antefix drain`: their output, their exit codes, and that running them again continues."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from antefix.secret import Keyring, create_secret_file
from antefix_console.cli import main
from antefix_kvstore.kvstore_config import KvStoreConfig
from antefix_kvstore.storage_engine import StorageEngine
from tests.kvstore.small_store import BLOCK, FINGERPRINT, Prompt

PROMPT = Prompt(list(range(BLOCK * 8)))


def engine_of(directory: Path) -> StorageEngine:
    return StorageEngine(KvStoreConfig(dir=str(directory), budget_bytes=8 << 20, scrub_bytes_per_s=0))


@pytest.fixture
def filled(tmp_path: Path) -> tuple[Path, Path]:
    """A store with one tenant's blocks, and the deployment's secret."""
    secret = create_secret_file(tmp_path / "secret")
    owner = Keyring.from_file(secret).owner("acme")
    engine = engine_of(tmp_path / "a")
    engine.register(FINGERPRINT, BLOCK, {})
    engine.put([PROMPT.block(index, tenant=owner) for index in range(8)])
    engine.close()
    return tmp_path / "a", secret


def ran(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, dict]:
    status = main([*args, "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_a_copy_says_what_it_did_and_goes_on_when_run_again(filled, tmp_path, capsys):
    source, _ = filled
    target = str(tmp_path / "b")
    status, told = ran(capsys, "store", "copy", str(source), target, "--budget-bytes", "8M")
    assert (status, told["num_copied"], told["num_there"]) == (0, 8, 0)
    engine = engine_of(source)
    engine.put([Prompt(list(range(90, 90 + BLOCK * 2))).block(index) for index in range(2)])
    status, told = ran(capsys, "store", "copy", str(source), target, "--budget-bytes", "8M")
    assert (status, told["num_copied"], told["num_there"]) == (0, 2, 8)
    engine.close()
    assert main(["store", "copy", str(source), target, "--budget-bytes", "8M"]) == 0
    assert "10 were there already" in capsys.readouterr().out


def test_a_name_without_a_port_is_a_directory_and_only_a_copy_makes_one(filled, tmp_path, capsys, monkeypatch):
    source, secret = filled
    monkeypatch.chdir(tmp_path)
    assert ran(capsys, "store", "copy", str(source), "backup", "--budget-bytes", "8M")[1]["num_copied"] == 8
    assert (tmp_path / "backup" / "segments").is_dir()
    for command in (
        ["drain", str(source), "--to", "bakcup"],
        ["store", "purge", "bakcup", "--tenant", "acme", "--secret-file", str(secret)],
        ["store", "copy", "bakcup", "other"],
    ):
        assert main(command) == 2 and "bakcup is not a directory" in capsys.readouterr().err
    assert not (tmp_path / "bakcup").exists() and not (tmp_path / "other").exists()


def test_a_drain_moves_to_the_stores_that_stay(filled, tmp_path, capsys):
    source, _ = filled
    engine_of(tmp_path / "b").close()
    assert main(["drain", str(source), "--to", str(tmp_path / "b")]) == 0
    assert "8 records copied" in capsys.readouterr().out
    engine = engine_of(tmp_path / "b")
    assert PROMPT.check(engine) == 8
    engine.close()


def test_a_purge_names_the_tenant_with_the_secret(filled, capsys):
    source, secret = filled
    purge = ("store", "purge", str(source), "--secret-file", str(secret))
    assert ran(capsys, *purge, "--tenant", "other") == (0, {"purged": {str(source): 0}, "failed": {}})
    assert ran(capsys, *purge, "--tenant", "acme") == (0, {"purged": {str(source): 8}, "failed": {}})
    assert ran(capsys, *purge, "--tenant", "acme") == (0, {"purged": {str(source): 0}, "failed": {}})


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["store", "purge", "DIR", "--tenant", "acme"], "--secret-file is needed"),
        (["store", "copy", "s3:///x", "DIR"], "names no bucket"),
        (["store", "copy", "DIR", "s3:///x"], "names no bucket"),
        (["store", "copy", "DIR", "file://host/x"], "three slashes"),
        (["store", "copy", "/no/such", "DIR"], "not a directory"),
        (["drain", "DIR", "--to", "gs://"], "names no bucket"),
    ],
)
def test_a_wrong_call_says_what_is_wrong(filled, capsys, args, told):
    status = main([str(filled[0]) if arg == "DIR" else arg for arg in args])
    assert status == 2
    assert told in capsys.readouterr().err
