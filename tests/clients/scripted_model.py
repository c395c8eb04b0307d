"""A scripted model for real programs: it follows directives in the user's text and calls the program's own tools.

A user's text has `[[task]]` and directives such as `[[run: echo hi]] [[read: /tmp/a.png]] [[result]]`. Each directive
gives one answer, in that order. Answers are in DeepSeek-V4's format, with thinking if the prompt asks for it. Hits are
counted over the real tokens by the real rule: whole blocks that an earlier request of the same cache tenant left.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from antefix.block import as_tokens
from tests.gateway.scripted import Script

BLOCK_SIZE = 64
_USER, _ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
_DIRECTIVE = re.compile(r"\[\[(run|read|call|say|result):? ?(.*?)\]\]", re.DOTALL)
_RESULT = re.compile(r"<tool_result>(.*?)</tool_result>", re.DOTALL)
_SCHEMAS = re.compile(r"### Available Tool Schemas\n\n(.*?)\n\nYou MUST strictly", re.DOTALL)
# The programs' names for the tool that runs a command, for the tool that reads a file, and for their parameters.
_RUNS = ("Bash", "bash", "exec_command", "shell_command", "shell", "run")
_READS = ("Read", "read", "view_image", "look")
_COMMANDS = ("command", "cmd")
_PATHS = ("file_path", "filePath", "path")


def answer(prompt: str) -> str:
    """The model's answer to this prompt."""
    thinks = prompt.endswith("<think>")
    thought = "Let me see.</think>" if thinks else ""
    tools = _tools_of(prompt)
    directives, num_done = _asked(prompt)
    if not tools or not directives:
        # Programs also send requests for titles, suggestions and the like.
        return f"{thought}A talk"
    kind, value = directives[min(num_done, len(directives) - 1)]
    if kind == "say":
        return thought + value
    if kind == "result":
        results = _RESULT.findall(prompt)
        return f"{thought}It said: {' '.join(results[-1].split())}"
    if kind == "call":
        name, _, arguments = value.partition(" ")
        # Round brackets stand for the square brackets of a task within a task.
        inner = json.loads(arguments.replace("((", "[[").replace("))", "]]"))
        return f"{thought}I look.{_call(name, inner)}"
    name, schema = _tool_for(tools, _RUNS if kind == "run" else _READS)
    return f"{thought}I look.{_call(name, _arguments(schema, value))}"


def _tools_of(prompt: str) -> dict[str, dict[str, Any]]:
    found = _SCHEMAS.search(prompt)
    tools = [json.loads(line) for line in found.group(1).splitlines()] if found else []
    return {tool["name"]: tool["parameters"] for tool in tools}


def _asked(prompt: str) -> tuple[list[tuple[str, str]], int]:
    """The directives of the newest user turn that has any, and the number of answers to that turn so far."""
    turns = prompt.split(_USER)[1:]
    for num_later, turn in enumerate(reversed(turns)):
        # After a cancelled answer, one turn may hold two tasks.
        said = _RESULT.sub("", turn.split(_ASSISTANT)[0]).rpartition("[[task]]")[2]
        if found := _DIRECTIVE.findall(said):
            return found, num_later
    return [], 0


def _tool_for(tools: dict[str, Any], names: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
    name = next(name for name in names if name in tools)
    return name, tools[name]


def _arguments(schema: dict[str, Any], value: str) -> dict[str, Any]:
    """Arguments with the value in the right parameter, and with some value for each other required parameter."""
    properties = schema.get("properties", {})
    place = next(name for name in (*_COMMANDS, *_PATHS) if name in properties)
    arguments: dict[str, Any] = {}
    for name in [place, *schema.get("required", [])]:
        is_list = properties[name].get("type") == "array"
        text = value if name == place else "looking"
        arguments.setdefault(name, ["bash", "-c", text] if is_list else text)
    return arguments


def _call(name: str, arguments: dict[str, Any]) -> str:
    lines = [
        f'<｜DSML｜parameter name="{key}" string="true">{value}</｜DSML｜parameter>'
        if isinstance(value, str)
        else f'<｜DSML｜parameter name="{key}" string="false">{json.dumps(value)}</｜DSML｜parameter>'
        for key, value in arguments.items()
    ]
    inside = "\n".join(lines)
    return (
        f'\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="{name}">\n{inside}\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>'
    )


@dataclass
class CachingScript(Script):
    """A script whose requests hit earlier requests' blocks, as with the real services."""

    stored: set[bytes] = field(default_factory=set)

    @property
    def texts(self) -> list[str]:
        """All prompts so far, as text."""
        return [text_of(request.tokens) for request in self.requests]

    @property
    def last_prompt(self) -> str:
        return self.texts[-1]

    @property
    def last_answer(self) -> str:
        return bytes(answer_of(self.generations[-1])).decode(errors="replace")

    async def run(self, generation, timeout_s):
        request = generation.request
        tenant = request.cache_tenant
        blocks = list(_block_names(tenant, request.tokens))
        num_held = sum(1 for _ in itertools.takewhile(self.stored.__contains__, blocks))
        # The last token is always computed, because its logits are needed.
        self.hit = min(num_held, (len(request.tokens) - 1) // BLOCK_SIZE) * BLOCK_SIZE
        try:
            async for tokens in super().run(generation, timeout_s):
                yield tokens
        finally:
            whole = as_tokens([*request.tokens.tolist(), *answer_of(generation)])
            self.stored.update(_block_names(tenant, whole))


def answer_of(generation) -> list[int]:
    return generation.samples[0].emitted


def text_of(tokens) -> str:
    return bytes(token for token in tokens.tolist() if token < 256).decode(errors="replace")


def _block_names(tenant: str, tokens) -> Iterator[bytes]:
    state = hashlib.blake2b(tenant.encode(), digest_size=16)
    for start in range(0, len(tokens) // BLOCK_SIZE * BLOCK_SIZE, BLOCK_SIZE):
        state.update(tokens[start : start + BLOCK_SIZE].tobytes())
        yield state.digest()
