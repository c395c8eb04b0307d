"""A small stand-in for another engine's worker: an OpenAI API, a prefix cache of blocks, and vLLM's KV events.

Its tokens are bytes, its block hashes are SHA-256 chains, and its events are plain maps. It uses none of our code.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import socket
from collections import OrderedDict
from dataclasses import dataclass, field

import msgspec
import uvicorn
import zmq
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from tests.waiting import until

BLOCK = 16
MODEL = "other-model"
TEMPLATE = {"system": "S", "user": "U", "assistant": "A", "tool": "T"}


class Publisher:
    """Publishes like vLLM: numbered messages, of which the last ones can be replayed. Tests can lose events."""

    def __init__(self, events="tcp://127.0.0.1:0", replay="tcp://127.0.0.1:0"):
        self.context = zmq.Context()
        self.pub = self.context.socket(zmq.PUB)
        self.pub.bind(events)
        self.router = self.context.socket(zmq.ROUTER)
        self.router.bind(replay)
        self.events = self.pub.getsockopt_string(zmq.LAST_ENDPOINT)
        self.replay = self.router.getsockopt_string(zmq.LAST_ENDPOINT)
        self.number = 0
        self.kept = []
        self.loses = False
        self.answers = True
        self.num_asked = 0

    def tell(self, events):
        payload = msgspec.msgpack.encode([0.0, events, 0])
        number = self.number.to_bytes(8, "big")
        self.kept.append((number, payload))
        self.number += 1
        if not self.loses:
            self.pub.send_multipart([b"kv@test", number, payload])

    async def answer(self):
        while True:
            await asyncio.sleep(0.01)
            while self.router.poll(0):
                client, empty, first = self.router.recv_multipart()
                self.num_asked += 1
                if not self.answers:
                    continue
                for number, payload in self.kept:
                    if number >= first:
                        self.router.send_multipart([client, empty, b"kv@test", number, payload])
                self.router.send_multipart([client, empty, b"", (-1).to_bytes(8, "big", signed=True), b""])

    def close(self):
        for each in (self.pub, self.router):
            each.close(0)
        self.context.term()


@dataclass
class Standin:
    """One worker.  capacity: blocks that its cache holds.  status: the HTTP status of its next answers.

    breaks_after: pieces of a stream after which the connection is cut.  tells_hits: whether it reports cached tokens.
    forgets_silently: drops its cache before the next answer, without an event.
    """

    capacity: int = 10_000
    name: str = MODEL
    status: int = 200
    breaks_after: int = -1
    fails_after: int = -1
    tells_hits: bool = True
    forgets_silently: bool = False
    has_tokenize: bool = True
    hold: asyncio.Event | None = None
    with_events: bool = True
    adapters: tuple = ()
    api_key: str = ""
    cache: OrderedDict = field(default_factory=OrderedDict)
    requests: list = field(default_factory=list)
    usages: list = field(default_factory=list)
    num_tokenized: int = 0
    num_cancelled: int = 0
    port: int = 0
    publisher: Publisher | None = None
    is_stopped: bool = True
    places: tuple = ()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    @property
    def address(self):
        return f"127.0.0.1:{self.port}"

    async def start(self):
        if self.with_events and self.publisher is None:
            self.publisher = Publisher(*self.places)
            self.places = self.publisher.events, self.publisher.replay
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        self.port = listener.getsockname()[1]
        routes = [
            Route("/health", self._health),
            Route("/v1/models", self._models),
            Route("/tokenize", self._tokenize, methods=["POST"]),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._chat, methods=["POST"]),
        ]
        config = uvicorn.Config(Starlette(routes=routes), log_config=None, lifespan="off", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._server.capture_signals = contextlib.nullcontext
        self._tasks = [asyncio.create_task(self._server.serve(sockets=[listener]))]
        if self.publisher is not None:
            self._tasks.append(asyncio.create_task(self.publisher.answer()))
        await until(lambda: self._server.started)
        self.is_stopped = False
        return self

    async def stop(self, *, keep_publisher=False):
        if self.is_stopped:
            return
        self.is_stopped = True
        self._server.should_exit = self._server.force_exit = True
        await self._tasks[0]
        for task in self._tasks[1:]:
            task.cancel()
        if self.publisher is not None and not keep_publisher:
            self.publisher.close()
            self.publisher = None

    async def restart(self):
        """A new process at the same addresses, with an empty cache and numbers from 0 on."""
        await self.stop()
        self.cache.clear()
        await self.start()

    def hashes(self, tokens, salt=""):
        found, parent = [], hashlib.sha256(salt.encode()).digest()
        for first in range(0, len(tokens) - len(tokens) % BLOCK, BLOCK):
            parent = hashlib.sha256(parent + repr(tokens[first : first + BLOCK]).encode()).digest()
            found.append(parent)
        return found

    def use(self, tokens, salt="", lora=None):
        """Put a prompt into the cache and send the events. Returns the number of its tokens that were cached before."""
        names = self.hashes(tokens, salt + (lora or ""))
        if self.forgets_silently:
            self.cache.clear()
        hit = 0
        while hit < min(len(names), (len(tokens) - 1) // BLOCK) and names[hit] in self.cache:
            hit += 1
        new = [index for index, name in enumerate(names) if name not in self.cache]
        for name in reversed(names):
            self.cache[name] = self.cache.pop(name, None)
        gone = [self.cache.popitem(last=False)[0] for _ in range(len(self.cache) - self.capacity)]
        if self.publisher is not None:
            events = []
            if new:
                first = new[0]
                keys = [lora] if lora else []
                extra = [[*keys, *([salt] if salt and not at else [])] or None for at in range(first, len(names))]
                events.append(
                    {
                        "type": "BlockStored",
                        "block_hashes": names[first:],
                        "parent_block_hash": names[first - 1] if first else None,
                        "token_ids": tokens[first * BLOCK : len(names) * BLOCK],
                        "block_size": BLOCK,
                        "lora_id": None,
                        "medium": "GPU",
                        "lora_name": lora,
                        **({"extra_keys": extra} if any(extra) else {}),
                        "group_idx": 0,
                    }
                )
            if gone:
                events.append({"type": "BlockRemoved", "block_hashes": gone, "medium": "GPU", "group_idx": 0})
            if events:
                self.publisher.tell(events)
        return hit * BLOCK

    async def _health(self, request):
        return JSONResponse({}, self.status if self.status == 500 else 200)

    async def _models(self, request):
        if self.api_key and request.headers.get("authorization") != f"Bearer {self.api_key}":
            return JSONResponse({"error": "no"}, 401)
        models = [{"id": self.name, "max_model_len": 100_000, "parent": None}]
        models += [{"id": name, "parent": self.name} for name in self.adapters]
        return JSONResponse({"object": "list", "data": models})

    def tokens_of(self, body):
        if "messages" in body:
            tools = json.dumps(body["tools"]) if body.get("tools") else ""
            parts = [TEMPLATE[each["role"]] + (each.get("content") or "") for each in body["messages"]]
            return list((tools + "".join(parts) + "A").encode())
        prompt = body["prompt"]
        return prompt if isinstance(prompt, list) else list(prompt.encode())

    async def _tokenize(self, request):
        if not self.has_tokenize:
            return JSONResponse({"detail": "Not Found"}, 404)
        self.num_tokenized += 1
        tokens = self.tokens_of(await request.json())
        return JSONResponse({"tokens": tokens, "count": len(tokens)})

    async def _chat(self, request):
        body = await request.json()
        self.requests.append((dict(request.headers), body))
        if self.status != 200:
            return JSONResponse({"error": {"message": f"status {self.status}", "type": "of_the_worker"}}, self.status)
        if self.hold is not None:
            await self.hold.wait()
        tokens = self.tokens_of(body)
        lora = body["model"] if body["model"] in self.adapters else None
        cached = self.use(tokens, body.get("cache_salt") or "", lora)
        words = [f"w{number} " for number in range(min(body.get("max_completion_tokens") or body["max_tokens"], 4))]
        usage = {
            "prompt_tokens": len(tokens),
            "completion_tokens": len(words),
            "total_tokens": len(tokens) + len(words),
        }
        details = {"prompt_tokens_details": {"cached_tokens": cached}} if self.tells_hits else {}
        is_chat = request.url.path.endswith("chat/completions")
        if body.get("stream"):
            return StreamingResponse(self._events(body, words, usage, details, is_chat), media_type="text/event-stream")
        self.usages.append({**usage, **details})
        text = "".join(words)
        choice = {"message": {"role": "assistant", "content": text}} if is_chat else {"text": text}
        if body.get("tools"):
            call = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
            choice = {"message": {"role": "assistant", "content": None, "tool_calls": [call]}}
        return JSONResponse(
            {
                "id": "of-the-worker",
                "model": self.name,
                "choices": [{"index": 0, **choice, "finish_reason": "stop"}],
                "usage": {**usage, **details},
                "kv_transfer_params": None,
            }
        )

    async def _events(self, body, words, usage, details, is_chat):
        def event(choices, **more):
            return f"data: {json.dumps({'id': 'of-the-worker', 'choices': choices, **more})}\n\n"

        running = (body.get("stream_options") or {}).get("continuous_usage_stats")
        try:
            for number, word in enumerate(words):
                if number == self.breaks_after:
                    raise RuntimeError("cut")
                if number == self.fails_after:
                    yield 'data: {"error": {"message": "out of memory", "code": 500}}\n\n'
                    yield "data: [DONE]\n\n"
                    return
                piece = {"delta": {"content": word}} if is_chat else {"text": word}
                more = {"usage": {**usage, "completion_tokens": number + 1}} if running else {}
                yield event([{"index": 0, **piece, "finish_reason": None}], **more)
                await asyncio.sleep(0.002)
            last = {"delta": {}} if is_chat else {"text": ""}
            yield event([{"index": 0, **last, "finish_reason": "stop"}], **({"usage": usage} if running else {}))
            if (body.get("stream_options") or {}).get("include_usage"):
                self.usages.append({**usage, **details})
                yield event([], usage={**usage, **details})
            yield "data: [DONE]\n\n"
        except (asyncio.CancelledError, GeneratorExit):
            self.num_cancelled += 1
            raise
