"""The files that are shipped with the code work: the sample settings are valid, and the example runs."""

import argparse
import asyncio
import re
import sys
import tomllib
from pathlib import Path

import pytest

from antefix.config import parse_value
from antefix_console.catalog import COMMANDS, ROLES
from antefix_console.cli import main, parser_of
from tests.child_environment import child_environment

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("role", ROLES)
def test_the_sample_settings_are_valid(role):
    import dataclasses

    values = tomllib.loads((ROOT / "deploy" / "antefix.toml").read_text())[role]
    config_type, _ = ROLES[role].load()
    fields = {field.name: field for field in dataclasses.fields(config_type)}
    config = config_type(**{key: parse_value(fields[key], value, source=key) for key, value in values.items()})
    assert config.address == values["address"]


def subcommands(parser):
    """Each subcommand of this parser, with its own parser."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, each in action.choices.items():
                yield [name], each
                yield from (([name, *words], below) for words, below in subcommands(each))


@pytest.mark.parametrize("name", [*COMMANDS, "serve"])
def test_every_command_shows_help_with_an_example_to_be_copied(name, capsys):
    parser, _ = parser_of([name])
    found = [(words, each) for words, each in subcommands(parser) if words[0] == name]
    assert found
    for words, each in found:
        (example,) = (line for line in each.format_help().splitlines() if line.startswith("example: "))
        assert example.removeprefix("example: ").startswith(f"antefix {' '.join(words)}")
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0 and "usage: antefix" in capsys.readouterr().out


async def run_example(name, *arguments):
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(ROOT / "examples" / name), *map(str, arguments)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=child_environment(),
    )
    out, _ = await process.communicate()
    assert process.returncode == 0, out.decode()
    return out.decode()


async def test_the_examples_of_the_router_run(running):
    address = running.one("router").address
    text = await run_example("generate.py", address, "def fibonacci(n):")
    assert "[0 of 17 prompt tokens hit, " in text
    text = await run_example("conversation.py", address)
    assert text.count("prompt tokens:") == 3
    assert int(re.findall(r"(\d+) hit", text)[-1]) > 0, "the last turn hits what was said before"


@pytest.mark.services
async def test_an_example_says_that_nobody_answers():
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(ROOT / "examples" / "generate.py"), "127.0.0.1:1", "x"),
        stderr=asyncio.subprocess.PIPE,
        env=child_environment(),
    )
    _, err = await process.communicate()
    assert process.returncode == 1
    assert err.startswith(b"no answer: ") and b"Traceback" not in err


@pytest.mark.services
async def test_the_example_of_the_store_stores_and_restores(tmp_path):
    directory = tmp_path / "blocks"
    assert await run_example("store_blocks.py", directory) == "7 blocks stored, 0 were there, 7 restored, all equal\n"
    assert await run_example("store_blocks.py", directory) == "0 blocks stored, 7 were there, 7 restored, all equal\n"


@pytest.mark.parametrize("name", ["generate.py", "store_blocks.py"])
def test_an_example_is_short(name):
    lines = (ROOT / "examples" / name).read_text().rpartition('"""\n')[2].strip().splitlines()
    assert len([line for line in lines if line.strip()]) <= 22
