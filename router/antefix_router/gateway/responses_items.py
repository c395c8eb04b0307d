"""A response's output items and the events that announce them. Knows no request."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from antefix_router.chat.messages import CallDelta, Delta
from antefix_router.gateway.output import Output
from antefix_router.gateway.signatures import Signatures
from antefix_router.gateway.tools import GroupedName


class Items:
    """The output items of a response, one after the other: reasoning, a message, calls. Each method returns the events
    that announce its step.

    grouped: functions that the client knows by a name within a group.  seal: encrypts reasoning for a client that
    cannot send it back otherwise; None if the client did not ask for that.
    """

    def __init__(self, output: Output, grouped: Mapping[str, GroupedName], seal: Signatures | None) -> None:
        self.done: list[dict[str, Any]] = []
        self._output = output
        self._grouped = grouped
        self._seal = seal
        self._call: dict[str, Any] | None = None
        self._kind = ""
        self._id = ""
        self._text = ""
        self._logprobs: list[dict[str, Any]] = []

    def push(self, delta: Delta) -> list[dict[str, Any]]:
        if delta.call is not None:
            return [*self._close(), *self._push_call(delta.call)]
        kind, text = ("reasoning", delta.reasoning) if delta.reasoning else ("message", delta.content)
        events = [] if kind == self._kind else [*self._close(), *self._end_call("incomplete"), *self._open(kind)]
        self._text += text
        if kind == "reasoning":
            return [*events, {"type": "response.reasoning_text.delta", **self._place(), "delta": text}]
        logprobs = self._new_logprobs()
        self._logprobs += logprobs
        return [*events, {"type": "response.output_text.delta", **self._place(), "delta": text, "logprobs": logprobs}]

    def _new_logprobs(self) -> list[dict[str, Any]]:
        """Log probabilities of the tokens in the message's text. The Responses API has no place for log probabilities
        of reasoning.
        """
        return [self._output.logprobs.full(each) for each in self._output.new_logprobs() if not each.is_reasoning]

    def finish(self, *, is_shown: bool = True) -> list[dict[str, Any]]:
        """End the answer. An answer without text is still one message.  is_shown: the client has seen the beginning of
        a call that was cut off, so it gets the rest. Without such a beginning, a call that was cut off is left out.
        """
        events = self._end_call("incomplete") if is_shown else []
        return [*events, *([] if self._kind or self.done else self._open("message")), *self._close()]

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._id, "output_index": len(self.done), "content_index": 0}

    def _part(self) -> dict[str, Any]:
        if self._kind == "message":
            return {"type": "output_text", "text": self._text, "annotations": [], "logprobs": [*self._logprobs]}
        return {"type": "reasoning_text", "text": self._text}

    def _item(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        if self._kind == "message":
            return {"id": self._id, "type": "message", "role": "assistant", "status": status, "content": content}
        item = {"id": self._id, "type": "reasoning", "summary": [], "content": content, "status": status}
        return item if self._seal is None else {**item, "encrypted_content": self._seal.seal(self._text)}

    def _open(self, kind: str) -> list[dict[str, Any]]:
        self._kind, self._text, self._logprobs = kind, "", []
        self._id = f"{'msg' if kind == 'message' else 'rs'}_{secrets.token_hex(12)}"
        item = self._item("in_progress", [])
        return [
            {"type": "response.output_item.added", "output_index": len(self.done), "item": item},
            {"type": "response.content_part.added", **self._place(), "part": self._part()},
        ]

    def _close(self) -> list[dict[str, Any]]:
        if not self._kind:
            return []
        if self._kind == "message":
            self._logprobs += self._new_logprobs()
        part = self._part()
        name = "response.output_text.done" if self._kind == "message" else "response.reasoning_text.done"
        logprobs: dict[str, Any] = {"logprobs": part["logprobs"]} if self._kind == "message" else {}
        item = self._item("completed", [part])
        events = [
            {"type": name, **self._place(), "text": self._text, **logprobs},
            {"type": "response.content_part.done", **self._place(), "part": part},
            {"type": "response.output_item.done", "output_index": len(self.done), "item": item},
        ]
        self.done.append(item)
        self._kind = ""
        return events

    def _push_call(self, call: CallDelta) -> list[dict[str, Any]]:
        events = []
        if self._call is None or self._call["call_id"] != call.id:
            events += [*self._end_call("incomplete"), *self._begin_call(call)]
        assert self._call is not None
        if call.arguments:
            self._call["arguments"] += call.arguments
            place = self._call_place(self._call)
            events.append({"type": "response.function_call_arguments.delta", **place, "delta": call.arguments})
        return [*events, *self._end_call("completed")] if call.is_last else events

    def _begin_call(self, call: CallDelta) -> list[dict[str, Any]]:
        name: dict[str, Any] = {"name": call.name}
        if (grouped := self._grouped.get(call.name)) is not None:
            name = {"name": grouped.name, "namespace": grouped.group}
        self._call = {
            "id": f"fc_{secrets.token_hex(12)}",
            "type": "function_call",
            "call_id": call.id,
            **name,
            "arguments": "",
            "status": "in_progress",
        }
        place = {"output_index": len(self.done), "item": dict(self._call)}
        return [{"type": "response.output_item.added", **place}]

    def _end_call(self, status: str) -> list[dict[str, Any]]:
        """End a call, even one that was cut off. The arguments of a call that was cut off are incomplete and not valid
        JSON.
        """
        if self._call is None:
            return []
        call, self._call = {**self._call, "status": status}, None
        place = self._call_place(call)
        self.done.append(call)
        said = {"name": call["name"], "arguments": call["arguments"]}
        return [
            {"type": "response.function_call_arguments.done", **place, **said},
            {"type": "response.output_item.done", "output_index": place["output_index"], "item": call},
        ]

    def _call_place(self, call: dict[str, Any]) -> dict[str, Any]:
        return {"item_id": call["id"], "output_index": len(self.done)}
