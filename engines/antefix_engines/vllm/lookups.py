"""Lookups that do not block: vLLM's scheduler asks for each key, and repeats the question until there is an answer.

Questions of one scheduler step are sent to a thread at the step's end, in one batch per request. An answer that takes
longer than `wait_s` counts as a miss: then the request is computed instead of waiting.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from antefix_engines.vllm.prompt import Asked, Prompt

log = logging.getLogger("antefix.engines.vllm")

Find = Callable[[Prompt, Sequence[Asked]], set[bytes]]


class Lookups:
    """vLLM's thread calls all methods; `find` runs in one of our threads."""

    def __init__(self, find: Find, *, wait_s: float, on_late: Callable[[int], None]) -> None:
        """on_late: called with the number of keys that were given up."""
        self._find: Final = find
        self._wait_s: Final = wait_s
        self._on_late: Final = on_late
        self._asking: Final[queue.SimpleQueue[tuple[Prompt, list[Asked]] | None]] = queue.SimpleQueue()
        self._answers: Final[deque[tuple[Prompt, list[Asked], set[bytes]]]] = deque()
        self._asked: dict[str, Prompt] = {}
        self._thread: Final = threading.Thread(target=self._work, name="antefix-vllm-lookup", daemon=True)
        self._thread.start()

    def ask(self, prompt: Prompt, asked: Asked) -> bool | None:
        """Whether a load would get the row of the key; None: not known yet, so vLLM asks again in the next step."""
        self._take_answers()
        verdict = prompt.verdicts.get(asked.key)
        if verdict is not None:
            return verdict
        since = prompt.waiting.get(asked.key)
        if since is None:
            prompt.waiting[asked.key] = time.monotonic()
            prompt.unsent.append(asked)
            self._asked[prompt.req_id] = prompt
        elif time.monotonic() - since > self._wait_s:
            self._give_up(prompt)
            return False
        return None

    def flush(self) -> None:
        """Send the questions of this scheduler step."""
        for prompt in self._asked.values():
            self._asking.put((prompt, prompt.unsent))
            prompt.unsent = []
        self._asked.clear()
        self._take_answers()

    def lose(self, prompt: Prompt, keys: Sequence[bytes]) -> None:
        """Mark keys as missing that a lookup had found: otherwise vLLM would ask for them again for ever."""
        for key in keys:
            prompt.verdicts[key] = False

    def close(self) -> None:
        self._asking.put(None)
        self._thread.join()

    def _give_up(self, prompt: Prompt) -> None:
        """Give up all open questions of the request, because one slow answer has used up its time."""
        self._on_late(len(prompt.waiting))
        for key in prompt.waiting:
            prompt.verdicts.setdefault(key, False)
        prompt.waiting.clear()

    def _take_answers(self) -> None:
        while self._answers:
            prompt, asked, found = self._answers.popleft()
            for each in asked:
                if prompt.waiting.pop(each.key, None) is not None:
                    prompt.verdicts[each.key] = each.key in found

    def _work(self) -> None:
        while (work := self._asking.get()) is not None:
            prompt, asked = work
            found: set[bytes] = set()
            try:
                found = self._find(prompt, asked)
            except Exception:
                # A bug in our code must not leave requests waiting, or end all later lookups.
                log.exception("a look-up in the store failed; its keys count as not stored")
            self._answers.append((prompt, asked, found))
