"""DeepSeek-V4's format, written from the description that comes with the model (its repository's `encoding/README.md`).

    BOS [effort] system [tools] (USER text ASSISTANT think-tag answer [calls] EOS)*

The checkpoint of July 31st (DeepSeek-V4-Flash-0731) has other prompts for the levels of effort. Apart from these
prompts, that checkpoint's format is the same.

Answers without thinking follow `</think>`, answers with thinking follow `<think>`. Reasoning of earlier turns is left
out, unless there are tools: then the model has to see why it made its calls. Tool results are written into the next
user turn, in the order of the calls. Tool calls are DSML: `<｜DSML｜tool_calls>` around `invoke` elements with one
`parameter` each.

The format has a place for system text only at the head. System text that comes later stays where the client put it, as
text of a user's turn.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from antefix_router.chat.chat_formats import OutputParser, mode_name
from antefix_router.chat.dsml import DSML, DeepSeekV4Parser
from antefix_router.chat.dsml_grammar import dsml_grammar
from antefix_router.chat.messages import (
    Answer,
    Aside,
    ChatRole,
    Conversation,
    Effort,
    Message,
    Piece,
    Plain,
    Special,
    ToolCall,
    end_of,
    plain_of,
)

BOS: Final = "<｜begin▁of▁sentence｜>"
EOS: Final = "<｜end▁of▁sentence｜>"
USER: Final = "<｜User｜>"
ASSISTANT: Final = "<｜Assistant｜>"
THINK: Final = "<think>"
THINK_END: Final = "</think>"

# The model was trained on exactly these prompts. Changing a letter would change its behaviour.
_ABSOLUTE: Final = (
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    "You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root cause,"
    " rigorously stress-testing your logic against all potential paths, edge cases, and adversarial scenarios.\n"
    "Explicitly write out your entire deliberation process, documenting every intermediate step, considered"
    " alternative, and rejected hypothesis to ensure absolutely no assumption is left unchecked.\n\n"
)
_BEYOND: Final = (
    "Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.\n"
    "You MUST reason with the utmost depth and rigor, leaving absolutely nothing to chance: exhaustively decompose the"
    " problem into its most fundamental components, trace every causal chain to its root, and resolve the underlying"
    " cause rather than any surface symptom.\n"
    "Do not stop reasoning until you have independently verified the solution from multiple angles and are certain that"
    " no assumption remains unchecked and no error remains undiscovered.\n\n"
)
EFFORTS: Final = {Effort.MAX: _ABSOLUTE}
EFFORTS_0731: Final = {Effort.HIGH: _ABSOLUTE, Effort.MAX: _BEYOND}
_TOOLS_BEFORE: Final = f"""## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by writing a\
 "<{DSML}tool_calls>" block like the following:

<{DSML}tool_calls>
<{DSML}invoke name="$TOOL_NAME">
<{DSML}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{DSML}parameter>
...
</{DSML}invoke>
<{DSML}invoke name="$TOOL_NAME2">
...
</{DSML}invoke>
</{DSML}tool_calls>

String parameters should be specified as is and set `string="true"`. For all other types (numbers, booleans, arrays,\
 objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by {THINK}), you MUST output your complete reasoning inside\
 {THINK}...{THINK_END} BEFORE any tool calls or final response.

Otherwise, output directly after {THINK_END} with tool calls or final response.

### Available Tool Schemas

"""
_TOOLS_AFTER: Final = (
    "\n\nYou MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.\n"
)
_SCHEMA: Final = "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"


class DeepSeekV4Format:
    """The format described above. efforts: for each level of effort, the text that begins a prompt if the model is to
    think; EFFORTS_0731 for the checkpoint of July 31st.
    """

    supports_reasoning = True
    is_program = False

    def __init__(self, efforts: Mapping[Effort, str] = EFFORTS) -> None:
        self.name = "deepseek-v4" if efforts is EFFORTS else "deepseek-v4-0731"
        self._efforts = efforts

    def render(self, conversation: Conversation) -> list[Piece]:
        messages = _in_call_order(conversation.messages)
        pieces: list[Piece] = [Special(text=BOS)]
        if conversation.effort in self._efforts:
            pieces.append(Special(text=self._efforts[conversation.effort]))
        pieces += _preamble(conversation, messages)
        head = _num_system(messages)
        last_user = max(
            (i for i, m in enumerate(messages) if i >= head and m.role is not ChatRole.ASSISTANT), default=-1
        )
        for index, message in enumerate(messages[head:], head):
            keeps_reasoning = bool(conversation.tools) or index > last_user
            ends = index == len(messages) - 1
            if message.role is ChatRole.ASSISTANT:
                is_begun = ends and conversation.continue_last
                pieces += _aside(conversation, messages[head:index], is_last=is_begun)
                pieces += _opening(conversation.effort, keeps_reasoning)
                pieces.append(_answer(message, conversation.effort, keeps_reasoning))
                pieces += end_of(message)
                if is_begun:
                    return pieces
                pieces.append(Special(text=EOS))
            else:
                follows = index > head and messages[index - 1].role is not ChatRole.ASSISTANT
                pieces.append(Special(text="\n\n" if follows else USER))
                pieces += _spoken(message)
        return [*pieces, *_aside(conversation, messages[head:], is_last=True), *_opening(conversation.effort, True)]

    def mode_name(self, effort: Effort) -> str:
        """LOW and HIGH have the same name, except in the later checkpoint, whose format distinguishes them."""
        if effort is Effort.LOW and self._efforts is not EFFORTS_0731:
            return Effort.HIGH.value
        return mode_name(effort)

    def parser(self, conversation: Conversation) -> OutputParser:
        return DeepSeekV4Parser(in_reasoning=_begins_thinking(conversation), has_tools=bool(conversation.tools))

    def grammar(self, conversation: Conversation) -> str:
        return dsml_grammar(conversation, thinks=_begins_thinking(conversation)) if conversation.has_form else ""


def _begins_thinking(conversation: Conversation) -> bool:
    continues = conversation.continue_last and bool(conversation.messages[-1].content)
    return conversation.effort is not Effort.NONE and not continues


def _preamble(conversation: Conversation, messages: tuple[Message, ...]) -> list[Piece]:
    """System text, tools and response format, in the order that the model was trained on."""
    pieces: list[Piece] = []
    for index, message in enumerate(messages[: _num_system(messages)]):
        pieces += [Special(text="\n\n")] if index else []
        pieces += [plain_of(message), *end_of(message)]
    if conversation.tools:
        schemas = "\n".join(_json(tool) for tool in conversation.listed_tools)
        pieces += [Special(text="\n\n" + _TOOLS_BEFORE), Plain(text=schemas), Special(text=_TOOLS_AFTER)]
    if conversation.tools_breakpoint is not None:
        pieces.append(conversation.tools_breakpoint)
    if conversation.response_schema is not None:
        pieces += [Special(text="\n\n" + _SCHEMA), Plain(text=_json(conversation.response_schema))]
    return pieces


def _num_system(messages: tuple[Message, ...]) -> int:
    """How many messages at the beginning are system text."""
    return next((i for i, message in enumerate(messages) if message.role is not ChatRole.SYSTEM), len(messages))


def _aside(conversation: Conversation, turns: tuple[Message, ...], *, is_last: bool) -> list[Piece]:
    """The request-dependent text (`Aside`), placed at the end of the last user turn of `turns`, or as a turn of its
    own.
    """
    if not conversation.aside:
        return []
    follows = bool(turns) and turns[-1].role is not ChatRole.ASSISTANT
    said = Special(text="\n\n" if follows else USER), Plain(text=conversation.aside)
    return [Aside(pieces=said if is_last else ())]


def _opening(effort: Effort, keeps_reasoning: bool) -> list[Piece]:
    thinks = effort is not Effort.NONE and keeps_reasoning
    return [Special(text=ASSISTANT + (THINK if thinks else THINK_END))]


def _answer(message: Message, effort: Effort, keeps_reasoning: bool) -> Answer:
    pieces: list[Special | Plain] = []
    shown = message
    if effort is not Effort.NONE and keeps_reasoning:
        pieces += [Plain(text=message.reasoning), Special(text=THINK_END)]
    else:
        shown = replace(shown, reasoning="")
    pieces.append(plain_of(message))
    if message.tool_calls:
        pieces.append(Special(text=f"\n\n<{DSML}tool_calls>\n"))
        for call in message.tool_calls:
            pieces += _call(call)
        pieces.append(Special(text=f"</{DSML}tool_calls>"))
    return Answer(message=shown, pieces=tuple(pieces))


def _call(call: ToolCall) -> list[Special | Plain]:
    arguments = _arguments(call.arguments)
    pieces: list[Special | Plain] = [Special(text=f'<{DSML}invoke name="'), Plain(text=call.name), Special(text='">\n')]
    for name, value in arguments.items():
        is_text = isinstance(value, str)
        pieces += [
            Special(text=f'<{DSML}parameter name="'),
            Plain(text=str(name)),
            Special(text=f'" string="{"true" if is_text else "false"}">'),
            Plain(text=value if is_text else _json(value)),
            Special(text=f"</{DSML}parameter>\n"),
        ]
    # For a call without parameters, the model writes an empty line here, so it is kept.
    return [*pieces, Special(text=f"{'' if arguments else chr(10)}</{DSML}invoke>\n")]


def _arguments(text: str) -> dict[str, Any]:
    """The arguments of a call in an earlier turn. Text that is not a JSON object stays text, so that the model sees its
    mistake and the conversation is not refused in all later turns.
    """
    try:
        arguments = json.loads(text or "{}")
        # A JSON escape can stand for half of a surrogate pair, which is not valid text.
        json.dumps(arguments, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        arguments = None
    return arguments if isinstance(arguments, dict) else {"arguments": text}


def _spoken(message: Message) -> list[Piece]:
    said: list[Piece] = [plain_of(message)]
    if message.role is ChatRole.TOOL:
        said = [Special(text="<tool_result>"), *said, Special(text="</tool_result>")]
    return [*said, *end_of(message)]


def _in_call_order(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Put the results of parallel calls in the order of the calls, whatever order the client sent. So every turn of a
    conversation gives the same prefix.
    """
    ordered = list(messages)
    order: dict[str, int] = {}
    start = 0
    while start < len(ordered):
        if ordered[start].role is ChatRole.ASSISTANT:
            order = {call.id: index for index, call in enumerate(ordered[start].tool_calls)}
        stop = start
        while stop < len(ordered) and ordered[stop].role is ChatRole.TOOL:
            stop += 1
        if stop > start:
            ordered[start:stop] = sorted(ordered[start:stop], key=lambda m: order.get(m.tool_call_id, len(order)))
        start = max(stop, start + 1)
    return tuple(ordered)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
