"""Checks before admission whether a grammar can be used, in a separate process with a time limit."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import sys
from collections import OrderedDict
from pathlib import Path

from antefix.errors import InvalidRequest, Overloaded
from antefix.sampling import GRAMMAR_BYTES_MAX
from antefix_router import grammar_child

NUM_KNOWN_MAX = 1024
NUM_WAITING_MAX = 32
# Processor time has its own limit. This limit on elapsed time ends a process that waits without end, and leaves room
# for a busy machine.
ANSWER_S_MAX = 60.0
START_S_MAX = 120.0


class UnusableGrammar(InvalidRequest):
    """No output can follow this grammar: the grammar is wrong, impossible, or needs too much work."""


class GrammarCheck:
    """Checks grammars. The results of checks, including refusals, are remembered, so that no grammar is checked
    twice.
    """

    def __init__(self, model: Path, vocab_size: int) -> None:
        self._arguments = (str(model), str(vocab_size))
        self._known: OrderedDict[bytes, str] = OrderedDict()
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()
        self._num_waiting = 0

    async def check(self, grammar: str) -> None:
        """Raises:  UnusableGrammar: no output can follow it, or it is too large.  Overloaded: too many are being
        checked.
        """
        if len(grammar.encode()) > GRAMMAR_BYTES_MAX:
            raise UnusableGrammar(f"a grammar takes at most {GRAMMAR_BYTES_MAX} bytes")
        name = hashlib.blake2b(grammar.encode(), digest_size=16).digest()
        fault = self._known.get(name)
        if fault is None:
            fault = await self._find_out(name, grammar)
        self._known.move_to_end(name)
        if fault:
            raise UnusableGrammar(fault)

    async def _find_out(self, name: bytes, grammar: str) -> str:
        if self._num_waiting >= NUM_WAITING_MAX:
            raise Overloaded(
                f"{self._num_waiting} output formats are being checked already, which is the limit", retry_after_s=1.0
            )
        self._num_waiting += 1
        try:
            async with self._turn:
                if name not in self._known:  # no other request has checked it meanwhile
                    self._known[name] = await self._ask(grammar)
        finally:
            self._num_waiting -= 1
        while len(self._known) > NUM_KNOWN_MAX:
            self._known.popitem(last=False)
        return self._known[name]

    async def _ask(self, grammar: str) -> str:
        process = self._process
        try:
            if process is None or process.returncode is not None:
                process = self._process = await self._start()
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(json.dumps(grammar).encode() + b"\n")
            async with asyncio.timeout(ANSWER_S_MAX):
                await process.stdin.drain()
                answer = await process.stdout.readline()
        except (TimeoutError, ConnectionError):
            answer = b""
        except BaseException:
            await self.close()  # a late answer must not be taken for the next grammar's
            raise
        if answer.endswith(b"\n"):
            return str(json.loads(answer))
        await self.close()
        return f"the output format takes more than {grammar_child.CPU_S_MAX} s, or too much memory, to compile"

    async def _start(self) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", grammar_child.__name__, *self._arguments),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=1 << 20,
        )
        # An empty grammar is checked first. Its answer shows that the vocabulary has been read, so that reading it does
        # not count against a grammar's time.
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b'"start: \\"a\\"\\n"\n')
        try:
            async with asyncio.timeout(START_S_MAX):
                await process.stdin.drain()
                if await process.stdout.readline() != b'""\n':
                    raise Overloaded("the process that checks output formats does not start", retry_after_s=5.0)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            raise
        return process

    async def close(self) -> None:
        """End the process. The next check starts another."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdout is not None
        if not process.stdout.at_eof():
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        await process.wait()
