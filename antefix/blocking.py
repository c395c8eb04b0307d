"""Blocking forms of the clients and of any `Store`, for scripts, notebooks and threads: the same calls without `await`.

    with BlockingRouterClient("127.0.0.1:7000") as router:
        for message in router.generate("Once", Sampling(max_tokens=20)):
            print(message.text, end="")

Each client runs its own event loop in its own thread. So a blocking client also works inside a running event loop, but
it blocks that loop until the call returns. Several threads may use one client. `close`, or leaving `with`, ends the
thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from types import TracebackType
from typing import Any, Concatenate, Final, Generic, ParamSpec, Protocol, Self, TypeVar, cast

from antefix.clients import DecodeClient, PrefillClient, RouterClient, WindowClient
from antefix.end_tasks import end_tasks
from antefix.errors import InvalidRequest
from antefix.security.credentials import Credentials
from antefix.store.api import Store


class _Closable(Protocol):
    async def close(self) -> None: ...


# How long a cancelled call may take to end its streams.
_CLEANUP_S: Final = 5.0

P = ParamSpec("P")
T = TypeVar("T")
C = TypeVar("C", bound=_Closable)


class LoopThread:
    """An event loop that runs in a daemon thread until `close`."""

    def __init__(self) -> None:
        self._loop: Final = asyncio.new_event_loop()
        self._thread: Final = threading.Thread(target=self._loop.run_forever, name="antefix-blocking", daemon=True)
        self._thread.start()

    @property
    def is_open(self) -> bool:
        return not self._loop.is_closed()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` on the loop and return its result or raise its error. Interrupting the calling thread cancels the
        work that runs for it.
        """
        if not self.is_open:
            work.close()
            raise InvalidRequest("this client is closed and cannot make calls any more: open another client")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Cancel all running work, and end the thread. Closing again does nothing."""
        if not self.is_open:
            return
        self.run(_cancel_the_rest())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _cancel_the_rest() -> None:
    await end_tasks(asyncio.all_tasks() - {asyncio.current_task()}, again_s=_CLEANUP_S)
    await asyncio.get_running_loop().shutdown_asyncgens()


class Blocking(Generic[C]):
    """A client, and the event loop that runs its calls."""

    def __init__(self, client: C) -> None:
        self._client: Final[C] = client
        self._thread: Final = LoopThread()
        self._closing: Final = threading.Lock()
        self._is_closed = False

    def close(self) -> None:
        """Close the client and end the thread. Closing again does nothing."""
        with self._closing:
            if self._is_closed:
                return
            self._is_closed = True
        try:
            self._thread.run(self._client.close())
        finally:
            self._thread.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _waiting(method: Callable[Concatenate[Any, P], Coroutine[Any, Any, T]]) -> Callable[Concatenate[Any, P], T]:
    """A method that calls the client's method of the same name and waits for its result."""

    @functools.wraps(method)
    def call(self: Blocking[Any], *args: P.args, **kwargs: P.kwargs) -> T:
        work: Coroutine[Any, Any, T] = getattr(self._client, method.__name__)(*args, **kwargs)
        return self._thread.run(work)

    return cast("Callable[Concatenate[Any, P], T]", call)


def _stream(
    method: Callable[Concatenate[Any, P], AsyncGenerator[T, None]],
) -> Callable[Concatenate[Any, P], Iterator[T]]:
    """A method that iterates over the client's stream of the same name. Closing the iterator ends the call."""

    @functools.wraps(method)
    def call(self: Blocking[Any], *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        items: AsyncGenerator[T, None] = getattr(self._client, method.__name__)(*args, **kwargs)
        try:
            with contextlib.suppress(StopAsyncIteration):
                while True:
                    yield self._thread.run(_next(items))
        finally:
            # Closing the client has already ended its streams.
            if self._thread.is_open:
                self._thread.run(items.aclose())

    shown = inspect.signature(method)
    items_of = str(shown.return_annotation).removeprefix("AsyncGenerator[").removesuffix(", None]")
    call.__signature__ = shown.replace(return_annotation=f"Iterator[{items_of}]")  # type: ignore[attr-defined]
    return cast("Callable[Concatenate[Any, P], Iterator[T]]", call)


async def _next(items: AsyncGenerator[T, None]) -> T:
    return await anext(items)


class BlockingRouterClient(Blocking[RouterClient]):
    """`RouterClient` without `await`; the messages of an answer come from a plain iterator."""

    def __init__(self, address: str, *, credentials: Credentials | None = None) -> None:
        super().__init__(RouterClient(address, credentials=credentials))

    generate = _stream(RouterClient.generate)
    status = _waiting(RouterClient.status)


class BlockingPrefillClient(Blocking[PrefillClient]):
    """`PrefillClient` without `await`."""

    def __init__(self, address: str, *, credentials: Credentials | None = None) -> None:
        super().__init__(PrefillClient(address, credentials=credentials))

    prefill = _waiting(PrefillClient.prefill)
    status = _waiting(PrefillClient.status)


class BlockingDecodeClient(Blocking[DecodeClient]):
    """`DecodeClient` without `await`; the messages of an output come from a plain iterator."""

    def __init__(self, address: str, *, credentials: Credentials | None = None) -> None:
        super().__init__(DecodeClient(address, credentials=credentials))

    decode = _stream(DecodeClient.decode)
    status = _waiting(DecodeClient.status)


class BlockingWindowClient(Blocking[WindowClient]):
    """`WindowClient` without `await`."""

    def __init__(self, address: str, *, credentials: Credentials | None = None) -> None:
        super().__init__(WindowClient(address, credentials=credentials))

    status = _waiting(WindowClient.status)
    set_strategy = _waiting(WindowClient.set_strategy)


class BlockingStore(Blocking[Store]):
    """Any `Store` without `await`: A store without `await`: `open_store(...)` opens that of a service,
    `antefix_kvstore.open(...)` one in this process.

    The BlockingStore owns the store from then on, and closes it.
    """

    lookup = _waiting(Store.lookup)
    held = _waiting(Store.held)
    fate = _waiting(Store.fate)
    get_blocks = _waiting(Store.get_blocks)
    get = _waiting(Store.get)
    put = _waiting(Store.put)
    reject = _waiting(Store.reject)
    register = _waiting(Store.register)
    pin = _waiting(Store.pin)
    evict = _waiting(Store.evict)
    watch = _stream(Store.watch)
    stats = _waiting(Store.stats)
