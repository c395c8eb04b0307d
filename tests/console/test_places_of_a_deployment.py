"""What `antefix up` makes of the place where it runs: logs, temporary files, cores."""

import tempfile
from pathlib import Path

import pytest

from antefix_console import deployment
from antefix_console.deployment import Deployment, DeploymentConfig


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
