"""`antefix up` refuses what it can refuse before a process starts, and names the flag."""

import dataclasses
import socket
from pathlib import Path

import pytest

from antefix.errors import ConfigError, InvalidRequest
from antefix_console import shipped
from antefix_console.cli import main
from antefix_console.commands import up
from antefix_console.deployment import DeploymentConfig
from antefix_console.preflight import check_before_start

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path):
    return DeploymentConfig(model=shipped.MODEL, data_dir=tmp_path / "data")


def test_usual_settings_are_accepted(config, tmp_path):
    check_before_start(config)
    named = {
        "ratecards": (str(ROOT / "deploy/ratecards/example.toml"),),
        "prefix_rules": "off",
        "store_bytes": "2G",
        "http_address": "",
    }
    check_before_start(dataclasses.replace(config, router_address=f"unix:{tmp_path}/router.sock", **named))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"store_bytes": "5X"}, "--store-bytes: '5X' is not a size"),
        ({"tenants_file": "nowhere"}, "--tenants-file nowhere: there is no such file"),
        ({"api_keys_file": "nowhere"}, "--api-keys-file nowhere"),
        ({"model_aliases": "nowhere"}, "--model-aliases nowhere"),
        ({"prefix_rules": "nowhere"}, "--prefix-rules nowhere"),
        ({"ratecards": ("nowhere",)}, "--ratecards nowhere"),
        ({"object_store": "ftp://x"}, "an object store is given as"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_setting_that_cannot_work_names_its_flag(config, changed, told):
    with pytest.raises(ConfigError) as caught:
        check_before_start(dataclasses.replace(config, **changed))
    assert str(caught.value).startswith(told)


@pytest.mark.parametrize(
    ("field", "flag", "text"),
    [
        ("tenants_file", "--tenants-file", "[[tenant]]\nname = 3\n"),
        ("tenants_file", "--tenants-file", "[[tenant"),
        ("tenants_file", "--tenants-file", '[[tenant]]\nname = "acme"\n'),
        ("api_keys_file", "--api-keys-file", "{"),
        ("ratecards", "--ratecards", "[[card]]\nversion = 1\n"),
        ("ratecards", "--ratecards", "[[card"),
        ("model_aliases", "--model-aliases", "[[alias]]\nnam = 'a'\n"),
        ("prefix_rules", "--prefix-rules", "[[rule"),
    ],
)
def test_a_malformed_file_is_refused_before_anything_starts(config, tmp_path, field, flag, text):
    path = tmp_path / "given"
    path.write_text(text)
    path.chmod(0o600)
    given = (str(path),) if field == "ratecards" else str(path)
    with pytest.raises(ConfigError, match=f"^{flag}: .*given"):
        check_before_start(dataclasses.replace(config, **{field: given}))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"bill_redis": "http://127.0.0.1"}, "--bill-redis must be a URL of Redis"),
        ({"bill_redis": "redis://127.0.0.1:x"}, "--bill-redis is not a URL"),
        ({"bill_redis": "redis://:secret@127.0.0.1"}, "--bill-redis: the URL has a password"),
        ({"anchors": ("ftp://host/x",)}, "--anchors: an anchor"),
        ({"anchors": ("",)}, "--anchors: an anchor"),
    ],
)
def test_a_place_of_the_bill_that_cannot_be_used_is_refused(config, changed, told):
    with pytest.raises(ConfigError) as caught:
        check_before_start(dataclasses.replace(config, **changed))
    assert str(caught.value).startswith(told) and "secret" not in str(caught.value)


def test_valid_files_of_the_bill_are_accepted(config, tmp_path):
    tenants = tmp_path / "tenants.toml"
    tenants.write_text('keys = "none"\n[[tenant]]\nname = "acme"\n')
    tenants.chmod(0o600)
    cards = tuple(map(str, sorted((ROOT / "deploy" / "ratecards").glob("*.toml"))))
    bill = {"tenants_file": str(tenants), "ratecards": cards}
    places = {"bill_redis": "redis://127.0.0.1:1", "anchors": (str(tmp_path / "anchors.jsonl"),)}
    check_before_start(dataclasses.replace(config, **bill, **places))


def test_a_directory_without_a_model_is_refused(config, tmp_path):
    for path, told in ((tmp_path / "none", "is not a directory"), (tmp_path, "has no config.json")):
        with pytest.raises(InvalidRequest, match=told):
            check_before_start(dataclasses.replace(config, model=path))


@pytest.mark.parametrize("name", ["router_address", "http_address"])
def test_a_port_in_use_is_refused(config, name):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        at = dataclasses.replace(config, **{name: f"127.0.0.1:{taken.getsockname()[1]}"})
        with pytest.raises(ConfigError, match=r"cannot be listened on: Address already in use"):
            check_before_start(at)


@pytest.mark.parametrize("name", ["router_address", "http_address"])
@pytest.mark.parametrize("address", ["0.0.0.0:0", "192.0.2.1:8000", "[::]:0"])
def test_an_address_for_other_hosts_is_refused_without_tls(config, monkeypatch, name, address):
    monkeypatch.delenv("ANTEFIX_ROUTER_CREDENTIALS", raising=False)
    with pytest.raises(ConfigError, match="other hosts can reach this address"):
        check_before_start(dataclasses.replace(config, **{name: address}))


def test_nothing_starts_after_a_refusal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(up, "_run", lambda *_, **__: pytest.fail("services were started"))
    assert main(["up", "--data-dir", str(tmp_path / "data"), "--model", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"antefix: {tmp_path} has no config.json\n"
    assert not (tmp_path / "data").exists()
