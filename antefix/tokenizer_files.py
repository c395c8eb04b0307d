"""Checks a tokenizer's files before the tokenizers library reads them, and converts that library's errors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from antefix.checked_files import read_json
from antefix.checked_table import shown
from antefix.errors import InvalidRequest, ModelError

NUM_BYTES: Final = 256
# The largest vocabularies have a few thousand added tokens. A million took the library over 20 s.
ADDED_TOKENS_MAX: Final = 65_536
# By what factor replacements may lengthen a text.
_GROWTH_MAX: Final = 64
_TOKEN_MAX: Final = 2**32 - 1


@contextlib.contextmanager
def library_errors(what: str, error: type[InvalidRequest]) -> Iterator[None]:
    """A context that turns the tokenizers library's errors into `error`: plain exceptions, and panics (a
    BaseException) of patterns that take too long.
    """
    try:
        yield
    except BaseException as err:
        if isinstance(err, Exception) or type(err).__name__ == "PanicException":
            raise error(f"{what}: {str(err)[:300]}") from err
        raise


def check_tokenizer_file(path: Path) -> None:
    """Refuse a file that would keep the library busy for minutes: a million added tokens, or replacements that make a
    text grow.

    Raises:  ModelError: it is not a tokenizer.json, or exceeds those limits.
    """
    content = read_json(path, "tokenizer", error=ModelError)
    if not isinstance(content, dict):
        raise ModelError(f"tokenizer {path} must hold one JSON object")
    added = content.get("added_tokens") or []
    if not isinstance(added, list) or len(added) > ADDED_TOKENS_MAX:
        raise ModelError(f"tokenizer {path}: added_tokens must be a list of at most {ADDED_TOKENS_MAX}")
    growth = 1.0
    for step in _replacements({name: part for name, part in content.items() if name not in ("model", "added_tokens")}):
        pattern, new = step.get("pattern"), step.get("content")
        old = pattern.get("String") if isinstance(pattern, dict) else None
        growth *= max(1.0, len(str(new)) / max(1, len(str(old or ""))))
    if growth > _GROWTH_MAX:
        raise ModelError(f"tokenizer {path}: its replacements make a text {growth:.0f} times as long as it was")


def _replacements(value: object) -> Iterator[Mapping[str, object]]:
    if isinstance(value, dict):
        if value.get("type") == "Replace":
            yield value
        value = list(value.values())
    for each in value if isinstance(value, list) else ():
        yield from _replacements(each)


def special_tokens_of(file: Path) -> dict[str, int]:
    spec = read_json(file, "tokenizer", error=ModelError)
    if not isinstance(spec, dict) or spec.get("type") != "byte":
        raise ModelError(f"{file}: type must be 'byte'")
    tokens = spec.get("special_tokens")
    if not isinstance(tokens, dict) or len(tokens) > ADDED_TOKENS_MAX:
        raise ModelError(f"{file}: special_tokens must name at most {ADDED_TOKENS_MAX} tokens")
    for name, number in tokens.items():
        if not name or type(number) is not int or not NUM_BYTES <= number <= _TOKEN_MAX:
            raise ModelError(
                f"{file}: special token {name!r:.100} must have a name and a number of {NUM_BYTES} or more"
            )
    return tokens


def eos_ids_of(path: Path) -> frozenset[int]:
    for name in ("generation_config.json", "config.json"):
        if (path / name).is_file():
            content = read_json(path / name, "model config", error=ModelError, infinity=True)
            eos = content.get("eos_token_id") if isinstance(content, dict) else None
            ids = eos if isinstance(eos, list) else [eos]
            if eos is not None:
                if not all(type(number) is int and 0 <= number <= _TOKEN_MAX for number in ids):
                    raise ModelError(f"{path / name}: eos_token_id must be token ids, is {shown(eos)}")
                return frozenset(ids)
    return frozenset()
