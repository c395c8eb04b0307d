"""Strategies that decide where checkpoints are left: they are parsed from text, set per namespace, and can be changed
while running.

A strategy is a value; its two methods are pure functions of what the worker knows at two moments: when a prompt's
restore has been planned (state passes through every boundary from `resume_block` on, so each can be kept without
recomputing anything), and when an output has ended. Checkpoints stored under one strategy stay usable under any
other: strategies only decide what is written, and the planner uses every checkpoint that exists.
"""

from __future__ import annotations

import re
from dataclasses import replace

from antefix.byte_size import parse_byte_size
from antefix.config import require
from antefix.errors import ConfigError
from antefix.layout import KVGeometry
from antefix.whole_number import whole_number
from antefix.window.auto import Auto
from antefix.window.fixed import Boundary, Full, Periodic, Zero
from antefix.window.marks import Strategy, Tier

_CALL = re.compile(r"\s*(?P<name>[a-z]+)\s*(?:\(\s*(?P<args>[^()]*?)\s*\))?\s*")
_ENTRY = re.compile(r"(?P<namespace>[^=;()\s]+)\s*=\s*(?P<strategy>.*)")


def parse(text: str) -> Strategy:
    """`full`, `periodic(8192)`, `boundary`, `auto`, `auto(budget=20GiB, ends=pool)` or `zero`.

    Raises:  ConfigError: anything else; the message lists what is accepted.
    """
    match = _CALL.fullmatch(text)
    name, args = (match["name"], match["args"] or "") if match else ("", "")
    plain: dict[str, Strategy] = {"full": Full(), "boundary": Boundary(), "auto": Auto(), "zero": Zero()}
    if name in plain and not args:
        return plain[name]
    if name == "periodic" and (every := whole_number(args)) is not None:
        return Periodic(every)
    if name == "auto":
        return _parse_auto(text, args)
    raise _unknown(text)


def _parse_auto(text: str, args: str) -> Auto:
    budget: int | None = None
    ends: Tier | None = None
    for arg in args.split(","):
        key, _, value = (part.strip() for part in arg.partition("="))
        if key == "budget":
            budget = parse_byte_size(value)
        elif key == "ends" and value in tuple(Tier):
            ends = Tier(value)
        else:
            raise _unknown(text)
    return Auto(budget_bytes=budget, ends=ends)


def _unknown(text: str) -> ConfigError:
    return ConfigError(
        f"unknown window strategy {text!r}: use full, periodic(TOKENS), boundary, auto, zero, "
        "or auto(budget=SIZE, ends=disk|pool) with either or both"
    )


class Strategies:
    """Which window strategy each namespace uses now. A strategy that is set counts from the next request on; nothing
    that is stored is lost by the change.
    """

    def __init__(self, default: Strategy | None = None) -> None:
        self._default: Strategy = default or Auto()
        self._by_namespace: dict[str, Strategy] = {}

    @classmethod
    def parse(cls, text: str) -> Strategies:
        """`auto`, or `agents=periodic(8192); batch=zero; auto`: strategies of namespaces, and that of all others (auto
        where none is given).

        Raises:  ConfigError: a strategy that is none, or a namespace or the others given twice.
        """
        found = cls()
        seen: set[str] = set()
        for part in text.split(";") if text.strip() else ():
            match = _ENTRY.fullmatch(part.strip())
            name, strategy = (match["namespace"], match["strategy"]) if match else ("", part)
            if name in seen:
                raise ConfigError(f"strategy {text!r} is given twice for {name or 'all other namespaces'}")
            seen.add(name)
            if name:
                found.set(name, parse(strategy))
            else:
                found._default = parse(strategy)
        return found

    def of(self, namespace: str) -> Strategy:
        return self._by_namespace.get(namespace, self._default)

    def all(self) -> tuple[Strategy, ...]:
        return self._default, *self._by_namespace.values()

    def set(self, namespace: str, strategy: Strategy) -> None:
        self._by_namespace[namespace] = strategy


def in_force(strategy: Strategy, *, has_pool: bool) -> Strategy:
    """The strategy adapted to this deployment: `auto` sends checkpoints of ends to the window pool if there is one,
    unless its `ends` option says otherwise.

    Raises:  ConfigError: the strategy needs a window pool and there is none.
    """
    if not isinstance(strategy, Auto):
        return strategy
    if strategy.ends is Tier.POOL and not has_pool:
        raise ConfigError(f"{strategy} needs a window pool: set window_pool to memory or to a redis:// URL")
    return replace(strategy, ends=Tier.POOL) if has_pool and strategy.ends is None else strategy


def check_exactness(*, bounded_windows: int, reproducible: bool) -> None:
    """Raises:  ConfigError: a negative number of windows, or approximate and reproducible at once."""
    if bounded_windows < 0:
        raise ConfigError(f"bounded_windows must not be negative, is {bounded_windows}")
    if bounded_windows and reproducible:
        raise ConfigError(
            f"bounded_windows={bounded_windows} allows approximate hits, but reproducible asks for hits that "
            "equal cold runs: give one of the two settings"
        )


def check_bounded(num_windows: int, geometry: KVGeometry) -> None:
    """Raises:  ConfigError: the approximate replay would be no shorter than an exact one."""
    exact = geometry.replay_tokens
    require(
        num_windows * geometry.window < max(exact, 1) or not num_windows,
        f"bounded_windows={num_windows} replays {num_windows * geometry.window} tokens, but an exact replay of this"
        f" model only {exact}: leave bounded_windows out, and every hit is exact",
    )
