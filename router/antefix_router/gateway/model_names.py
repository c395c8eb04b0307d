"""The names that clients may use for the model. A deployment has only one model, so a name says only what the client
expects.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final

from antefix.checked_files import read_toml
from antefix.checked_table import Table
from antefix_router.chat.messages import Effort
from antefix_router.gateway.fields import wrong_value
from antefix_router.gateway.http_errors import ModelNotFound

MODES: Final = {"off": Effort.NONE, "low": Effort.LOW, "high": Effort.HIGH, "max": Effort.MAX}
SERVE: Final = "serve"
REFUSE: Final = "refuse"
# The name is repeated in every piece of a streamed answer.
NAME_CHARACTERS_MAX: Final = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Alias:
    """pattern: a name, or the beginning of a name followed by `*`. effort: how much the model thinks in requests by
    this name that do not say so.
    """

    pattern: str
    effort: Effort | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedModel:
    """asked_for: the client's name for the model, which the answer repeats. is_own: whether this is the model's own
    name.
    """

    asked_for: str
    effort: Effort | None
    is_own: bool


class ModelNames:
    """own: the model's own name, and further names that the operator gave."""

    def __init__(self, own: tuple[str, ...], aliases: tuple[Alias, ...] = (), *, serve_unknown: bool = True) -> None:
        self.own = own
        self._aliases = aliases
        self._serve_unknown = serve_unknown

    @property
    def listed(self) -> tuple[str, ...]:
        """The names that a client may be shown."""
        aliases = (alias.pattern for alias in self._aliases if "*" not in alias.pattern)
        return tuple(dict.fromkeys((*self.own, *aliases)))

    def find(self, name: str) -> NamedModel:
        """Raises:  ModelNotFound: the name is unknown, and unknown names are refused.  WrongField: it is too long."""
        if len(name) > NAME_CHARACTERS_MAX:
            raise wrong_value("model", f" takes {NAME_CHARACTERS_MAX} characters")
        alias = next((each for each in self._aliases if fnmatchcase(name, each.pattern)), None)
        is_own = name in self.own
        if not is_own and alias is None and not self._serve_unknown:
            raise ModelNotFound(f"the model {name[:200]!r} is not served here; there is {', '.join(self.listed)}")
        return NamedModel(asked_for=name, effort=alias.effort if alias is not None else None, is_own=is_own)


def load_aliases(path: str) -> tuple[Alias, ...]:
    """Read a TOML file of `[[alias]]` tables with `name` and optionally `mode`, such as deploy/model_aliases.toml.

    Raises:  ConfigError: the file cannot be read or has another format.
    """
    file = Table(read_toml(path, "model aliases"), f"model aliases {path}")
    aliases = []
    for table in file.children("alias"):
        name = table.text("name")
        mode = table.one_of("mode", tuple(MODES)) if table.has("mode") else None
        table.close()
        aliases.append(Alias(pattern=name, effort=None if mode is None else MODES[mode]))
    file.close()
    return tuple(aliases)
