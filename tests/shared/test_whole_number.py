"""Numbers in outside texts: a text that is not a number, or too long or large, gives an answer and no exception."""

import pytest

from antefix.errors import ConfigError, InvalidRequest
from antefix.events.kv_sockets import check_endpoint
from antefix.security.listening import parse_address
from antefix.whole_number import whole_number
from antefix.window.strategy import parse
from antefix_billing.push.sinks import TryLater, _failure
from antefix_console.commands.simulate_cluster import _workers
from antefix_console.commands.usage_verify import _anchor
from antefix_router.fleet.fleet_config import _endpoint
from antefix_router.page.page import _seconds
from antefix_simulate.logs.log_fields import count

# Python's int refuses more than 4,300 digits. isdigit accepts superscripts, which int refuses.
NO_NUMBERS = ("9" * 5000, "0" * 5000 + "1", "²", "٣", "", "+1", "-1", "1 1", "1_0", "1.0", "nan")


@pytest.mark.parametrize("text", NO_NUMBERS)
def test_a_text_that_is_no_number_gives_none(text):
    assert whole_number(text, 10) is None
    assert whole_number(text.encode(), 10) is None


def test_numbers_are_read_up_to_the_largest():
    assert [whole_number(text, 10) for text in ("0", "7", "010", b"10", "11")] == [0, 7, 10, 10, None]
    assert whole_number(None, 10) is None


@pytest.mark.parametrize("text", NO_NUMBERS)
def test_every_reader_of_such_numbers_has_an_answer(text):
    for read in (
        lambda: parse_address(f"127.0.0.1:{text}"),
        lambda: check_endpoint("--kv-events", f"tcp://127.0.0.1:{text}", is_encrypted=True),
        lambda: parse(f"periodic({text})"),
        lambda: _endpoint("kv_events", (f"tcp://127.0.0.1:{text}",), 0, "127.0.0.1", 1),
        lambda: _workers(f"1:{text}"),
        lambda: _anchor(f"{text}:{'0' * 64}", []),
    ):
        with pytest.raises((ConfigError, InvalidRequest)):
            read()
    assert _seconds(text) == 3600 and count(text) is None
    failure = _failure(503, "busy", text)
    assert isinstance(failure, TryLater) and failure.retry_after_s == 0.0
