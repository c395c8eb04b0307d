"""How `antefix up` adapts to the place where it runs: logs, temporary files, cores."""

import asyncio
import tempfile
from pathlib import Path

import pytest

from antefix.errors import ConfigError, Unavailable
from antefix_console import deployment
from antefix_console.deployment import Deployment, DeploymentConfig, RoleProcess


def no_directory():
    raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")


def test_without_a_directory_for_temporary_files_the_data_directory_has_one(tmp_path, monkeypatch):
    assert "TMPDIR" not in deployment._child_environment(tmp_path).keys() - set(deployment.os.environ)
    monkeypatch.setattr(tempfile, "gettempdir", no_directory)
    made = Path(deployment._child_environment(tmp_path)["TMPDIR"])
    assert made == tmp_path / "tmp" and made.stat().st_mode & 0o777 == 0o700
    assert deployment._child_environment(tmp_path)["TMPDIR"] == str(made)


def test_a_restart_goes_on_in_a_log_and_moves_a_large_one_aside(tmp_path, monkeypatch):
    log = tmp_path / "kvstore-0.log"
    assert deployment._log_bytes(log) == 0
    log.write_text("what explains the crash\n")
    assert deployment._log_bytes(log) == 24 and log.exists()
    monkeypatch.setattr(deployment, "_LOG_BYTES_MAX", 10)
    assert deployment._log_bytes(log) == 0 and not log.exists()
    assert (tmp_path / "kvstore-0.old.log").read_text() == "what explains the crash\n"


def test_what_a_role_says_is_not_mistaken_for_what_an_earlier_run_said(tmp_path):
    log = tmp_path / "kvstore-0.log"
    log.write_text("antefix: from before\n")
    assert deployment._log_tail(log, log.stat().st_size) == "it said nothing"
    begin = log.stat().st_size
    with log.open("a") as file:
        file.write("antefix: now\n")
    assert deployment._log_tail(log, begin) == "now"


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 1), (64, 32)])
def test_workers_share_the_cores_that_may_be_used(tmp_path, monkeypatch, cores, threads):
    monkeypatch.setattr(deployment, "usable_cores", lambda: cores)
    made = Deployment(DeploymentConfig(model=tmp_path, data_dir=tmp_path))
    assert made._threads() == threads


class Starting:
    """A role that has not announced itself."""

    pid = 123

    def __init__(self):
        self.stdout = asyncio.StreamReader()


async def test_a_start_says_what_it_waits_for_and_ends_at_its_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(deployment, "_TELL_EVERY_S", 0.01)
    monkeypatch.setattr(deployment, "START_TIMEOUT_S", 0.05)
    log, told = tmp_path / "decode-0.log", []
    log.write_text("antefix: from before\nantefix: measuring\n")
    made = Deployment(DeploymentConfig(model=tmp_path, data_dir=tmp_path), told.append)
    starting = RoleProcess(role="decode", process=Starting(), address="", log_path=log)
    with pytest.raises(Unavailable, match=r"decode did not start within 0 s: measuring; .*decode-0\.log has the rest"):
        await made._first_line(starting, 21)
    assert told and told[0].startswith("waiting for decode (pid 123) to start, 0 s of 0 s at most: measuring")


async def test_a_role_that_starts_in_time_is_not_told_of(tmp_path):
    told = []
    made = Deployment(DeploymentConfig(model=tmp_path, data_dir=tmp_path), told.append)
    starting = RoleProcess(role="decode", process=Starting(), address="", log_path=tmp_path / "decode-0.log")
    starting.process.stdout.feed_data(b'{"ready": true}\n')
    assert await made._first_line(starting, 0) == b'{"ready": true}\n'
    assert told == []


@pytest.mark.parametrize(("name", "flag"), [("router_address", "--address"), ("http_address", "--http-address")])
def test_a_malformed_address_is_named_before_anything_starts(tmp_path, name, flag):
    with pytest.raises(ConfigError, match=f"^{flag}: address '127.1:0'"):
        DeploymentConfig(model=tmp_path, data_dir=tmp_path, **{name: "127.1:0"})
