"""A process that renders conversations with a chat template. A template is a foreign program that may loop without end
or fill memory. Python cannot stop such a program from inside, but a process can be ended.

Reads JSON lines: first the template, then the template's input for each conversation. The process answers each line
with {"text": ...}, or with {"error": ...} and the reason. The process ends if it exceeds its limit of processor time or
memory.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

CPU_S_MAX: Final = 2
MEMORY_BYTES_MAX: Final = 1 << 30
# Longer than the largest allowed prompt.
TEXT_CHARACTERS_MAX: Final = 64 << 20
# Exceptions that are the template's own fault.
TEMPLATE_FAILS: Final = (
    *(jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError),
    *(MemoryError, RecursionError, SyntaxError),
)

Write = Callable[[dict[str, Any]], str]


def compiled(template: str) -> Write:
    """A function that renders a text from the template's input. Raises: any of the errors in TEMPLATE_FAILS, either
    here or when the function is called.
    """
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda text: datetime.now(UTC).strftime(text)
    made = environment.from_string(template)
    return lambda given: made.render(**given)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _answer(work: Callable[[], str]) -> dict[str, str]:
    try:
        text = work()
    except TEMPLATE_FAILS as err:
        return {"error": f"{str(err) or type(err).__name__:.300}"[:300]}
    if len(text) > TEXT_CHARACTERS_MAX:
        return {"error": f"the text has {len(text)} characters; at most {TEXT_CHARACTERS_MAX} are allowed"}
    return {"text": text}


def _begin_share() -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime) + CPU_S_MAX
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES_MAX, MEMORY_BYTES_MAX))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    write: Write | None = None
    for line in sys.stdin.buffer:
        _begin_share()
        given = json.loads(line)
        if write is None:
            found: list[Write] = []
            answer = _answer(lambda: found.append(compiled(given)) or "")  # type: ignore[func-returns-value]  # noqa: B023
            write = found[0] if found else None
        else:
            made = write
            answer = _answer(lambda: made(given))  # noqa: B023
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
