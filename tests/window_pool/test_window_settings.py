"""Settings of window state: contradictory ones are refused before any role starts, and `up` passes on the others."""

from __future__ import annotations

import dataclasses
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from antefix.clients import RouterClient
from antefix.errors import ConfigError
from antefix.layout import KVGeometry
from antefix.model_dir import read_config
from antefix_console.cli import main
from antefix_console.commands.up import warn_of_pool
from antefix_console.deployment import Deployment, DeploymentConfig
from antefix_prefill.worker.engine import EngineConfig, build_engine

MODEL = Path(__file__).parents[2] / "models" / "antefix-tiny"
REDIS = "redis://127.0.0.1:1/0"
REFUSED = [
    ({"strategy": "sometimes"}, "unknown window strategy"),
    ({"strategy": "auto(ends=pool)"}, "needs a window pool"),
    ({"strategy": "agents=auto(ends=pool); zero"}, "needs a window pool"),
    ({"strategy": "a=full; a=zero"}, "given twice for a"),
    ({"window_pool": "tape"}, "window_pool must be"),
    ({"bounded_windows": -1}, "must not be negative"),
    ({"bounded_windows": 1, "reproducible": True}, "give one of the two"),
]


def config(**settings: object) -> EngineConfig:
    return dataclasses.replace(EngineConfig(model="model", secret_file="secret"), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_a_worker_and_a_deployment_refuse_the_same(settings: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**settings)
    with pytest.raises(ConfigError, match=message):
        DeploymentConfig(model=MODEL, data_dir=tmp_path, **settings)  # type: ignore[arg-type]


def test_redis_bytes_without_redis_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="bounds a Redis server's memory"):
        DeploymentConfig(model=MODEL, data_dir=tmp_path, window_pool="memory", window_pool_bytes=4 << 30)
    DeploymentConfig(model=MODEL, data_dir=tmp_path, window_pool=REDIS, window_pool_bytes=4 << 30)


def test_auto_is_the_default_and_its_ends_go_to_a_window_pool() -> None:
    assert str(config().strategy_in_force) == "auto"
    assert str(config(window_pool="memory").strategy_in_force) == "auto(ends=pool)"
    assert str(config(window_pool=REDIS, strategy="auto(ends=disk)").strategy_in_force) == "auto(ends=disk)"


def test_a_worker_takes_its_namespaces_strategy() -> None:
    text = "agents=periodic(8192); zero"
    assert str(config(strategy=text, namespace="agents").strategy_in_force) == "periodic(8192)"
    assert str(config(strategy=text).strategy_in_force) == "zero"


def test_a_bounded_replay_as_long_as_an_exact_one_is_refused() -> None:
    geometry = KVGeometry.from_config(read_config(MODEL))
    windows = geometry.replay_tokens // geometry.window
    with pytest.raises(ConfigError, match="every hit is exact"):
        build_engine(config(model=str(MODEL), bounded_windows=windows), store=None)  # type: ignore[arg-type]


async def test_up_hands_window_settings_to_the_roles_that_need_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: dict[str, list[str]] = {}

    async def start_role(self: Deployment, role: str, flags: list[str]) -> SimpleNamespace:
        started[role] = list(flags)
        return SimpleNamespace()

    monkeypatch.setattr(Deployment, "start_role", start_role)
    monkeypatch.setattr(Deployment, "addresses", lambda self, role: ["127.0.0.1:1"])

    async def status(self: RouterClient) -> SimpleNamespace:
        return SimpleNamespace(arithmetic="cpu-float32")

    monkeypatch.setattr(RouterClient, "status", status)
    monkeypatch.setattr(Deployment, "one", lambda self, role: SimpleNamespace(address="127.0.0.1:1"))

    async def status() -> SimpleNamespace:
        return SimpleNamespace(arithmetic="cpu-float32")

    monkeypatch.setattr(Deployment, "router", SimpleNamespace(status=status))
    settings = {"namespace": "agents", "strategy": "full", "window_pool": REDIS, "window_pool_bytes": 1 << 30}
    await Deployment(
        DeploymentConfig(model=MODEL, data_dir=tmp_path, bounded_windows=2, store_bytes="9G", **settings)  # type: ignore[arg-type]
    ).start()

    def value(role: str, flag: str) -> str:
        return started[role][started[role].index(flag) + 1]

    assert value("kvstore", "--budget-bytes") == "9G"
    for role in ("prefill", "decode"):
        assert value(role, "--strategy") == "full"
        assert value(role, "--window-pool") == REDIS
        assert value(role, "--window-pool-bytes") == str(1 << 30)
        assert value(role, "--reproducible") == "false"
    for role in ("prefill", "decode", "router"):
        assert value(role, "--namespace") == "agents"
        assert value(role, "--bounded-windows") == "2"


def test_up_says_what_is_wrong_and_starts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["up", "--data-dir", str(tmp_path / "data"), "--strategy", "auto(ends=pool)"]) == 2
    assert "set window_pool to memory or to a redis:// URL" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


async def test_up_warns_of_a_redis_that_does_not_answer_and_of_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        await warn_of_pool(f"redis://127.0.0.1:{nobody.getsockname()[1]}/0")
    assert "warning: the window pool does not answer" in capsys.readouterr().err
    for address in ("disk", "memory"):
        await warn_of_pool(address)
    assert capsys.readouterr().err == ""
