"""What is shipped beside the code works: the sample settings are valid, the example runs."""

import asyncio
import sys
import tomllib
from pathlib import Path

import pytest

from antefix.config import parse_value
from antefix_console.catalog import COMMANDS, ROLES
from antefix_console.deployment import Deployment, DeploymentConfig

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("role", ROLES)
def test_the_sample_settings_are_valid(role):
    import dataclasses

    values = tomllib.loads((ROOT / "deploy" / "antefix.toml").read_text())[role]
    config_type, _ = ROLES[role].load()
    fields = {field.name: field for field in dataclasses.fields(config_type)}
    config = config_type(**{key: parse_value(fields[key], value, source=key) for key, value in values.items()})
    assert config.address == values["address"]


SUBCOMMANDS = [
    *(["usage", name] for name in ("export", "verify", "report", "receipt")),
    *(["serve", role] for role in ROLES),
    ["bench", "store"],
]


@pytest.mark.parametrize("words", [*([name] for name in COMMANDS), *SUBCOMMANDS], ids=" ".join)
def test_every_command_shows_help_with_an_example(words, capsys):
    from antefix_console.cli import main

    with pytest.raises(SystemExit) as caught:
        main([*words, "--help"])
    out = capsys.readouterr().out
    assert caught.value.code == 0
    assert "example" in out and "usage: antefix" in out


async def test_the_conversation_example_hits_its_own_answers(tmp_path):
    config = DeploymentConfig(model=ROOT / "models" / "antefix-tiny", data_dir=tmp_path)
    async with Deployment(config) as deployment:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, str(ROOT / "examples" / "conversation.py"), deployment.one("router").address),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        out, _ = await asyncio.wait_for(process.communicate(), 90)
    text = out.decode()
    assert process.returncode == 0, text
    assert text.count("prompt tokens:") == 3
