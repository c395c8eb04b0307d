"""`antefix explain --fleet` against a running router, and its status."""

import json
from types import SimpleNamespace

import pytest

from antefix import rpc
from antefix.errors import InvalidRequest
from antefix.prompt_marks import block_size_of, marks_of
from antefix.v1 import fleet_pb2, fleet_pb2_grpc
from antefix_console.commands import explain_fleet
from antefix_console.explain.recorded_requests import record_lines
from antefix_router.fleet.fleet_server import FleetServicer
from antefix_router.fleet.fleet_view import FleetView
from tests.fleet.standin import MODEL, Standin

LONG = "The quick brown fox jumps over the lazy dog. " * 20


@pytest.fixture
async def asked(fleet, two, monkeypatch, capsys):
    """(fleet, ask(**arguments) -> what the command prints)."""
    door = await fleet(*two)
    servicer = FleetServicer(door.router)
    server = await rpc.start_server(
        "127.0.0.1:0",
        lambda server: fleet_pb2_grpc.add_FleetServiceServicer_to_server(servicer, server),
        [fleet_pb2.DESCRIPTOR],
    )
    none = dict.fromkeys(("prompt", "prompt_file", "tokens_file", "messages"))

    async def ask(**arguments):
        args = SimpleNamespace(
            **{**none, "fleet": server.address, "workers": False, "tenant": "", "json": False, **arguments}
        )
        status, explained = await explain_fleet._ask(args)
        return "\n".join(explain_fleet._workers(status) if explained is None else explain_fleet._lines(explained))

    yield door, ask
    await server.drain(0)


async def test_a_prompt_that_is_somewhere_is_explained(asked, tmp_path):
    door, ask = asked
    where = (await door.chat(LONG)).headers["antefix-worker"]
    await door.heard()
    messages = [{"role": "user", "content": LONG + "and more, which nobody has"}]
    (tmp_path / "body.json").write_text(json.dumps(messages))
    text = await ask(messages=str(tmp_path / "body.json"))
    assert f"896 of 928 prompt tokens would be hits (97%), at {where}." in text
    assert "begin at token 896: first_seen" in text
    (row,) = [line.split() for line in text.splitlines() if line.startswith(where)]
    assert row == [where, "serves", "from", "its", "events", "896", "896", "896", "0", "0", "0", "0"]


async def test_a_prompt_that_nobody_has_is_explained(asked):
    _, ask = asked
    text = await ask(prompt=LONG)
    assert "0 of 900 prompt tokens would be hits" in text
    assert "first_seen" in text
    assert "What to do" in text


async def test_explaining_changes_nothing(asked):
    door, ask = asked
    for _ in range(3):
        await ask(prompt=LONG)
    assert not any(worker.requests for worker in door.workers)
    assert not door.records


async def test_workers_are_told_with_what_they_hold_and_lost(asked):
    door, ask = asked
    where = (await door.chat(LONG)).headers["antefix-worker"]
    await door.heard()
    worker = next(each for each in door.workers if each.address == where)
    worker.forgets_silently = True
    await door.chat(LONG)
    await door.heard()
    text = await ask(workers=True)
    (row,) = [line.split() for line in text.splitlines() if line.startswith(where)]
    assert row[1:5] == ["serves", "from", "its", "events"]
    assert row[-3:] == ["896", "0", "896"]


async def test_a_worker_that_is_down_is_shown_as_such(asked):
    door, ask = asked
    await door.workers[0].stop()
    await door.heard_down(door.workers[0])
    text = await ask(workers=True)
    assert "is down" in text


async def test_what_the_door_would_refuse_is_said(asked, tmp_path):
    _, ask = asked
    for body in ("not JSON", json.dumps({"messages": [], "max_tokens": 0})):
        (tmp_path / "body.json").write_text(body)
        with pytest.raises(InvalidRequest):
            await ask(messages=str(tmp_path / "body.json"))
    with pytest.raises(InvalidRequest, match="explains"):
        await ask()


async def test_a_prompt_that_no_worker_can_tokenize_is_placed_by_load(fleet):
    door = await fleet(Standin(has_tokenize=False))
    servicer = FleetServicer(door.router)
    request = fleet_pb2.ExplainRequestRequest(body=json.dumps({"model": MODEL, "prompt": "x"}))
    answer = await servicer.ExplainRequest(request, None)
    assert (answer.prompt_tokens, answer.chosen, answer.miss_reason) == (0, door.workers[0].address, "unknown")


async def test_the_page_shows_the_fleets_workers_and_what_was_lost(fleet, two):
    door = await fleet(*two)
    where = (await door.chat(LONG)).headers["antefix-worker"]
    await door.heard()
    worker = next(each for each in two if each.address == where)
    worker.forgets_silently = True
    await door.chat(LONG)
    shown = await FleetView(door.router, door.router.front.accounts.activity).data(3600)
    assert json.loads(json.dumps(shown)) == shown
    (row,) = [each for each in shown["workers"] if each["address"] == where]
    assert (row["role"], row["serving"], row["memory_known"]) == ("foreign", True, True)
    assert "expected 896, lost 896" in row["setup"]
    newest = shown["requests"][0]
    assert newest["miss_reason"] == "lost_hit"
    assert "reported; 896 were expected" in " ".join(newest["explained"])
    assert shown["forest"][0]["prompts"] == 2


async def test_a_record_of_a_fleet_is_explained_in_its_own_words(asked):
    door, _ = asked
    await door.chat(LONG)
    await door.heard()
    await door.chat(LONG + "and so on")
    record = door.records[-1]
    text = "\n".join(record_lines(record, 64))
    assert f"hits (98%), reported by {record.worker}." in text
    assert "The router expected 896 there" in text
    assert block_size_of(record.prompt_marks, record.prompt_tokens) == 16


@pytest.mark.parametrize("size", [1, 16, 32, 100, 128])
@pytest.mark.parametrize("num_tokens", [1, 127, 500, 603, 4096, 100_001])
def test_a_blocks_size_can_be_told_from_marks(size, num_tokens):
    marks = marks_of([bytes(32)] * (num_tokens // size))
    found = block_size_of(marks, num_tokens)
    assert num_tokens // found == num_tokens // size if num_tokens >= size else found == 0
