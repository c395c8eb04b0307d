"""Settings: one frozen dataclass per service. A command-line flag overrides the environment, the environment overrides
the settings file, and the file overrides the default.

A field's metadata has its help and unit. A malformed value is fatal, and the error names the setting. Only the command
line reads environment variables; it passes them on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final, TypeVar

from antefix.byte_size import parse_byte_size
from antefix.checked_files import read_toml
from antefix.checked_table import CHARACTERS_MAX, INTEGER_MAX, finite, shown
from antefix.errors import ConfigError

T = TypeVar("T")
# Matches a URL's scheme, user and password, to remove the password.
_PASSWORD: Final = re.compile(r"(\b[a-z][a-z0-9+.-]*://[^\s/?#@:,]*):[^\s@,]+@")
# How long running calls may take after a service was told to stop: the same for every role, the HTTP API and `up`.
GRACE_S = 120.0
_DIGITS_MAX: Final = 40


def setting(
    default: Any, help_text: str, *, unit: str = "", choices: tuple[str, ...] = (), guards: bool = False
) -> Any:
    """A dataclass field with its help text; `unit` is one of "", "bytes", "s", "tokens".

    choices: all values that the field may have; `check_choices` refuses others.
    guards: whether the setting protects something. An empty value of such a setting is an error, because an empty value
    would turn the protection off.
    """
    metadata = {"help": help_text, "unit": unit, "choices": choices, "guards": guards}
    return dataclasses.field(default=default, metadata=metadata)


def same_setting(config_type: type[Any], name: str) -> Any:
    """A field copied from another service's settings, with its default and help. Both services need the same value of
    this setting.
    """
    (field,) = (each for each in _fields(config_type) if each.name == name)
    return dataclasses.field(default=field.default, metadata=field.metadata)


def grace_setting() -> Any:
    """The settings field of the grace period, which is the same for all services."""
    return setting(
        GRACE_S,
        "how long running calls may take after the service was told to stop; after that they are ended",
        unit="s",
    )


def add_flags(parser: argparse._ActionsContainer, config_type: type[Any], names: Collection[str] = ()) -> None:
    """One flag per setting, without defaults: a default of a flag would hide the environment and the file.

    names: the fields that get flags; empty: all fields.
    """
    for field in _fields(config_type):
        if names and field.name not in names:
            continue
        unit = f" [{field.metadata['unit']}]" if field.metadata.get("unit") else ""
        # A boolean flag may be given without a value, which means true.
        alone: dict[str, Any] = {"nargs": "?", "const": "true"} if _kind(field) == "bool" else {}
        parser.add_argument(
            _flag_of(field),
            dest=f"setting_{field.name}",
            metavar=_metavar(field),
            default=None,
            help=f"{field.metadata.get('help', '')}{unit} (default: {_shown(field.default)})".replace("%", "%%"),
            **alone,
        )


def add_file_flags(parser: argparse.ArgumentParser) -> None:
    """Add a service's flags for its settings file and for printing the settings."""
    parser.add_argument(
        "--config", metavar="FILE", help="TOML file with settings; flags and environment variables override the file"
    )
    parser.add_argument("--print-config", action="store_true", help="print the settings in force as JSON, and exit")


def given_flags(config_type: type[Any], args: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given as flags, parsed.

    Raises:  ConfigError: a value that does not parse, or that holds a password.
    """
    found = {field: getattr(args, f"setting_{field.name}", None) for field in _fields(config_type)}
    given = {field: value for field, value in found.items() if value is not None}
    for field, value in given.items():
        refuse_password(str(value), _flag_of(field))
    return {field.name: parse_value(field, value, source=_flag_of(field)) for field, value in given.items()}


def flags_of(config_type: type[Any], config: Any, names: Collection[str] = ()) -> list[str]:
    """Command-line flags that pass these fields of `config` to another process.

    config_type: the settings of that process; `config` may have more fields.  names: as for `add_flags`.
    """
    flags: list[str] = []
    for field in _fields(config_type):
        if names and field.name not in names:
            continue
        value = getattr(config, field.name)
        if field.metadata.get("guards") and not value:
            continue  # an empty value of a guarding setting would be refused
        flags += [_flag_of(field), ",".join(value) if isinstance(value, tuple) else _as_flag(value)]
    return flags


def check_choices(config: Any) -> None:
    """Raises:  ConfigError: a setting has a value that is not among its choices."""
    for field in _fields(type(config)):
        choices, value = field.metadata.get("choices") or (), getattr(config, field.name)
        if choices and value not in choices:
            raise ConfigError(f"{field.name} must be {_either(choices)}, is {value!r}")


def resolve(
    config_type: type[T],
    args: argparse.Namespace,
    environ: Mapping[str, str],
    *,
    section: str,
    sections: Collection[str] = (),
) -> T:
    """The settings in force: flag, then ANTEFIX_<SECTION>_<NAME>, then [section] of the file, then default.

    sections: the sections that the file may have; empty: any. Each role reads its own section.
    Raises:  ConfigError: an unknown name in the file, or a value that does not parse or is refused.
    """
    from_file = _read_file(getattr(args, "config", None), section, sections)
    values: dict[str, Any] = {}
    names = {field.name for field in _fields(config_type)}
    if unknown := sorted(set(from_file) - names):
        raise ConfigError(f"unknown settings in [{section}] of {args.config}: {', '.join(unknown)}")
    values.update(given_flags(config_type, args))
    for field in _fields(config_type):
        variable = f"ANTEFIX_{section}_{field.name}".upper()
        if field.name in values:
            continue
        if variable in environ:
            values[field.name] = parse_value(field, environ[variable], source=variable)
        elif field.name in from_file:
            values[field.name] = parse_value(field, from_file[field.name], source=f"{args.config}: {field.name}")
    return config_type(**values)


def parse_value(field: dataclasses.Field[Any], value: Any, *, source: str) -> Any:
    """Parse one value by its field's type and unit.  source: where the value comes from, for the error message."""
    kind = _kind(field)
    if field.metadata.get("guards") and isinstance(value, str) and not value.strip():
        raise ConfigError(f"{source} is empty: give it a value, or leave the setting out")
    try:
        if kind == "bool":
            return _parse_bool(value)
        if kind == "int":
            return _parse_int(value, is_bytes=field.metadata.get("unit") == "bytes")
        if kind == "float":
            return _parse_float(value)
        if kind.startswith("tuple"):
            items = value.split(",") if isinstance(value, str) else value
            if not isinstance(items, list):
                raise ValueError("expected a list of strings")
            return tuple(text for text in (_parse_text(item).strip() for item in items) if text)
        return _parse_text(value)
    except ConfigError as err:
        raise ConfigError(f"{source}: {err}") from err
    except (ValueError, TypeError, OverflowError) as err:
        raise ConfigError(f"{source}: {shown(value)} is not a valid {kind} ({err})") from err


def as_json(config: Any) -> str:
    """The settings in force as JSON, for --print-config, without the passwords in URLs."""
    return _PASSWORD.sub(r"\1:***@", json.dumps(dataclasses.asdict(config), indent=2, default=str))


def refuse_password(value: str, source: str) -> None:
    """Raises:  ConfigError: a URL on the command line has a password, which every list of processes would show."""
    if _PASSWORD.search(value):
        raise ConfigError(f"{source}: a URL on a command line may have no password: others on this host could see it")


def require(condition: bool, message: str) -> None:
    """Check a condition, in `__post_init__` of settings.

    Raises:  ConfigError: the condition does not hold.
    """
    if not condition:
        raise ConfigError(message)


def _fields(config_type: type[Any]) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(config_type)


def _kind(field: dataclasses.Field[Any]) -> str:
    """The name of the field's type, whether or not its module evaluates annotations."""
    return field.type if isinstance(field.type, str) else str(getattr(field.type, "__name__", field.type))


def _flag_of(field: dataclasses.Field[Any]) -> str:
    return "--" + field.name.replace("_", "-")


def _as_flag(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _either(choices: Sequence[str]) -> str:
    *first, last = choices
    return f"{', '.join(first)} or {last}"


def _metavar(field: dataclasses.Field[Any]) -> str:
    if field.metadata.get("choices"):
        return "|".join(field.metadata["choices"])
    if field.metadata.get("unit") == "bytes":
        return "SIZE"
    return {"int": "N", "float": "X", "bool": "true|false"}.get(_kind(field), "VALUE")


def _shown(default: Any) -> str:
    if default in ("", ()):
        return "none"
    return _as_flag(default)


def _parse_int(value: Any, *, is_bytes: bool) -> int:
    _check_digits(value)
    number = parse_byte_size(value) if is_bytes else int(value)
    if (number != value and isinstance(value, float)) or abs(number) > INTEGER_MAX:
        raise ValueError(f"expected a whole number that is at most {INTEGER_MAX}")
    return number


def _parse_float(value: Any) -> float:
    _check_digits(value)
    number = float(value) if finite(value) or isinstance(value, str) else math.nan
    if not math.isfinite(number):
        raise ValueError("expected a finite number")
    return number


def _check_digits(value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError("expected a number")
    if isinstance(value, str) and len(value) > _DIGITS_MAX:
        raise ValueError("too many digits")


def _parse_text(value: Any) -> str:
    """The text of a path, a name or a number in the file. Lists and tables are refused here, because their text would
    be Python code.
    """
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise ValueError("expected a string")
    text = str(value)
    if "\0" in text or len(text) > CHARACTERS_MAX:
        raise ValueError(f"expected a text of at most {CHARACTERS_MAX} characters without a NUL character")
    return text


def _parse_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    lowered = str(value).lower()
    if lowered in ("true", "1", "yes", "on"):
        return True
    if lowered in ("false", "0", "no", "off"):
        return False
    raise ValueError("expected true or false")


def _read_file(path: str | None, section: str, sections: Collection[str]) -> dict[str, Any]:
    if path is None:
        return {}
    tables = read_toml(path, "--config")
    # With a misspelt section, a role would silently use its defaults.
    if sections and (unknown := sorted(set(tables) - set(sections))):
        raise ConfigError(f"--config {path}: unknown {', '.join(unknown)}; its sections are {', '.join(sections)}")
    return _table(tables.get(section, {}), path, section)


def _table(found: Any, path: str, section: str) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise ConfigError(f"--config {path}: {section} must be a section, as in [{section}], is {found!r}")
    return found
