"""Questions to the store that do not wait: vLLM's scheduler asks for each key, and asks again until there is an answer.

What is asked in one step of the scheduler goes to a thread in one batch per request at the step's end. An answer that
takes longer than `wait_s` is a miss: the request is computed rather than held up.
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
    """All methods are called by vLLM's thread; `find` runs in one of ours."""

    def __init__(self, find: Find, *, wait_s: float, on_late: Callable[[int], None]) -> None:
        """on_late: told how many keys were given up on."""
        self._find: Final = find
        self._wait_s: Final = wait_s
        self._on_late: Final = on_late
        self._asking: Final[queue.SimpleQueue[tuple[Prompt, list[Asked]] | None]] = queue.SimpleQueue()
        self._answers: Final[deque[tuple[Prompt, list[Asked], set[bytes]]]] = deque()
        self._asked: dict[str, Prompt] = {}
        self._thread: Final = threading.Thread(target=self._work, name="antefix-vllm-lookup", daemon=True)
        self._thread.start()

    def ask(self, prompt: Prompt, asked: Asked) -> bool | None:
        """Whether a load would get the key; None: ask again in the next step."""
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
        """Send what was asked in this step."""
        for prompt in self._asked.values():
            self._asking.put((prompt, prompt.unsent))
            prompt.unsent = []
        self._asked.clear()
        self._take_answers()

    def lose(self, prompt: Prompt, keys: Sequence[bytes]) -> None:
        """What had been found is not there: without this, vLLM would ask for it again for ever."""
        for key in keys:
            prompt.verdicts[key] = False

    def close(self) -> None:
        self._asking.put(None)
        self._thread.join()

    def _give_up(self, prompt: Prompt) -> None:
        """On everything that is still under way: one slow answer has used up the request's time."""
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
                # A bug of ours in here must not leave requests waiting, or end lookups for good.
                log.exception("a lookup failed; its keys count as missing")
            self._answers.append((prompt, asked, found))
