"""Following a worker's events over real sockets: missed events are replayed, or the worker's blocks are forgotten."""

import pytest

from tests.fleet.standin import Standin

LONG = "Some text that is longer than a few blocks of sixteen. " * 4


@pytest.fixture
async def followed(fleet):
    """(fleet, worker, subscriber, leading) of a fleet of one worker. leading(text): the directory's leading blocks."""
    worker = Standin()
    door = await fleet(worker)
    engine = door.engine(worker)

    def leading(text):
        tokens = list(text.encode())
        prompt = door.router.placing._names.prompt(tokens, "", 16)
        return int(door.router.directory.leading([worker.address], prompt.keys)[0]) * 16

    return door, worker, engine.subscriber, leading


def say(worker, text):
    return worker.use(list(text.encode()))


async def test_what_a_worker_stores_is_known(followed):
    door, worker, following, leading = followed
    say(worker, LONG)
    await door.heard(lambda: leading(LONG) == len(LONG) - len(LONG) % 16)
    assert following.counters.num_gaps == following.counters.num_forgotten == 0


async def test_a_lost_message_is_asked_for_again(followed):
    door, worker, following, leading = followed
    say(worker, LONG)
    await door.heard()
    worker.publisher.loses = True
    say(worker, "another " + LONG)
    worker.publisher.loses = False
    say(worker, "a third " + LONG)
    await door.heard(lambda: leading("a third " + LONG) > 100)
    assert leading("another " + LONG) > 100
    assert leading(LONG) > 100
    assert following.counters.num_gaps == 1
    assert following.counters.num_forgotten == 0


async def test_a_lost_last_message_is_noticed_in_the_quiet(followed):
    door, worker, following, leading = followed
    say(worker, LONG)
    await door.heard()
    worker.publisher.loses = True
    say(worker, "another " + LONG)
    await door.heard(lambda: leading("another " + LONG) > 100)
    assert following.counters.num_forgotten == 0


async def test_without_an_answer_to_a_gap_all_is_forgotten(followed, monkeypatch):
    monkeypatch.setattr("antefix.events.kv_subscriber._REPLY_TIMEOUT_S", 0.2)
    door, worker, following, leading = followed
    say(worker, LONG)
    await door.heard()
    worker.publisher.answers = False
    worker.publisher.loses = True
    worker.use(list(b"x" * 64))
    worker.publisher.loses = False
    say(worker, "another " + LONG)
    await door.heard(lambda: leading("another " + LONG) > 100)
    assert leading(LONG) == 0
    assert following.counters.num_forgotten >= 1


async def test_an_engine_that_ends_in_the_middle_of_a_replay_is_not_waited_for(followed, monkeypatch):
    monkeypatch.setattr("antefix.events.kv_subscriber._REPLY_TIMEOUT_S", 10_000.0)
    door, worker, following, _ = followed
    await door.heard()
    worker.publisher.answers = False
    asked = worker.publisher.num_asked
    await door.heard(lambda: worker.publisher.num_asked > asked)
    assert following.in_step
    await worker.stop()
    await door.heard_down(worker)


async def test_without_a_replay_address_a_gap_is_a_new_beginning(fleet):
    worker = Standin()
    await worker.start()
    door = await fleet(worker, replay=())
    following = door.engine(worker).subscriber
    say(worker, LONG)
    await door.heard()
    worker.publisher.loses = True
    worker.use(list(b"x" * 64))
    worker.publisher.loses = False
    say(worker, "another " + LONG)
    await door.heard()
    assert following.counters.num_gaps == 1
    assert following.counters.num_forgotten == 1


async def test_an_engine_that_begins_again_is_forgotten(followed):
    door, worker, following, leading = followed
    for text in (LONG, "another " + LONG, "a third " + LONG):
        say(worker, text)
    await door.heard(lambda: leading(LONG) > 100)
    await worker.restart()
    say(worker, "after it " + LONG)
    await door.heard(lambda: leading("after it " + LONG) > 100)
    assert leading(LONG) == leading("another " + LONG) == 0
    assert following.counters.num_lives == 1


async def test_an_engine_that_begins_again_and_has_said_as_much_is_noticed(followed):
    """The new engine's event numbers continue the old ones, although its blocks are different."""
    door, worker, _, leading = followed
    for text in (LONG, "another " + LONG):
        say(worker, text)
    await door.heard(lambda: leading(LONG) > 100)
    await worker.restart()
    for text in ("x " + LONG, "y " + LONG, "z " + LONG):
        say(worker, text)
    await door.heard(lambda: leading("z " + LONG) > 100)
    assert leading(LONG) == leading("another " + LONG) == 0
    assert leading("x " + LONG) > 100


async def test_a_router_that_comes_late_is_told_all(fleet):
    worker = Standin()
    await worker.start()
    for number in range(20):
        say(worker, f"{number} {LONG}")
    await worker.stop(keep_publisher=True)
    door = await fleet(worker)
    prompt = door.router.placing._names.prompt(list(f"0 {LONG}".encode()), "", 16)
    await door.heard(lambda: int(door.router.directory.leading([worker.address], prompt.keys)[0]) > 5)
    assert door.engine(worker).subscriber.counters.num_batches == 20


async def test_what_cannot_be_read_ends_what_is_known(followed):
    door, worker, following, leading = followed
    say(worker, LONG)
    await door.heard(lambda: leading(LONG) > 100)
    number = worker.publisher.number.to_bytes(8, "big")
    worker.publisher.kept.append((number, b"\xc1"))
    worker.publisher.number += 1
    worker.publisher.pub.send_multipart([b"", number, b"\xc1"])
    await door.heard(lambda: following.counters.num_unread == 1)
    assert leading(LONG) == 0
    say(worker, "another " + LONG)
    await door.heard(lambda: leading("another " + LONG) > 100)


async def test_invalid_frames_are_ignored(followed):
    door, worker, following, leading = followed
    for frames in ([b"one"], [b"t", b"short", b""], [b"t", bytes(8), b"", b"more"]):
        worker.publisher.pub.send_multipart(frames)
    say(worker, LONG)
    await door.heard(lambda: leading(LONG) > 100)
    assert following.counters.num_unread == 3


async def test_a_worker_that_dies_is_forgotten_with_what_it_held(followed):
    door, worker, _, leading = followed
    say(worker, LONG)
    await door.heard(lambda: leading(LONG) > 100)
    await worker.stop()
    await door.heard_down(worker)
    assert leading(LONG) == 0
    assert not door.engine(worker).tells
