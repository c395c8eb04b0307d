"""Log lines: one line per event, with ids, and repeated lines are suppressed."""

import io
import json
import logging

import pytest

from antefix.telemetry.context import bind_parent, bind_request, incoming, outgoing
from antefix.telemetry.logs import ALIKE_S, NUM_ALIKE_MAX, JsonFormatter, RepeatFilter, TextFormatter

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Clock:
    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def make_log(clock):
    def make(formatter):
        out = io.StringIO()
        handler = logging.StreamHandler(out)
        handler.setFormatter(formatter)
        handler.addFilter(RepeatFilter(clock=clock))
        log = logging.Logger("antefix.test")
        log.addHandler(handler)
        return log, lambda: out.getvalue().splitlines()

    return make


@pytest.fixture(autouse=True)
def no_request():
    yield
    bind_request("")
    bind_parent("")


def test_a_json_line_has_the_ids_and_what_stands_beside_the_message(make_log):
    log, lines = make_log(JsonFormatter())
    bind_request("r-1")
    bind_parent(TRACE)
    log.info("moved to %s", "worker 2", extra={"status": 200})
    line = json.loads(lines()[0])
    assert line["message"] == "moved to worker 2" and line["level"] == "info" and line["status"] == 200
    assert (line["request_id"], line["trace_id"]) == ("r-1", TRACE[3:35])


def test_a_line_without_a_request_has_no_ids(make_log):
    log, lines = make_log(TextFormatter())
    log.warning("alone")
    assert lines()[0].endswith("antefix.test: alone")


def test_a_line_is_one_line_whatever_it_holds(make_log):
    log, lines = make_log(JsonFormatter())
    try:
        raise ValueError("two\nlines")
    except ValueError:
        log.exception("failed\nbadly")
    assert len(lines()) == 1 and "two" in json.loads(lines()[0])["exception"]


def test_repeated_lines_are_held_back_and_told_of_later(make_log, clock):
    log, lines = make_log(JsonFormatter())
    for number in range(100):
        log.warning("request %d: the store did not answer", number)
    log.warning("something else")
    assert len(lines()) == NUM_ALIKE_MAX + 1
    clock.now_s += ALIKE_S
    log.warning("request %d: the store did not answer", 100)
    assert json.loads(lines()[-1])["left_out"] == 100 - NUM_ALIKE_MAX


def test_errors_with_an_id_are_never_held_back(make_log):
    log, lines = make_log(JsonFormatter())
    for number in range(50):
        log.error("internal error %x", number)
    assert len(lines()) == 50


@pytest.mark.parametrize("header", ["", "00-0-0-01", TRACE[:-1], "00-" + "0" * 32 + TRACE[35:], "ff" + TRACE[2:]])
def test_what_is_no_trace_context_is_left_out(header):
    bind_parent(header)
    assert outgoing() is None


def test_metadata_carries_both_ids_to_the_next_process():
    bind_request("r-2")
    bind_parent(TRACE)
    metadata = outgoing()
    bind_request("")
    bind_parent("")
    incoming(metadata)
    assert outgoing() == metadata == (("x-request-id", "r-2"), ("traceparent", TRACE))


def test_an_id_that_metadata_cannot_hold_goes_without():
    bind_request("\u00e9\n")
    bind_parent(TRACE)
    assert outgoing() == (("traceparent", TRACE),)
