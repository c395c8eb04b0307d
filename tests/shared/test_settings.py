"""Settings: flag over environment over file over default; a malformed value is fatal and named."""

import argparse
from dataclasses import dataclass

import pytest

from antefix.config import add_flags, resolve, setting
from antefix.errors import ConfigError


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
    (tmp_path / "antefix.toml").write_text(text)
    args = parser.parse_args(["--config", str(tmp_path / "antefix.toml")])
    with pytest.raises(ConfigError, match=text.split()[0].strip("[]")):
        resolve(Example, args, {}, section="example", sections=("example", "other"))
