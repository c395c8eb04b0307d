"""Background loops continue after an unexpected exception, and the log says so."""

import ast
import asyncio
import logging
import re
from pathlib import Path

import pytest

import antefix
from antefix.end_tasks import end_tasks
from antefix.events.numbered_log import Batch, Cursor
from antefix.keep_running import keep_running
from antefix.security import idle_connections
from antefix.security.caller_limits import CallerLimits
from antefix.telemetry import Registry
from antefix_router.placement.directory import Directory
from antefix_router.placement.memory_feed import MemoryFollower

ROOT = Path(antefix.__file__).parent.parent
STARTS = re.compile(r"create_task|ensure_future")
PRODUCT = ("antefix", "billing", "console", "decode", "engines", "kvstore", "prefill", "router", "simulate")


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr("antefix.keep_running.AGAIN_S", 0.0)


async def test_work_begins_again_after_an_unexpected_error_and_the_log_says_why(caplog):
    begun, errors, waits = [], [], asyncio.Event()

    async def work():
        begun.append(len(begun))
        if len(begun) < 3:
            raise ValueError("nobody expected this")
        waits.set()
        await asyncio.Event().wait()

    task = keep_running(work, "the test's work", failed=errors.append)
    async with asyncio.timeout(300):
        await waits.wait()
        await end_tasks([task])
    assert begun == [0, 1, 2] and task.cancelled()
    assert [str(err) for err in errors] == ["nobody expected this"] * 2
    assert [record.levelno for record in caplog.records] == [logging.ERROR] * 2
    assert "the test's work" in caplog.text and "ValueError: nobody expected this" in caplog.text


async def test_errors_that_repeat_take_a_line_per_doubling_and_are_counted(caplog):
    """The first error of each kind has a traceback; all are counted by the kind of work, whatever peer it is about."""
    errors = iter([ValueError(f"number {number}") for number in range(1, 40)] + [KeyError("another kind")])

    async def work():
        for err in errors:
            raise err

    async with asyncio.timeout(300):
        await keep_running(work, "a work that fails", of="10.0.0.7:4000")
    told = [(bool(record.exc_info), record.getMessage()) for record in caplog.records]
    assert [has_traceback for has_traceback, _ in told] == [True, *[False] * 5, True]
    assert all("a work that fails (10.0.0.7:4000) met" in text for _, text in told)
    assert told[-2][1].endswith("met ValueError 32 times, and begins again each time: number 32")
    assert 'antefix_background_failures_total{loop="a work that fails"} 40.0' in Registry("router").text()


async def test_work_that_returns_is_over():
    await keep_running(lambda: asyncio.sleep(0), "a short work")


async def test_a_follower_that_failed_knows_nothing_until_the_next_snapshot(monkeypatch):
    directory = Directory()
    follower = MemoryFollower(directory, "127.0.0.1:1")
    here = Cursor(epoch=b"one", number=1)
    assert follower.apply(Batch(cursor=here, snapshot=True, snapshot_begins=True, snapshot_ends=True))
    assert follower.in_step
    asked = []

    async def watch(cursor):
        asked.append(cursor)
        yield Batch(cursor=Cursor(epoch=b"one", number=2))

    def fail(_):
        raise AttributeError

    monkeypatch.setattr(follower, "apply", fail)
    for _ in range(2):
        with pytest.raises(AttributeError):
            await follower.run(watch)
    assert not follower.in_step and asked == [here, None]


async def test_connections_are_watched_again_after_a_time_without_descriptors(monkeypatch):
    """The descriptors of a process cannot be listed while it has none left, which is when the watch is needed."""
    answers, seen = [[], list(range(9))], asyncio.Event()
    monkeypatch.setattr(idle_connections, "LOOK_S", 0.0)
    monkeypatch.setattr(idle_connections, "_descriptors", lambda: answers.pop(0) if answers else [])
    monkeypatch.setattr(idle_connections, "accepted", lambda port: seen.set() or [])
    task = asyncio.create_task(idle_connections.watch_connections(1, CallerLimits(connections_max=3), print))
    async with asyncio.timeout(300):
        await seen.wait()
        await end_tasks([task])


def functions_of(tree):
    return {node.name: node for node in ast.walk(tree) if isinstance(node, ast.AsyncFunctionDef)}


def called(node):
    """The name of the function that a call or a partial calls."""
    function = node.func if isinstance(node, ast.Call) else node
    return getattr(function, "attr", getattr(function, "id", ""))


def runs_for_ever(name, functions, seen=frozenset()):
    """Whether a function, or one that it awaits, has a loop without end that an unexpected exception would end."""
    if name not in functions or name in seen:
        return False
    body = functions[name]
    catches = {called(node.type) for node in ast.walk(body) if isinstance(node, ast.ExceptHandler) and node.type}
    if "Exception" in catches:
        return False
    endless = [
        node for node in ast.walk(body)
        if isinstance(node, ast.While) and isinstance(node.test, ast.Constant)
        and not any(isinstance(each, ast.Return | ast.Break) for each in ast.walk(node))
    ]  # fmt: skip
    awaited = {
        called(node.value)
        for node in ast.walk(body)
        if isinstance(node, ast.Await) and isinstance(node.value, ast.Call)
    }
    return bool(endless) or any(runs_for_ever(each, functions, seen | {name}) for each in awaited)


def test_no_loop_without_end_is_started_without_somebody_who_keeps_it_running():
    texts = {path: path.read_text() for folder in PRODUCT for path in (ROOT / folder).rglob("*.py")}
    trees = {path: ast.parse(text) for path, text in texts.items() if STARTS.search(text) or "while True" in text}
    everywhere = {name: node for tree in trees.values() for name, node in functions_of(tree).items()}
    bare = []
    for path, tree in trees.items():
        if not STARTS.search(texts[path]):
            continue
        functions = {**everywhere, **functions_of(tree)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and called(node) in ("create_task", "ensure_future") and node.args:
                name = called(node.args[0])
                if runs_for_ever(name, functions):
                    bare.append(f"{path.relative_to(ROOT)}:{node.lineno} {name}")
    assert not bare, "start these with antefix.keep_running"
