"""Conversations continue while roles are replaced. Each answer is compared with the earlier answer to the same turn."""

from __future__ import annotations

import http.client
import json
import ssl
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from tests.upgrade.versions import open_door, status_of

NUM_CONVERSATIONS = 2
NUM_TURNS = 2
MAX_TOKENS = 8
READY_S = 120.0


class NotNow(Exception):
    """A router cannot serve the request now, and a retry may succeed."""


@dataclass(slots=True)
class Talk:
    """Threads that hold conversations until told to stop.

    doors: routers, used as by a load balancer, which sends nothing to one that is not ready or refuses connections.
    A router must answer each accepted request. While `doors_break`, a request may be repeated with its id at any
    router. cached: the hit tokens of the last time that a turn was asked.
    """

    doors: list[str]
    tls: ssl.SSLContext | None = None
    api_key: str = ""
    doors_break: bool = False
    cached: dict[tuple[int, int], int] = field(default_factory=dict)
    num_again: int = 0
    expected: dict[tuple[int, int], str] = field(default_factory=dict)
    sent: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    rounds: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self) -> None:
        self._threads = [threading.Thread(target=self._run, args=(n,)) for n in range(NUM_CONVERSATIONS)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(300)
            assert not thread.is_alive(), "a conversation is stuck"

    def once(self) -> None:
        """One round of each conversation, in turn."""
        for number in range(NUM_CONVERSATIONS):
            self._round(number)

    def _run(self, number: int) -> None:
        while not self._stop.is_set():
            try:
                self._round(number)
            except Exception as err:
                self.failed.append(f"conversation {number}: {err!r}")
                return
            with self._lock:
                self.rounds += 1

    def _round(self, number: int) -> None:
        text = f"def conversation_{number}():\n    " + "value = first(second, third)\n    " * (20 + 10 * number)
        for turn in range(NUM_TURNS):
            request_id = self._name(number)
            answer, self.cached[number, turn] = self._answer(text, request_id)
            if answer != self.expected.setdefault((number, turn), answer):
                self.wrong.append(f"conversation {number}, turn {turn}: {answer!r}")
            text += answer + f"\n    next_{turn} = "

    def _name(self, number: int) -> str:
        with self._lock:
            request_id = f"talk-{number}-{len(self.sent)}"
            self.sent.append(request_id)
        return request_id

    def _answer(self, prompt: str, request_id: str) -> tuple[str, int]:
        while True:
            try:
                return self._ask(prompt, request_id)
            except (OSError, http.client.HTTPException, NotNow):
                if not self.doors_break:
                    raise
                self.num_again += 1
                time.sleep(0.2)

    def _ask(self, prompt: str, request_id: str) -> tuple[str, int]:
        """Send the prompt. Returns the answer and the number of hit tokens."""
        connection = self._connect()
        try:
            body = {"model": "antefix-tiny", "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0}
            headers = {"content-type": "application/json", "idempotency-key": request_id}
            if self.api_key:
                headers["authorization"] = f"Bearer {self.api_key}"
            connection.request("POST", "/v1/completions", json.dumps(body), headers)
            reply = connection.getresponse()
            data: Any = json.loads(reply.read())
            if reply.status == 503:
                raise NotNow(f"503: {data}")
            assert reply.status == 200, f"{reply.status}: {data}"
            details = data["usage"].get("prompt_tokens_details") or {}
            return str(data["choices"][0]["text"]), int(details.get("cached_tokens") or 0)
        finally:
            connection.close()

    def _connect(self) -> http.client.HTTPConnection:
        """Connect to a router that reports ready. If it stops listening before that, nothing was sent to it."""
        end = time.monotonic() + READY_S
        while time.monotonic() < end:
            for door in list(self.doors):
                if status_of(door, "/readyz", tls=self.tls) != 200:
                    continue
                connection = open_door(door, tls=self.tls, timeout_s=180)
                try:
                    connection.connect()
                    return connection
                except OSError:
                    continue
            time.sleep(0.05)
        raise AssertionError(f"no door was ready for {READY_S:g} s")
