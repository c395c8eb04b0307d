"""Names that machine code makes are the same, bit for bit, as those of the library's ciphers."""

from __future__ import annotations

import logging
import threading
from typing import Any

import numpy as np
import pytest

from antefix import lane_hashes
from antefix.block import Chain, chain_of
from antefix.lane_hashes import is_right, used_instead
from antefix.machine_code import MadeOnce, host_features
from tests.waiting import AT_MOST_S, wait_until

FINGERPRINT, KEY = b"F" * 32, b"k" * 32


@pytest.fixture(scope="module")
def code() -> Any:
    pytest.importorskip("llvmlite")
    if not host_features().get("aes"):
        pytest.skip("this processor has no AES instructions of x86")
    made = lane_hashes.compiled_code()
    assert made is not None, "what llvmlite compiled is not right on this machine"
    return made


def names(tokens: np.ndarray, block_size: int, num_first: int) -> list[bytes]:
    """The names of a prompt of which `num_first` tokens came first."""
    chain = Chain(FINGERPRINT, KEY, block_size)
    chain.extend(tokens[:num_first])
    chain.extend(tokens[num_first:])
    return chain.hashes


@pytest.mark.parametrize("block_size", [1, 3, 4, 5, 8, 64, 127, 128, 256])
def test_machine_code_makes_the_same_names(code: Any, block_size: int) -> None:
    tokens = np.random.default_rng(3).integers(0, 2**32, 100 * block_size + 1, np.uint32)
    for num_blocks in (1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 100):
        part = tokens[: num_blocks * block_size + 1]
        for num_first in (0, block_size, num_blocks // 2 * block_size + 1):
            with used_instead(None):
                wanted = names(part, block_size, num_first)
            with used_instead(code):
                assert names(part, block_size, num_first) == wanted


def test_code_of_each_width_makes_the_same_names(code: Any) -> None:
    from antefix.lane_code import compiled, shapes_of

    for shape in shapes_of(host_features()):
        made = compiled(shape)
        for num_blocks in (1, shape.num_blocks - 1, shape.num_blocks, shape.num_blocks + 1, 70):
            assert is_right(made, 128, num_blocks), (shape, num_blocks)
            assert is_right(made, 5, num_blocks), (shape, num_blocks)


def test_a_long_prompt_has_the_names_of_its_parts(code: Any) -> None:
    # Long enough to be named without the interpreter's lock, in groups of which the last is not full.
    tokens = np.arange(128 * 2605, dtype=np.uint32)
    with used_instead(None):
        wanted = chain_of(tokens, fingerprint_digest=FINGERPRINT, key=KEY, block_size=128).hashes
    with used_instead(code):
        assert names(tokens, 128, 0) == wanted
        assert names(tokens, 128, 128 * 1300) == wanted


def test_only_a_long_prompt_begins_to_make_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    began = threading.Event()
    made: MadeOnce[Any] = MadeOnce(began.set, logging.getLogger(), "")
    monkeypatch.setattr(lane_hashes, "_code", lambda: made)
    limit = lane_hashes._COMPILED_BLOCKS_MIN
    names(np.arange(4 * (limit - 1), dtype=np.uint32), 4, 0)
    assert not began.is_set()
    names(np.arange(4 * limit, dtype=np.uint32), 4, 0)
    wait_until(began.is_set)


def test_code_that_is_wrong_is_not_used(
    code: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # AES-128 has this many round keys.
    monkeypatch.setattr("antefix.lane_code._ROUND_KEYS", 11)
    fresh = MadeOnce(lane_hashes._tried_code, lane_hashes.log, "prompts are named without compiled code")
    assert fresh.now() is None
    assert "named chains of these blocks wrongly" in caplog.text


def test_code_is_made_once_and_meanwhile_nothing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    go, calls = threading.Event(), []

    def make() -> str:
        calls.append(threading.current_thread().name)
        go.wait(AT_MOST_S)
        return "code"

    made = MadeOnce(make, logging.getLogger(), "")
    assert made.if_ready(begin=False) is None and not calls
    assert made.if_ready() is None and made.if_ready() is None
    go.set()
    wait_until(lambda: made.if_ready() == "code")
    assert made.now() == "code"
    assert calls == ["antefix-compile"]


@pytest.mark.parametrize("error", [ImportError, RuntimeError, OSError])
def test_code_that_cannot_be_made_is_done_without(error: type[Exception]) -> None:
    def make() -> str:
        raise error("no")

    assert MadeOnce(make, logging.getLogger(), "").now() is None
