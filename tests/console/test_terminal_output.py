"""Output on a terminal: messages without class names, no invisible characters, and progress lines that disappear."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from antefix import errors
from antefix.cache_tenant import join_tenant, split_tenant
from antefix.errors import AntefixError, InternalError
from antefix.text_table import text_table, visible
from antefix_console import cli
from antefix_console.progress_line import ProgressLine
from antefix_kvstore.kvstore_config import KvStoreConfig
from antefix_kvstore.storage_engine import StorageEngine
from tests.kvstore.small_store import BLOCK, Prompt


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _kinds(base: type[AntefixError]) -> list[type[AntefixError]]:
    return [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, base)]


@pytest.mark.parametrize("kind", _kinds(AntefixError))
def test_a_message_says_what_is_wrong_and_not_which_class_it_is(
    kind: type[AntefixError], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(args: list[str]) -> int:
        raise kind("the disk is on fire")

    monkeypatch.setattr(cli, "_run", fail)
    code = cli.main(["doctor"])
    err = capsys.readouterr().err
    assert err.splitlines()[-1] == "antefix: the disk is on fire"
    assert (code == cli.EXIT_INTERNAL) == issubclass(kind, InternalError)
    assert code in (1, 2, 3, 70)


def test_a_file_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["inspect", str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err == f"antefix: {tmp_path}/nothing is not an Antefix store: it has no file STORE\n"


def test_the_data_directory_is_no_store_but_its_store_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "STORE").touch()
    for command in (
        ["inspect", str(tmp_path)],
        ["fsck", str(tmp_path)],
        ["store", "copy", str(tmp_path), str(tmp_path / "copy")],
    ):
        assert cli.main(command) == 2
        assert capsys.readouterr().err.endswith(f"; its store is {tmp_path}/store\n")


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_inspect_shows_tenant_and_user_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...]
) -> None:
    engine = StorageEngine(KvStoreConfig(dir=str(tmp_path / "store"), budget_bytes=4 << 20))
    # Records of version 1 have the tenant's name. Later records have a digest of the name that `--tenant` gives.
    for number, whose in enumerate((join_tenant("acme", "ann"), join_tenant("acme", ""), "")):
        block = Prompt([number] * BLOCK).block(0, tenant=whose.encode(), version=1, fingerprint=bytes([number]) * 32)
        engine.put([block])
    engine.close()
    assert cli.main(["inspect", str(tmp_path / "store"), *flags]) == 0
    out = capsys.readouterr().out
    assert all(char.isprintable() or char == "\n" for char in out) and "\\u001f" not in out
    if flags:
        shown = {(holding["tenant"], holding["user"]) for holding in json.loads(out)["holdings"]}
        assert shown == {("acme", "ann"), ("acme", ""), ("", "")}
    else:
        rows = [line.split()[1:3] for line in out.splitlines() if " block " in line]
        assert rows == [["acme", "ann"], ["acme", "-"], ["(no", "tenant)"]]


def test_a_caches_name_is_shown_as_tenant_and_user() -> None:
    assert split_tenant(join_tenant("acme", "ann")) == ("acme", "ann")
    assert split_tenant(join_tenant("acme", "")) == ("acme", "")


def test_a_table_keeps_columns_whole_and_shows_what_is_invisible() -> None:
    rows = [["a\x1fb", "[bold]", "1"], ["東京", "y" * 300, "22"]]
    lines = text_table(["name", "what", "n"], rows, num_left=2).splitlines()
    assert len(lines) == 3
    assert lines[1].startswith("a\\x1fb  [bold]") and lines[1].endswith("   1")
    assert "y" * 300 in lines[2]
    # The text has two characters, each two columns wide.
    assert len(lines[2]) + 2 == len(lines[1])
    assert visible("a\u200bb\u202ec\nd") == "a\\u200bb\\u202ec\\nd"


def test_progress_is_on_standard_error_of_a_terminal_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with ProgressLine("reading") as progress:
        progress.count(1234, 5678)
        progress._shown.refresh()  # type: ignore[union-attr]
        progress.step("the end")
        progress._shown.refresh()  # type: ignore[union-attr]
    shown = terminal.getvalue()
    assert "reading: 1,234 of 5,678" in shown and "reading: the end" in shown
    assert shown.endswith(("\x1b[2K", "\x1b[?25h")) or "\x1b[2K" in shown.rpartition("the end")[2], "the line is gone"
    assert capsys.readouterr().out == ""


def test_without_a_terminal_there_is_no_progress_but_lines_where_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for lines in (False, True):
        stream = io.StringIO()
        monkeypatch.setattr(sys, "stderr", stream)
        with ProgressLine("verifying", lines=lines) as progress:
            progress.count(1, 2)
            progress.step("one plan")
        assert ("one plan\n" in stream.getvalue()) == lines
        assert stream.getvalue().count("\n") == int(lines)


@pytest.mark.parametrize("command", ["doctor", "inspect", "fsck"])
def test_what_takes_long_shows_progress(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    StorageEngine(KvStoreConfig(dir=str(tmp_path / "store"), budget_bytes=4 << 20)).close()
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    argv = ["doctor", "--data-dir", str(tmp_path)] if command == "doctor" else [command, str(tmp_path / "store")]
    cli.main([*argv, "--json"])
    assert terminal.getvalue() != ""
    json.loads(capsys.readouterr().out)
