"""Runs a chat template in a separate process (`template_child`) with limits on time and memory. The calls block, so
callers run them in threads.
"""

from __future__ import annotations

import json
import select
import subprocess
import sys
import threading
import time
from typing import Any, Final

import jinja2

from antefix.errors import InvalidRequest
from antefix_router.chat import template_child

# Processor time has its own limit. This limit on elapsed time ends a process that waits without end, and leaves room
# for a busy machine.
ANSWER_S_MAX: Final = 60.0
_PIECE_BYTES: Final = 1 << 20


class TemplateTooLong(InvalidRequest):
    """The template takes too much time or memory for this conversation. The caller shortens it."""


class TemplateProcess:
    """Renders conversations one at a time. The process starts at the first use, and again after it has ended."""

    def __init__(self, template: str) -> None:
        self._template = template
        self._process: subprocess.Popen[bytes] | None = None
        self._turn = threading.Lock()
        self.num_ended = 0

    def check(self) -> None:
        """Raises:  jinja2.TemplateError: the template does not compile.  TemplateTooLong: compiling it takes
        too long.
        """
        with self._turn:
            self._started()

    def __call__(self, given: dict[str, Any]) -> str:
        """The text.  Raises:  jinja2.TemplateError: the template refuses the conversation.  TemplateTooLong."""
        with self._turn:
            return self._asked(self._started(), given)

    def close(self) -> None:
        """End the process. The next use of the template starts another process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                pipe.close()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process = subprocess.Popen(
                [sys.executable, "-m", template_child.__name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            try:
                self._asked(self._process, self._template)
            except BaseException:
                self.close()
                raise
        return self._process

    def _asked(self, process: subprocess.Popen[bytes], given: Any) -> str:
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(given).encode() + b"\n")
            process.stdin.flush()
            line = _line_of(process)
        except BrokenPipeError:
            line = b""
        if not line.endswith(b"\n"):
            self.num_ended += 1
            self.close()
            raise TemplateTooLong(
                f"the model's chat template takes more than {template_child.CPU_S_MAX} s, or too much memory, for this"
                " conversation"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise jinja2.TemplateError(answer["error"])
        return str(answer["text"])


def _line_of(process: subprocess.Popen[bytes]) -> bytes:
    """The line that the process answered; incomplete if the process ended or did not answer in time."""
    assert process.stdout is not None
    pieces: list[bytes] = []
    ends = time.monotonic() + ANSWER_S_MAX
    while (left_s := ends - time.monotonic()) > 0:
        ready, _, _ = select.select([process.stdout], [], [], left_s)
        piece = process.stdout.read1(_PIECE_BYTES) if ready else b""  # type: ignore[attr-defined]
        pieces.append(piece)
        if not piece or piece.endswith(b"\n"):
            break
    return b"".join(pieces)
