"""Our own bugs are internal errors. If inner code raises InvalidRequest, the caller must be able to fix the request."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from antefix.errors import InternalError, InvalidRequest
from antefix_router.gateway.http_errors import Provider, error_body

_CHECKOUT = Path(__file__).parents[2]
_ROOMS = (
    "antefix/model",
    "antefix/window",
    "prefill/antefix_prefill",
    "decode/antefix_decode",
    "kernels/antefix_kernels",
)
# (file, function) of each, and why the caller is at fault. A new one needs a reason here.
_CALLERS_FAULTS = {
    ("antefix/model/batch_check.py", "check_piece"): "token ids and lengths are the request's",
    ("prefill/antefix_prefill/worker/engine.py", "check_prompt"): "the request's size and token ids",
    ("decode/antefix_decode/server.py", "_prompt"): "num_emitted is the request's",
    ("decode/antefix_decode/grammar_state.py", "_make"): "the grammar is the request's",
    ("decode/antefix_decode/grammar_state.py", "_check"): "the grammar is the request's",
}


def _raised(file: Path) -> Iterator[str]:
    """The functions of a file that raise InvalidRequest."""
    for function in ast.walk(ast.parse(file.read_text())):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.Raise) and ast.unparse(node).startswith("raise InvalidRequest("):
                    yield function.name


def test_the_inner_rooms_blame_a_caller_only_for_what_it_sent() -> None:
    found = {
        (str(file.relative_to(_CHECKOUT)), name)
        for room in _ROOMS
        for file in (_CHECKOUT / room).rglob("*.py")
        for name in _raised(file)
    }
    assert found == set(_CALLERS_FAULTS)


@pytest.mark.parametrize("provider", list(Provider))
def test_over_http_a_bug_is_a_500_with_an_id(provider: Provider, caplog: pytest.LogCaptureFixture) -> None:
    status, body = error_body(InternalError("block 7 was released twice"), provider)
    assert status == 500
    assert "internal error" in body["error"]["message"]
    assert "released" not in body["error"]["message"]
    assert "released twice" in caplog.text
    assert not issubclass(InternalError, InvalidRequest)
