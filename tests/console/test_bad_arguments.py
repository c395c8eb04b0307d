"""Wrong arguments give exit code 2 and one line of error, for every command."""

import argparse
import dataclasses

import pytest

from antefix.config import resolve
from antefix.errors import AntefixError
from antefix_console import cli
from antefix_console.catalog import COMMANDS, ROLES


def numbers_of(parser):
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                yield from numbers_of(each)
        elif action.type in cli._BOUNDED.values() and action.option_strings:
            yield action


@pytest.mark.parametrize("command", COMMANDS)
def test_every_number_of_a_command_is_bounded(command):
    parser, _ = cli.parser_of([command])
    chosen = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices[command]
    left = [chosen]
    while left:
        for action in left.pop()._actions:
            assert action.type not in (int, float), action.option_strings
            if isinstance(action, argparse._SubParsersAction):
                left += action.choices.values()
    for action in numbers_of(chosen):
        for text in ("nan", "inf", "-inf", "1e400", "9" * 5000, "1" + "0" * 30 + "x", "", "0x10"):
            with pytest.raises(argparse.ArgumentTypeError) as caught:
                action.type(text)
            assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "args",
    [
        ["up", "--grace-s", "nan"],
        ["up", "--num-routers", "9" * 30],
        ["generate", "--temperature", "inf", "x"],
        ["load", "--speed", "-nan", "--trace", "x"],
        ["certs", "init", "/nonexistent/x", "--days", "9" * 18],
        ["certs", "init", "/nonexistent/x", "--days", "-1"],
        ["usage", "report", "--ledger", "/nonexistent", "--since", "0001-01-01T00:00:00+14:00"],
    ],
)
def test_senseless_numbers_are_a_wrong_call(args, capsys, monkeypatch):
    monkeypatch.setattr(cli, "set_up_logs", lambda *_: None)
    try:
        code = cli.main(args)
    except SystemExit as caught:
        code = caught.code
    assert code == 2 and "Traceback" not in capsys.readouterr().err


MALFORMED = ("http://[::1/", "http://127.0.0.1:99999", "http://h:port/v1", "https://", "nonsense", "ftp://h/")


@pytest.mark.parametrize("url", MALFORMED)
@pytest.mark.parametrize(
    "args",
    [
        ["top", "--url"],
        ["load", "--generate", "agents", "--url"],
        ["audit", "--yes", "--url"],
        ["serve", "kvstore", "--dir", "/nonexistent/x", "--object-store"],
        ["up", "--data-dir", "/nonexistent/x", "--object-store"],
        ["usage", "archive", "--ledger", "/nonexistent/x", "--to"],
        ["serve", "fleet", "--http-address", "127.0.0.1:0", "--secret-file", "/nonexistent/x", "--workers"],
    ],
    ids=lambda args: " ".join(args[:2]),
)
def test_a_malformed_url_is_a_wrong_call(args, url, capsys, monkeypatch):
    monkeypatch.setattr(cli, "set_up_logs", lambda *_: None)
    assert cli.main([*args, url]) == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told and told.splitlines()[-1].startswith("antefix")


@pytest.mark.parametrize(("text", "number"), [("1", 1), ("-3", -3), ("18446744073709551615", 2**64 - 1)])
def test_numbers_that_are_some_are_taken(text, number):
    assert cli._whole_number(text) == number and cli._number(text) == float(number)


BASE = {
    "kvstore": {"dir": "store"},
    "prefill": {"model": "m", "secret_file": "s", "store_address": "127.0.0.1:1"},
    "decode": {"model": "m", "secret_file": "s", "store_address": "127.0.0.1:1"},
    "router": {"model": "m", "secret_file": "s", "store_address": "127.0.0.1:1", "leases": "true", "ledger_dir": "l"},
    "fleet": {"workers": "http://127.0.0.1:8000", "http_address": "127.0.0.1:8080", "secret_file": "s"},
}
# Kubernetes sets variables such as ANTEFIX_ROUTER_ADDRESS=tcp://... for a service of that name.
NONSENSE = ("-1", "nan", "9" * 400, "\udcff", "tcp://10.0.0.1:80")


@pytest.mark.parametrize("role", ROLES)
def test_no_variable_of_the_environment_ends_a_role_in_a_python_error(role):
    config_type = ROLES[role].load()[0]
    base = {f"ANTEFIX_{role}_{name}".upper(): value for name, value in BASE[role].items()}
    config = resolve(config_type, argparse.Namespace(), base, section=role)
    num_refused = 0
    for field in dataclasses.fields(config):
        for value in NONSENSE:
            variable = f"ANTEFIX_{role}_{field.name}".upper()
            try:
                resolve(config_type, argparse.Namespace(), {**base, variable: value}, section=role)
            except AntefixError as err:
                num_refused += 1
                assert str(err)
    assert num_refused > len(dataclasses.fields(config))
