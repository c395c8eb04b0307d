"""`antefix up` refuses what it can refuse before a process starts, and names the flag."""

import dataclasses
import socket

import pytest

from antefix.errors import ConfigError, InvalidRequest
from antefix_console import shipped
from antefix_console.cli import main
from antefix_console.commands import up
from antefix_console.deployment import DeploymentConfig
from antefix_console.preflight import check_before_start


@pytest.fixture
def config(tmp_path):
    return DeploymentConfig(model=shipped.MODEL, data_dir=tmp_path / "data")


def test_usual_settings_are_accepted(config, tmp_path):
    (tmp_path / "cards").mkdir()
    check_before_start(config)
    named = {"ratecards": (str(tmp_path / "cards"),), "prefix_rules": "off", "store_bytes": "2G", "http_address": ""}
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


def test_nothing_starts_after_a_refusal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(up, "_run", lambda *_, **__: pytest.fail("services were started"))
    assert main(["up", "--data-dir", str(tmp_path / "data"), "--model", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"antefix: {tmp_path} has no config.json\n"
    assert not (tmp_path / "data").exists()
