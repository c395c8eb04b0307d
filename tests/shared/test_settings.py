"""Settings: flag over environment over file over default; a malformed value is fatal and named."""

import argparse
import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from antefix.config import (
    add_file_flags,
    add_flags,
    check_choices,
    flags_of,
    given_flags,
    resolve,
    same_setting,
    setting,
)
from antefix.errors import ConfigError
from antefix.worker_settings import WorkerSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    name: str = setting("fallback", "a name")
    budget_bytes: int = setting(1024, "a budget", unit="bytes")
    ratio: float = setting(0.5, "a ratio")
    verbose: bool = setting(False, "say more")
    peers: tuple[str, ...] = setting((), "peers")


def load(argv=(), environ=None, text=None, tmp_path=None):
    parser = argparse.ArgumentParser()
    add_flags(parser, Example)
    add_file_flags(parser)
    args = list(argv)
    if text is not None:
        path = tmp_path / "antefix.toml"
        path.write_text(text)
        args += ["--config", str(path)]
    return resolve(Example, parser.parse_args(args), environ or {}, section="example")


def test_defaults_hold_where_nothing_is_said():
    assert load() == Example()


def test_flag_beats_environment_beats_file(tmp_path):
    text = '[example]\nname = "file"\nratio = 0.1\nbudget_bytes = "2K"\n'
    environ = {"ANTEFIX_EXAMPLE_NAME": "environment", "ANTEFIX_EXAMPLE_RATIO": "0.2"}
    found = load(["--name", "flag"], environ, text, tmp_path)
    assert (found.name, found.ratio, found.budget_bytes) == ("flag", 0.2, 2048)


def test_lists_come_separated_by_commas():
    assert load(["--peers", "a:1, b:2,"]).peers == ("a:1", "b:2")


@pytest.mark.parametrize(
    ("argv", "environ", "named"),
    [
        (["--ratio", "much"], {}, "--ratio"),
        ([], {"ANTEFIX_EXAMPLE_VERBOSE": "perhaps"}, "ANTEFIX_EXAMPLE_VERBOSE"),
        (["--budget-bytes", "1Q"], {}, "--budget-bytes"),
    ],
)
def test_a_malformed_value_is_named(argv, environ, named):
    with pytest.raises(ConfigError, match=named):
        load(argv, environ)


def test_an_unknown_name_in_the_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="budgit"):
        load(text="[example]\nbudgit = 1\n", tmp_path=tmp_path)


@pytest.mark.parametrize("text", ["[exampel]\nratio = 1\n", "ratio = 1\n", "example = 3\n"])
def test_a_section_that_no_role_has_is_named(tmp_path, text):
    parser = argparse.ArgumentParser()
    add_flags(parser, Example)
    add_file_flags(parser)
    (tmp_path / "antefix.toml").write_text(text)
    args = parser.parse_args(["--config", str(tmp_path / "antefix.toml")])
    with pytest.raises(ConfigError, match=text.split()[0].strip("[]")):
        resolve(Example, args, {}, section="example", sections=("example", "other"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    shade: str = setting("light", "a shade", choices=("light", "dark"))
    peers: tuple[str, ...] = setting((), "peers")
    verbose: bool = setting(False, "say more")


@dataclass(frozen=True, slots=True, kw_only=True)
class Other:
    shade: str = same_setting(Chosen, "shade")


def parsed(config_type, *argv, names=()):
    parser = argparse.ArgumentParser()
    add_flags(parser, config_type, names)
    return given_flags(config_type, parser.parse_args(argv))


def test_what_a_process_is_given_is_what_it_has():
    config = Chosen(shade="dark", peers=("a:1", "b:2"), verbose=True)
    assert Chosen(**parsed(Chosen, *flags_of(Chosen, config))) == config


def test_a_flag_that_turns_something_on_may_stand_alone():
    assert parsed(Chosen, "--verbose", "--shade", "dark") == {"verbose": True, "shade": "dark"}
    assert parsed(Chosen, "--verbose", "false") == {"verbose": False}


def test_only_the_named_flags_are_made():
    assert parsed(Chosen, names=("shade",)) == {}
    with pytest.raises(SystemExit):
        parsed(Chosen, "--verbose", names=("shade",))


def test_a_value_outside_its_choices_is_named():
    with pytest.raises(ConfigError, match="shade must be light or dark, is 'red'"):
        check_choices(Chosen(shade="red"))


def test_a_setting_that_two_must_have_alike_is_defined_once():
    assert Other() == Other(shade="light")
    with pytest.raises(ConfigError, match="shade must be light or dark"):
        check_choices(Other(shade="red"))


ROOT = Path(__file__).parents[2]
# A worker's setting is defined in one file only. Other files only use its value.
DEFINITION = re.compile(r"^    (\w+): [\w\[\], .]+ = setting\(", re.MULTILINE)


def test_no_setting_of_a_worker_is_defined_or_made_a_flag_again():
    names = {field.name for field in dataclasses.fields(WorkerSettings)}
    flags = {"--" + name.replace("_", "-") for name in names}
    again = []
    for room in ("antefix", "prefill", "decode", "router", "kvstore", "console"):
        for path in (ROOT / room).rglob("*.py"):
            text = path.read_text()
            again += [(path.name, name) for name in DEFINITION.findall(text) if name in names]
            again += [(path.name, flag) for flag in flags if f'"{flag}"' in text]
    # doctor must run on machines without the packages that these settings need. Its flags have other meanings.
    told = {("doctor.py", "--device"), ("doctor.py", "--dtype"), ("doctor.py", "--reproducible")}
    others = {(name, "--strategy") for name in ("window.py", "simulate.py", "simulate_cluster.py")}
    # Every role that uses Redis has these settings, which `antefix.redis_access` defines.
    shared = {"redis_password_file", "redis_ca_file"}
    assert set(again) - told - others == {("worker_settings.py", name) for name in names - shared}
