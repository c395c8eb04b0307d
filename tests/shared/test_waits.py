"""Tests wait with `until` and for as long as it does. A shorter limit fails by chance on a busy machine.

The check reads all test files but those that have a run of their own, or whose clock is simulated.
"""

import ast
import re
from pathlib import Path

import pytest

from tests import waiting
from tests.patient_services import sitecustomize
from tests.waiting import AT_MOST_S, until, wait_until

TESTS = Path(__file__).parents[1]
OTHER_RUNS = {"bounds", "deploy", "environments", "foreign_engines", "fuzz", "hosts", "page", "upgrade"}
OTHER_FILES = {"waiting.py", "objects/s3_server.py", "objects/test_azure.py", "histories/world.py"}
# A shorter limit is meant: it is a setting under test, or it fires.
SHORT_S = 5
MEANT = {
    # A request whose router was killed is repeated.
    "billing/test_bill_under_failure.py": {20},
    # The listener at the port may be another program, which says nothing.
    "redis_servers.py": {5},
}
LIMITS = {"timeout", "timeout_s", "within_s", "deadline_s"}
CALLS = {"timeout", "wait_for", "wait", "join", "result", "communicate", "heard", "until"}
CLIENTS = {(module, name) for module in ("httpx", "httpx2") for name in ("AsyncClient", "Client")}
# To parse all files takes two seconds, so those without such a text are left out.
MAY_WAIT = re.compile(
    r"sleep\((?!0\))|timeout|within_s|deadline_s|Client\(|(wait|wait_for|join|result|communicate|heard|until)\([^)]*\d"
)


def name_of(call):
    """Of `httpx2.AsyncClient(...)` it is ("httpx2", "AsyncClient"), of `until(...)` ("", "until")."""
    if isinstance(call.func, ast.Attribute):
        return getattr(call.func.value, "id", getattr(call.func.value, "attr", "")), call.func.attr
    return "", getattr(call.func, "id", "")


def sleeps(node):
    """Whether a statement pauses for more than a turn of the event loop."""
    calls = (each for each in ast.walk(node) if isinstance(each, ast.Call) and name_of(each)[1] == "sleep")
    return any(not each.args or getattr(each.args[0], "value", 1) != 0 for each in calls)


def is_own_loop(node):
    """Whether this is a loop that does what `until` does: look, pause, and look again."""
    if isinstance(node, ast.While) and not isinstance(node.test, ast.Constant):
        return all(map(sleeps, node.body))
    counts = isinstance(node, ast.For) and isinstance(node.target, ast.Name) and node.target.id == "_"
    return counts and sleeps(node) and any(isinstance(each, ast.Break | ast.Return) for each in ast.walk(node))


def limits_in(node):
    """What a call, or a function's parameters, give as time limits."""
    if isinstance(node, ast.Call):
        owner, name = name_of(node)
        values = [each.value for each in node.keywords if each.arg in LIMITS]
        return values + (node.args[-1:] if name in CALLS and owner != "mark" else [])
    if isinstance(node, ast.arguments):
        named = zip(node.args[len(node.args) - len(node.defaults) :], node.defaults, strict=True)
        named = [*named, *zip(node.kwonlyargs, node.kw_defaults, strict=True)]
        return [value for arg, value in named if arg.arg in LIMITS]
    return []


def impatient_waits(source, meant=()):
    """Lines of a test file that wait in their own way, or for less time than `until`."""
    lines = set()
    for node in ast.walk(ast.parse(source)):
        if is_own_loop(node):
            lines.add(node.lineno)
        # httpx waits 5 s without a setting.
        is_client = isinstance(node, ast.Call) and name_of(node) in CLIENTS
        if is_client and not {each.arg for each in node.keywords} & {"timeout", "transport"}:
            lines.add(node.lineno)
        for each in limits_in(node):
            value = getattr(each, "value", None)
            if isinstance(value, int | float) and SHORT_S <= value < AT_MOST_S and value not in meant:
                lines.add(each.lineno)
    return sorted(lines)


def test_the_bound_is_above_those_of_services_and_below_that_of_a_test(pytestconfig):
    assert 2 * sitecustomize.PATIENCE_S < AT_MOST_S < float(pytestconfig.getini("timeout")) / 2


def test_every_test_waits_as_until_does():
    found = []
    for path in sorted(TESTS.rglob("*.py")):
        name = path.relative_to(TESTS).as_posix()
        if name.partition("/")[0] in OTHER_RUNS or name in OTHER_FILES:
            continue
        source = path.read_text()
        if MAY_WAIT.search(source):
            found += [f"tests/{name}:{line}" for line in impatient_waits(source, MEANT.get(name, ()))]
    assert not found, "wait with tests.waiting.until, or for AT_MOST_S: " + ", ".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "while not door.requests:\n    await asyncio.sleep(0.01)",
        "while time.monotonic() < ends and not done():\n    time.sleep(1)",
        "for _ in range(600):\n    if done():\n        break\n    await asyncio.sleep(0.1)",
        "asyncio.timeout(60)",
        "asyncio.wait_for(drained, 60)",
        "thread.join(30)",
        "subprocess.run(command, timeout=100)",
        "def heard(condition, timeout_s=60.0): pass",
        "httpx2.AsyncClient(base_url=url)",
    ],
)
def test_other_waits_are_found(source):
    assert MAY_WAIT.search(source) and impatient_waits(source) == [1]


@pytest.mark.parametrize(
    "source",
    [
        "while True:\n    await asyncio.sleep(0.01)\n    renew()",
        "for _ in range(20):\n    await asyncio.sleep(0)",
        "asyncio.timeout(AT_MOST_S)",
        "door(http_body_timeout_s=0.3)",
        "pytest.mark.timeout(60)",
        "httpx2.AsyncClient(transport=app)",
    ],
)
def test_other_code_is_left_alone(source):
    assert not impatient_waits(source)


async def test_until_returns_what_it_waited_for_and_says_what_did_not_come(monkeypatch):
    values = iter([0, Unready(), 7])

    def look():
        value = next(values)
        if isinstance(value, Unready):
            raise value
        return value

    async def later():
        return look()

    assert await until(later, despite=Unready) == 7
    values = iter([0, Unready(), 8])
    assert wait_until(look, despite=Unready) == 8
    monkeypatch.setattr(waiting, "AT_MOST_S", 0.01)
    with pytest.raises(AssertionError, match=r"for: a worker; the last value: \[\]"):
        await until(list, "a worker")
    with pytest.raises(AssertionError, match=r"wait_until\(lambda: \"\"\); the last value: ''"):
        wait_until(lambda: "")
    with pytest.raises(TimeoutError, match="its own"):
        await until(broken)


class Unready(Exception):
    """What a condition waits for is not there yet."""


def broken():
    raise TimeoutError("its own")
