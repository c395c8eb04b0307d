"""One grammar for sizes in bytes: every spelling, and every place that reads sizes."""

from __future__ import annotations

import argparse
import itertools
import os
import tomllib
from pathlib import Path

import pytest

from antefix.byte_size import SIZE_MAX, parse_byte_size
from antefix.config import add_file_flags, add_flags, resolve
from antefix.errors import ConfigError
from antefix.window import parse
from antefix_console.commands import simulate
from antefix_kvstore.kvstore_config import KvStoreConfig
from antefix_prefill.server import PrefillConfig

_CHECKOUT = Path(__file__).parents[2]
_LETTERS = ("K", "M", "G", "T")
_SPELLINGS = [
    (f"{number}{space}{changed}", number * base ** (power + 1))
    for (power, letter), (suffix, base), number, space in itertools.product(
        enumerate(_LETTERS), (("", 1024), ("iB", 1024), ("B", 1000)), (1, 20), ("", " ")
    )
    for changed in (letter + suffix, (letter + suffix).lower(), (letter + suffix).upper())
]


@pytest.mark.parametrize(("text", "nbytes"), _SPELLINGS)
def test_every_unit_in_every_spelling(text: str, nbytes: int) -> None:
    assert parse_byte_size(text) == nbytes


@pytest.mark.parametrize(
    ("value", "nbytes"),
    [
        ("0", 0),
        ("512", 512),
        ("512B", 512),
        (512, 512),
        (" 7 b ", 7),
        ("1.5G", 3 << 29),
        ("0.1KB", 100),
        ("1.1k", 1126),
    ],
)
def test_plain_numbers_and_fractions(value: str | int, nbytes: int) -> None:
    assert parse_byte_size(value) == nbytes


def test_a_fraction_is_exact_however_large() -> None:
    assert parse_byte_size("8388607.999999999999T") == (8388607999999999999 * 1024**4 // 10**12)
    assert parse_byte_size(SIZE_MAX) == SIZE_MAX


@pytest.mark.parametrize(
    "value",
    [
        *("", "G", "x", "-1", "-1G", "+1", "1.5", "1e9", "inf", "nan", "1 000", "1_000"),
        *("20Gi", "20ib", "20GiBs", "20E", "2GG", "٣G", "20GB 20GB", "8388608T"),
        *(True, None, 1.5, -1, SIZE_MAX + 1),
    ],
)
def test_anything_else_is_refused_and_named(value: object) -> None:
    with pytest.raises(ConfigError) as err:
        parse_byte_size(value)  # type: ignore[arg-type]
    assert str(value) in str(err.value)


@pytest.mark.parametrize(("text", "nbytes"), [("20GB", 20 * 10**9), ("20G", 20 << 30), ("20GiB", 20 << 30)])
def test_a_spelling_means_one_number_wherever_it_is_read(tmp_path: Path, text: str, nbytes: int) -> None:
    def settings(*argv: str, environ: dict[str, str]) -> KvStoreConfig:
        parser = argparse.ArgumentParser()
        add_flags(parser, KvStoreConfig)
        add_file_flags(parser)
        return resolve(KvStoreConfig, parser.parse_args(["--dir", str(tmp_path), *argv]), environ, section="kvstore")

    file = tmp_path / "antefix.toml"
    file.write_text(f'[kvstore]\nbudget_bytes = "{text}"\n')
    assert settings("--budget-bytes", text, environ={}).budget_bytes == nbytes
    assert settings("--config", str(file), environ={}).budget_bytes == nbytes
    assert settings(environ={"ANTEFIX_KVSTORE_BUDGET_BYTES": text}).budget_bytes == nbytes
    assert settings("--quotas", f"acme={text}", environ={}).own_quotas == {"acme": nbytes}
    assert str(parse(f"auto(budget={text})")) == f"auto(budget={nbytes})"


def test_the_simulator_reads_the_same_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    simulate.add_arguments(parser)
    argv = ["--generate", "agents", "--requests", "3", "--strategy", "zero"]
    sizes = [argument for text in ("20GB", "20G", "20GiB") for argument in ("--store-bytes", text)]
    assert simulate.run(parser.parse_args([*argv, *sizes, "--json"])) == 0
    shown = capsys.readouterr().out
    assert shown.count(str(20 * 10**9)) == 1
    assert shown.count(str(20 << 30)) == 2


def test_a_malformed_size_names_its_setting(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, PrefillConfig)
    with pytest.raises(ConfigError, match="--pool-bytes: '8X' is not a size in bytes: write 1048576, 200G"):
        resolve(PrefillConfig, parser.parse_args(["--pool-bytes", "8X"]), os.environ, section="prefill")
    with pytest.raises(ConfigError, match="8X"):
        KvStoreConfig(dir=str(tmp_path), quotas=("acme=8X",))


def test_the_shipped_settings_are_written_in_one_dialect() -> None:
    tables = tomllib.loads((_CHECKOUT / "deploy" / "antefix.toml").read_text())
    assert parse_byte_size(tables["kvstore"]["budget_bytes"]) == 200 << 30
    assert str(parse(tables["prefill"]["strategy"])) == f"auto(budget={50 << 30})"
