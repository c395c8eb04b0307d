"""Settings files with any value in any place are either read, or refused in one line that names the file."""

import copy
import json
import os
import threading
import time
import tomllib
from dataclasses import fields

import pytest

from antefix import checked_files
from antefix.checked_files import read_json, read_toml
from antefix.config import parse_value
from antefix.errors import ConfigError, InvalidRequest
from antefix.private_file import read_private
from antefix.security.identity_file import load_identities
from antefix_billing.ratecard import load_cards
from antefix_billing.tenants import load_tenants
from antefix_console.catalog import ROLES
from antefix_router.chat.moved_lines import load_rules
from antefix_router.gateway.model_names import load_aliases

DIGEST = "ab" * 32
FILES = {
    "tenants": (
        load_tenants,
        {
            "keys": "needed",
            "tenant": [
                {
                    "name": "acme",
                    "api_key_sha256": [DIGEST],
                    "requests": 8,
                    "limit": [{"window": "day", "tokens": 5, "money": "2.50"}],
                }
            ],
        },
    ),
    "rate cards": (
        lambda path: load_cards([path]),
        {
            "calendar": {"work": {"weekdays": ["mon"], "hours": ["09:00-17:00"], "holidays": []}},
            "card": [
                {
                    "version": "v1",
                    "models": ["m"],
                    "currency": "USD",
                    "source": "s",
                    "effective": tomllib.loads("x = 2026-01-01T00:00:00Z")["x"],
                    "prices": {"hit": "0.01", "miss": "0.1", "output": "0.4", "write": "0", "reasoning": "0.3"},
                    "peak": {"calendar": "work", "hit": "0.01", "miss": "0.1", "output": "0.4"},
                }
            ],
        },
    ),
    "identities": (
        load_identities,
        {"revoked": ["ff"], "identity": [{"name": "x", "role": "frontend", "tenants": ["acme"]}]},
    ),
    "prefix rules": (
        lambda path: load_rules(str(path)),
        {"shipped": True, "rule": [{"name": "a", "line": "x+", "changes": "request", "anywhere": False}]},
    ),
    "model aliases": (lambda path: load_aliases(str(path)), {"alias": [{"name": "a*", "mode": "low"}]}),
}
JUNK = [True, -1, 2**70, 10**400, 1.5, float("nan"), float("inf"), "", "x", "a\nb", "NaN", "1e999999", "x" * 100_000]
JUNK += [[], [1], ["a"], [[]], {}, {"a": 1}, tomllib.loads("x = 9999-12-31T23:59:59-12:00")["x"]]


def places(value, path=()):
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        yield from places(item, (*path, name))


def changed(value, path, junk):
    value = copy.deepcopy(value)
    holder = value
    for name in path[:-1]:
        holder = holder[name]
    holder[path[-1]] = junk
    return value


@pytest.fixture
def take(tmp_path, monkeypatch):
    """Read a settings file with this value. The TOML reader is replaced, because no TOML writer is installed."""
    path = tmp_path / "settings.toml"
    path.write_text("")
    path.chmod(0o600)

    def read(kind, value):
        for module in ("antefix_billing.tenants", "antefix_billing.ratecard", "antefix.security.identity_file"):
            monkeypatch.setattr(f"{module}.read_toml", lambda *_: copy.deepcopy(value))
        for module in ("antefix_router.chat.moved_lines", "antefix_router.gateway.model_names"):
            monkeypatch.setattr(f"{module}.read_toml", lambda *_: copy.deepcopy(value))
        return FILES[kind][0](path)

    return read


@pytest.mark.parametrize("kind", FILES)
def test_any_value_in_any_place_is_read_or_refused_by_name(take, kind):
    good = FILES[kind][1]
    take(kind, good)
    refused = 0
    for path in places(good):
        for junk in JUNK:
            try:
                take(kind, changed(good, path, junk))
            except ConfigError as err:
                assert "settings.toml" in str(err) and "\n" not in str(err) and len(str(err)) < 1000
                refused += 1
        with pytest.raises(ConfigError):
            take(kind, changed(good, path, {"nobody's": {"name": 1}}))
    assert refused > 50


@pytest.mark.parametrize(
    ("kind", "path", "junk"),
    [
        ("tenants", ("tenant", 0, "limit", 0, "money"), "NaN"),
        ("tenants", ("tenant", 0, "limit", 0, "money"), "Infinity"),
        ("tenants", ("tenant", 0, "limit", 0, "tokens"), float("inf")),
        ("tenants", ("tenant", 0, "api_key_sha256"), DIGEST),
        ("tenants", ("tenant", 0, "name"), ["a"]),
        ("rate cards", ("card", 0, "models"), "name"),
        ("rate cards", ("card", 0, "prices", "miss"), "1e999999"),
        ("rate cards", ("card", 0, "prices", "output"), "sNaN"),
        ("rate cards", ("card", 0, "version"), 1),
        ("identities", ("revoked",), "ff"),
        ("identities", ("identity", 0, "tenants"), "acme"),
    ],
)
def test_what_would_mean_something_else_is_refused(take, kind, path, junk):
    with pytest.raises(ConfigError, match=str(path[-1] if isinstance(path[-1], str) else path[-2])):
        take(kind, changed(FILES[kind][1], path, junk))


BAD_TOML = {
    "deep": b"a = " + b"[" * 100_000,
    "deep tables": b"a = " + b"{a = " * 5000,
    "many parts": b"a." * 20_000 + b"b = 1",
    "many parts of a table": b"[" + b"a." * 20_000 + b"b]",
    "no text": b"\xff\xfe\x00",
    "digits": b"a = " + b"9" * 5000,
    "large": b"#" * (5 << 20),
    "nothing closed": b'a = """' + b"x" * 10_000,
}


@pytest.mark.parametrize("name", BAD_TOML)
def test_files_that_are_no_toml_are_refused_at_once(tmp_path, name):
    (tmp_path / "a.toml").write_bytes(BAD_TOML[name])
    begin = time.process_time()
    with pytest.raises(ConfigError, match=r"tenants file .*a\.toml: "):
        read_toml(tmp_path / "a.toml", "tenants file")
    # Ten times the usual time. It takes 24 s if names of many parts are parsed.
    assert time.process_time() - begin < 3


@pytest.mark.parametrize("text", [b"", b"{", b"[" * 100_000, b"\xff", b'{"a": ' + b"9" * 5000 + b"}"])
def test_files_that_are_no_json_are_refused(tmp_path, text):
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(InvalidRequest, match=r"model file .*a\.json: "):
        read_json(tmp_path / "a.json", "model file", error=InvalidRequest)


@pytest.mark.parametrize("path", ["/nonexistent", "/", "/proc/self/mem", "a\0b"])
def test_what_is_no_file_is_named(path):
    with pytest.raises(ConfigError, match="tenants file"):
        read_toml(path, "tenants file")


@pytest.mark.parametrize("role", ROLES)
def test_any_value_of_any_setting_is_parsed_or_refused_by_name(role):
    config_type = ROLES[role].load()[0]
    texts = [str(each) for each in JUNK[:2]] + [
        "9" * 5000,
        "nan",
        "-inf",
        "1e400",
        "a\0b",
        "\ud800",
        " ",
        "1_0",
        "٣",
        "{}",
    ]
    good = config_type.__dataclass_fields__
    for field in fields(config_type):
        for value in (*JUNK, *texts):
            try:
                parsed = parse_value(field, value, source=f"--{field.name}")
            except ConfigError as err:
                assert f"--{field.name}" in str(err) and len(str(err)) < 1000
                continue
            assert type(parsed) is not float or (parsed == parsed and abs(parsed) != float("inf")), field.name
            assert json.dumps(parsed)
            try:
                config_type(**{field.name: parsed})
            except (InvalidRequest, TypeError) as err:
                # This file does not set a required setting.
                assert isinstance(err, InvalidRequest) or "required" in str(err), (field.name, value)
    assert good


def test_a_setting_takes_what_its_type_says_and_no_bool_for_a_number():
    config_type = ROLES["kvstore"].load()[0]
    by_name = {field.name: field for field in fields(config_type)}
    for name, value in (("grace_s", True), ("budget_bytes", True), ("dir", ["a"]), ("dir", {"a": 1}), ("grace_s", [1])):
        with pytest.raises(ConfigError, match=name):
            parse_value(by_name[name], value, source=name)


def test_a_pipe_is_read_to_its_end_and_waited_for_no_longer_than_it_says(tmp_path, monkeypatch):
    os.mkfifo(pipe := tmp_path / "pipe")
    monkeypatch.setattr(checked_files, "_PIPE_S", 0.2)
    with pytest.raises(ConfigError, match=r"pipe.*no data came"):
        read_toml(pipe, "a file")
    monkeypatch.setattr(checked_files, "_PIPE_S", 60.0)
    writing = threading.Thread(target=lambda: pipe.write_text("a = 1\n" + "# " + "x" * 200_000))
    writing.start()
    assert read_toml(pipe, "a file") == {"a": 1}
    writing.join()


def test_a_device_without_an_end_and_a_directory_are_refused(tmp_path):
    for path, why in (("/dev/zero", "more than"), (str(tmp_path), "directory")):
        with pytest.raises(ConfigError, match=why):
            read_toml(path, "a file")
    with pytest.raises(ConfigError):
        read_private(tmp_path, "a secret")
