"""Assembles the tool calls of one answer from their pieces. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from antefix_router.chat.messages import CallDelta, Delta, ToolCall
from antefix_router.chat.strict import keeps_to


class Calls:
    """strict: schemas of the tools whose calls must satisfy them. A call of a strict tool is held until it is complete
    and valid.
    """

    def __init__(self, strict: Mapping[str, Any]) -> None:
        self.done: list[ToolCall] = []
        self._strict = strict
        self._open: ToolCall | None = None

    @property
    def cut_off(self) -> ToolCall | None:
        """A call whose end never came, up to the part that its client was shown."""
        return None if self._open is None or self._is_held else self._open

    @property
    def _is_held(self) -> bool:
        return self._open is not None and self._open.name in self._strict

    def push(self, piece: CallDelta) -> list[Delta]:
        """Take a piece. Returns what goes out now."""
        if piece.name or self._open is None or self._open.id != piece.id:
            self._open = ToolCall(id=piece.id, name=piece.name, arguments="")
        self._open = ToolCall(id=piece.id, name=self._open.name, arguments=self._open.arguments + piece.arguments)
        if not self._is_held:
            if piece.is_last:
                self._close(self._open)
            return [Delta(call=piece)]
        if not piece.is_last:
            return []
        call = self._open
        if keeps_to(call, self._strict):
            self._close(call)
            return [Delta(call=CallDelta(id=call.id, name=call.name, arguments=call.arguments, is_last=True))]
        # The client must not execute this call, so it is shown as text.
        self._open = None
        return [Delta(content=f"{call.name}({call.arguments})")]

    def _close(self, call: ToolCall) -> None:
        self.done.append(call)
        self._open = None
