"""Reads how much the model should think, from all the fields that clients use for it, as one effort. Pure.

Some fields switch thinking on or off (`thinking`, `enable_thinking`), some give an amount (`reasoning_effort`,
budgets), some do both. If any field says off, thinking is off. Otherwise the strongest effort that any field names
counts. If thinking is only switched on, the model's default effort is used.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from antefix_router.chat.messages import Effort
from antefix_router.gateway.fields import Fields, wrong_type

# DeepSeek's own mapping of the efforts in other APIs.
EFFORTS: dict[str, Effort | None] = {
    "none": Effort.NONE,
    "off": Effort.NONE,
    "minimal": Effort.LOW,
    "low": Effort.LOW,
    "medium": Effort.HIGH,
    "high": Effort.HIGH,
    "xhigh": Effort.HIGH,
    "max": Effort.MAX,
    "ultra": Effort.MAX,
    "auto": None,
    "default": None,
}
_STRENGTH = [Effort.NONE, Effort.LOW, Effort.HIGH, Effort.MAX]
_SWITCHES = {"enabled": True, "adaptive": True, "auto": True, "disabled": False}


@dataclass(slots=True)
class Wish:
    """What a request says about thinking.  asked_by: the fields that ask for it."""

    efforts: list[Effort] = field(default_factory=list)
    switches: list[bool] = field(default_factory=list)
    asked_by: list[str] = field(default_factory=list)

    @property
    def effort(self) -> Effort | None:
        """The effort that the request asks for; None if the request does not say."""
        if False in self.switches or Effort.NONE in self.efforts:
            return Effort.NONE
        if self.efforts:
            return max(self.efforts, key=_STRENGTH.index)
        return Effort.HIGH if self.switches else None

    def read_effort(self, fields: Fields, name: str) -> None:
        effort = fields.one_of(name, EFFORTS, None)
        if effort is not None:
            self.efforts.append(effort)
            self._note(fields.name_of(name), asks=effort is not Effort.NONE)

    def read_switch(self, fields: Fields, name: str) -> None:
        if fields.has(name):
            self._switch(fields.name_of(name), on=fields.boolean(name))

    def read_budget(self, fields: Fields, name: str) -> None:
        """Read an upper bound in tokens; -1 means none. The bound itself has no effect, because max_tokens limits the
        output. Only 0 switches thinking off.
        """
        budget = fields.integer(name, low=-1)
        if budget is not None:
            self._switch(fields.name_of(name), on=budget != 0)

    def read_thinking(self, fields: Fields, name: str) -> None:
        """Read a field that is an object with a type and a budget, or true, or false."""
        value: Any = fields.take(name)
        if value is None:
            return
        if isinstance(value, bool):
            self._switch(fields.name_of(name), on=value)
            return
        if not isinstance(value, dict):
            raise wrong_type(fields.name_of(name), "an object, true or false")
        inner = fields.inside(value, fields.name_of(name))
        if inner.has("type"):
            self._switch(fields.name_of(name), on=inner.one_of("type", _SWITCHES))
        elif not value:
            self._switch(fields.name_of(name), on=True)
        self.read_switch(inner, "enabled")
        self.read_budget(inner, "budget_tokens")
        self.read_budget(inner, "max_tokens")
        self.read_effort(inner, "effort")

    def _switch(self, path: str, *, on: bool) -> None:
        self.switches.append(on)
        self._note(path, asks=on)

    def _note(self, path: str, *, asks: bool) -> None:
        if asks:
            self.asked_by.append(path)


def read_wish(fields: Fields, output_config: Fields | None = None) -> Wish:
    """Read the wish from a request of any API.  output_config: Anthropic's object of that name.

    Raises:  WrongField: an unknown type or effort.
    """
    wish = Wish()
    wish.read_thinking(fields, "thinking")
    wish.read_effort(fields, "reasoning_effort")
    wish.read_thinking(fields, "reasoning")
    wish.read_switch(fields, "enable_thinking")
    wish.read_budget(fields, "thinking_budget")
    arguments = fields.child("chat_template_kwargs")
    if arguments is not None:
        wish.read_switch(arguments, "thinking")
        wish.read_switch(arguments, "enable_thinking")
        wish.read_budget(arguments, "thinking_budget")
        wish.read_effort(arguments, "reasoning_effort")
    if output_config is not None:
        wish.read_effort(output_config, "effort")
    return wish
