"""Traces are read at the resolution of their hashes. A file that is not a trace is refused with the wrong line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from antefix.errors import InvalidRequest
from antefix_simulate.trace import load


def _write(path: Path, rows: list[Any]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def _mooncake(at_ms: int, tokens: int, ids: list[int]) -> dict[str, Any]:
    return {"timestamp": at_ms, "input_length": tokens, "output_length": 5, "hash_ids": ids}


def _call(t: float, tokens: int, ids: list[int]) -> dict[str, Any]:
    return {"t": t, "type": "n", "in": tokens, "out": 7, "hash_ids": ids}


def _conversation(name: str, requests: list[Any]) -> dict[str, Any]:
    return {"id": name, "block_size": 64, "hash_id_scope": "local", "requests": requests}


@pytest.mark.parametrize("name", ["trace.jsonl", "trace.jsonl.gz"])
def test_mooncake_hashes_of_512_tokens_become_units_of_512(tmp_path: Path, name: str) -> None:
    path = _write(tmp_path / name, [_mooncake(2000, 1300, [0, 1, 2]), _mooncake(1000, 512, [0])])
    trace = load(path, "mooncake", block_size=128)
    assert trace.unit_tokens == 512
    assert [request.at_s for request in trace.requests] == [1.0, 2.0]
    assert [request.names.tolist() for request in trace.requests] == [[0], [0, 1]]
    assert trace.num_tokens == 1812


def test_claude_code_hashes_of_64_tokens_pair_up_into_blocks(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.jsonl", [_conversation("x", [_call(0, 330, [4, 5, 6, 7, 8])])])
    trace = load(path, "claude-code", block_size=128)
    assert trace.unit_tokens == 128
    assert trace.requests[0].names.tolist() == [5, 7]
    assert trace.requests[0].session == "x"


def test_ids_of_two_conversations_never_meet_and_their_starts_are_spread(tmp_path: Path) -> None:
    rows = [_conversation(name, [_call(0, 128, [1, 2])]) for name in "ab"]
    path = _write(tmp_path / "a.jsonl", rows)
    first, second = load(path, "claude-code", block_size=128, spread_s=100.0).requests
    assert first.names[0] != second.names[0]
    assert 0 <= first.at_s < second.at_s <= 100.0
    again = load(path, "claude-code", block_size=128, spread_s=100.0).requests
    assert [request.at_s for request in again] == [first.at_s, second.at_s]


def test_a_sub_agents_calls_count_from_its_own_start(tmp_path: Path) -> None:
    agent = {"t": 50.0, "type": "subagent", "requests": [_call(2.0, 128, [8, 9])]}
    path = _write(tmp_path / "a.jsonl", [_conversation("x", [_call(0, 128, [1, 2]), agent])])
    requests = load(path, "claude-code", block_size=128, spread_s=0.0).requests
    assert [request.at_s for request in requests] == [0.0, 52.0]


def test_a_block_larger_than_a_hash_takes_the_last_hash_of_its_span(tmp_path: Path) -> None:
    path = _write(tmp_path / "t.jsonl", [_mooncake(0, 2100, [3, 4, 5, 6, 7])])
    trace = load(path, "mooncake", block_size=1024)
    assert (trace.unit_tokens, trace.requests[0].names.tolist()) == (1024, [4, 6])


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "[1, 2]",
        '{"timestamp": 0}',
        '{"timestamp": 0, "input_length": 0, "output_length": 1, "hash_ids": []}',
        '{"timestamp": 0, "input_length": 1200, "output_length": 1, "hash_ids": [1]}',
        '{"timestamp": 0, "input_length": 600, "output_length": 1, "hash_ids": [-1]}',
        '{"timestamp": 0, "input_length": 600, "output_length": 1, "hash_ids": ["x"]}',
    ],
)
def test_a_line_that_is_no_request_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(_mooncake(0, 10, [])) + "\n" + line + "\n")
    with pytest.raises(InvalidRequest, match="line 2"):
        load(path, "mooncake", block_size=128)


def test_global_ids_are_not_taken_for_local_ones(tmp_path: Path) -> None:
    row = _conversation("x", [_call(0, 128, [1, 2])]) | {"hash_id_scope": "global"}
    with pytest.raises(InvalidRequest, match="local"):
        load(_write(tmp_path / "a.jsonl", [row]), "claude-code", block_size=128)


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="mooncake"):
        load(tmp_path / "a.jsonl", "qwen", block_size=128)


@pytest.mark.parametrize("name", ["trace.jsonl", "trace.jsonl.gz"])
@pytest.mark.parametrize("trace_format", ["mooncake", "claude-code"])
def test_a_trace_without_requests_is_refused(tmp_path: Path, name: str, trace_format: str) -> None:
    with pytest.raises(InvalidRequest, match="has no requests"):
        load(_write(tmp_path / name, []), trace_format, block_size=128)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"\xff\xfe\x00", "is not text"),
        ("a.jsonl.gz", b"\xff\xfe\x00", "cannot be read to its end"),
        (
            "a.jsonl.gz",
            gzip.compress(json.dumps(_mooncake(0, 600, [1])).encode() * 40, mtime=0)[:60],
            "cannot be read to its end",
        ),
        ("a.jsonl", b'{"timestamp": 0', "line 1: the text is not JSON"),
        (
            "a.jsonl",
            b'{"timestamp": NaN, "input_length": 600, "output_length": 1, "hash_ids": [1]}',
            "not a finite number",
        ),
        (
            "a.jsonl",
            b'{"timestamp": 0, "input_length": 1e999, "output_length": 1, "hash_ids": [1]}',
            "not a finite number",
        ),
        ("a.jsonl", b'{"timestamp": 0, "input_length": 600, "output_length": 1, "hash_ids": 7}', "line 1 is not a"),
        ("a.jsonl", b'{"t": 0}', "it has no 'timestamp'; --format must name"),
    ],
)
def test_a_file_that_is_no_trace_says_why(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidRequest, match=message):
        load(tmp_path / name, "mooncake", block_size=128)


@pytest.mark.parametrize("sizes", [(0, 0), (64, 32)])
def test_hashes_of_no_size_or_of_two_are_refused(tmp_path: Path, sizes: tuple[int, int]) -> None:
    rows = [_conversation("x", [_call(0, 130, [1, 2, 3, 4])]) | {"block_size": size} for size in sizes]
    with pytest.raises(InvalidRequest, match="block_size"):
        load(_write(tmp_path / "a.jsonl", rows), "claude-code", block_size=48)
