"""Other programs' logs become traces that share exactly the prompts' common prefixes, and have none of their text."""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from antefix.errors import InvalidRequest
from antefix.prompt_marks import marks_of
from antefix_billing.ledger import Ledger
from antefix_billing.usage_record import UsageRecord
from antefix_console.commands import simulate as simulate_command
from antefix_console.commands import trace as trace_command
from antefix_simulate.trace import Trace, format_of, load
from antefix_simulate.trace_replay import ideal_hits
from tests.billing.usage_records import NOW_US, record

SECRET_WORDS = "the customer's password is correct-horse-battery-staple "
FIRST = SECRET_WORDS * 40
SECOND = "and now something entirely different " * 40
SYSTEM = "You are helpful. " * 60
TIMES = ("2026-11-01T10:00:00Z", "2026-11-01T10:00:30Z")


def _import(tmp_path: Path, log_format: str, log: Path, *flags: str) -> Trace:
    out = tmp_path / "trace.jsonl.gz"
    parser = argparse.ArgumentParser()
    trace_command.add_arguments(parser)
    argv = ["import", "--format", log_format, str(log), "--output", str(out), *flags]
    assert trace_command.run(parser.parse_args(argv)) == 0
    text = gzip.decompress(out.read_bytes()).decode()
    assert "password" not in text and "customer" not in text
    assert format_of(out) == "antefix"
    return load(out, "antefix", block_size=1)


def _log(tmp_path: Path, rows: list[Any], name: str = "log.jsonl") -> Path:
    path = tmp_path / name
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def _turns() -> list[list[dict[str, Any]]]:
    first = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": FIRST}]
    return [first, [*first, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": SECOND}]]


def _tokens(messages: list[dict[str, Any]]) -> int:
    return sum(len(message["content"]) for message in messages) // 4


def _openai(index: int, messages: list[dict[str, Any]]) -> dict[str, Any]:
    details = {"cached_tokens": 128 * index}
    usage = {"prompt_tokens": _tokens(messages), "completion_tokens": 7, "prompt_tokens_details": details}
    request = {"model": "m", "messages": messages, "user": "u1"}
    return {"timestamp": TIMES[index], "request": request, "response": {"choices": [], "usage": usage}}


def _anthropic(index: int, messages: list[dict[str, Any]]) -> dict[str, Any]:
    # Clients move the cache mark to the newest message. The mark is not part of the prompt.
    said = [dict(message) for message in messages[1:]]
    said[-1]["content"] = [{"type": "text", "text": said[-1]["content"], "cache_control": {"type": "ephemeral"}}]
    said[:-1] = [{**each, "content": [{"type": "text", "text": each["content"]}]} for each in said[:-1]]
    usage = {
        "input_tokens": _tokens(messages) - 128 * index,
        "cache_read_input_tokens": 128 * index,
        "output_tokens": 7,
    }
    body = {"model": "m", "system": [{"type": "text", "text": SYSTEM}], "messages": said}
    return {"created_at": TIMES[index], "params": body, "response": {"usage": usage}}


def _litellm(index: int, messages: list[dict[str, Any]]) -> dict[str, Any]:
    payload = {
        "call_type": "acompletion",
        "startTime": 1793527200.0 + 30 * index,
        "messages": messages,
        "prompt_tokens": _tokens(messages),
        "completion_tokens": 7,
        "status": "success",
        "model_parameters": {"temperature": 1},
        "metadata": {"user_api_key_hash": "abc"},
        "response": {"usage": {"prompt_tokens": _tokens(messages), "completion_tokens": 7}},
    }
    return {"standard_logging_object": payload} if index else payload


def _langfuse(index: int, messages: list[dict[str, Any]]) -> dict[str, Any]:
    details = {"input": _tokens(messages) - 128 * index, "input_cached_tokens": 128 * index, "output": 7}
    row = {"id": str(index), "type": "GENERATION", "start_time": TIMES[index].replace("T", " ")[:-1] + ".000000"}
    return {**row, "input": json.dumps({"messages": messages}), "output": "Yes.", "usage_details": details}


MAKERS: dict[str, Callable[[int, list[dict[str, Any]]], dict[str, Any]]] = {
    "openai-jsonl": _openai,
    "anthropic": _anthropic,
    "litellm": _litellm,
    "langfuse": _langfuse,
}


@pytest.mark.parametrize("name", ["log.jsonl", "log.jsonl.gz"])
@pytest.mark.parametrize("log_format", MAKERS)
def test_a_second_turn_hits_the_whole_first_one(tmp_path: Path, log_format: str, name: str) -> None:
    turns = _turns()
    rows = [MAKERS[log_format](index, messages) for index, messages in enumerate(turns)]
    trace = _import(tmp_path, log_format, _log(tmp_path, rows, name))
    assert [request.at_s for request in trace.requests] == [0.0, 30.0]
    assert [request.num_tokens for request in trace.requests] == [_tokens(messages) for messages in turns]
    assert [request.output_tokens for request in trace.requests] == [7, 7]
    hits = list(ideal_hits(trace))
    # The hit is the first prompt except its last unit and the roles between messages.
    assert hits[0] == 0
    assert _tokens(turns[0]) - 2 * trace.unit_tokens <= hits[1] <= _tokens(turns[0])


@pytest.mark.parametrize("log_format", ["openai-jsonl", "anthropic", "langfuse"])
def test_what_the_provider_cached_is_kept(tmp_path: Path, log_format: str) -> None:
    rows = [MAKERS[log_format](index, messages) for index, messages in enumerate(_turns())]
    trace = _import(tmp_path, log_format, _log(tmp_path, rows))
    assert trace.requests[1].cached_tokens == 128


def test_users_share_nothing_where_they_are_kept_apart(tmp_path: Path) -> None:
    rows = [_openai(0, _turns()[0]), _openai(1, _turns()[0])]
    rows[1]["request"]["user"] = "u2"
    shared = _import(tmp_path, "openai-jsonl", _log(tmp_path, rows))
    assert list(ideal_hits(shared))[1] > 0
    apart = _import(tmp_path, "openai-jsonl", _log(tmp_path, rows), "--per-user")
    assert list(ideal_hits(apart)) == [0, 0]


def test_a_prompt_with_other_tools_shares_nothing(tmp_path: Path) -> None:
    rows = [_openai(0, _turns()[0]), _openai(1, _turns()[1])]
    for row, name in zip(rows, ("read_file", "write_file"), strict=True):
        row["request"]["tools"] = [{"type": "function", "function": {"name": name, "parameters": {}}}]
    assert list(ideal_hits(_import(tmp_path, "openai-jsonl", _log(tmp_path, rows)))) == [0, 0]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": _turns()[0]},
        {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": _turns()[0]}},
        {"model": "m", "input": _turns()[0]},
        {"model": "m", "prompt": FIRST},
        {"request": json.dumps({"model": "m", "messages": _turns()[0]})},
        {"prompt_token_ids": list(range(1000))},
    ],
    ids=["bare", "batch", "responses", "completions", "text", "tokens"],
)
def test_shapes_of_openai_rows(tmp_path: Path, row: dict[str, Any]) -> None:
    trace = _import(tmp_path, "openai-jsonl", _log(tmp_path, [row, row]))
    first, second = trace.requests
    assert first.names.tolist() == second.names.tolist() != []
    assert second.at_s == 1.0  # without times, one request per second


def test_a_response_that_names_an_earlier_one_goes_on_from_it(tmp_path: Path) -> None:
    output = [{"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Yes."}]}]
    rows = [
        {"request": {"model": "m", "input": FIRST}, "response": {"id": "r1", "output": output}},
        {
            "request": {"model": "m", "input": SECOND, "previous_response_id": "r1"},
            "response": {"id": "r2", "output": []},
        },
    ]
    trace = _import(tmp_path, "openai-jsonl", _log(tmp_path, rows))
    assert trace.requests[1].num_tokens > trace.requests[0].num_tokens
    assert list(ideal_hits(trace))[1] >= trace.requests[0].num_tokens - 2 * trace.unit_tokens


def test_vllms_own_log_gives_exact_tokens(tmp_path: Path) -> None:
    ids = list(range(500))
    lines = [
        f"INFO 11-01 10:00:0{n} [logger.py:39] Received request cmpl-{n}: prompt: 'it\\'s {SECRET_WORDS}', params: "
        f"SamplingParams(n=1), prompt_token_ids: {ids[: 300 + 200 * n]}, prompt_embeds shape: None, lora_request: None."
        for n in range(2)
    ]
    lines.append(
        "DEBUG 11-01 10:00:05 [logger.py:55] Request cmpl-5 details: prompt: None, prompt_token_ids: [1, 2, 3]."
    )
    lines.append(
        "INFO 11-01 10:00:05 [logger.py:63] Received request cmpl-5: params: SamplingParams(n=1), lora_request: None."
    )
    lines.append(
        "INFO 11-01 10:00:06 [logger.py:70] Generated response cmpl-1: output: 'x', output_token_ids: [7, 8], ..."
    )
    path = tmp_path / "vllm.log"
    path.write_text("\n".join(lines) + "\n")
    trace = _import(tmp_path, "vllm", path)
    assert [request.num_tokens for request in trace.requests] == [300, 500, 3]
    assert [request.output_tokens for request in trace.requests] == [0, 2, 0]
    assert [request.at_s for request in trace.requests] == [0.0, 1.0, 5.0]
    assert list(ideal_hits(trace)) == [0, 256, 0]


@pytest.mark.parametrize("ids", ["1, 3 4", "1,, 2", "1, 2, ", ",", " ", "99999999999"])
def test_token_ids_that_vllm_would_not_write_are_no_token_ids(tmp_path: Path, ids: str) -> None:
    path = tmp_path / "vllm.log"
    line = "INFO 11-01 10:00:0{} [logger.py:39] Received request r-{}: prompt: {!r}, prompt_token_ids: [{}], x: None."
    path.write_text(line.format(0, 0, "a" * 40, ids) + "\n" + line.format(1, 1, "x", "1, 2, 3") + "\n")
    trace = _import(tmp_path, "vllm", path)
    # The first request's length comes from its text.
    assert [request.num_tokens for request in trace.requests] == [10, 3]


def _session(tmp_path: Path) -> Path:
    common = {"sessionId": "s", "version": "2.0", "cwd": "/w", "isSidechain": False}
    rows: list[dict[str, Any]] = [{"type": "summary", "summary": "a title"}]
    parent, text_tokens, answer = None, 0, "Sure. " * 200
    for turn in range(3):
        said = f"{turn} {SECRET_WORDS * 30}"
        text_tokens += len(said) // 4
        user = {"type": "user", "uuid": f"u{turn}", "parentUuid": parent, "timestamp": f"2026-11-01T10:0{turn}:00Z"}
        rows.append({**common, **user, "message": {"role": "user", "content": said}})
        usage = {"input_tokens": 4, "cache_read_input_tokens": 10_000 + text_tokens - 4, "output_tokens": 300}
        for part in range(2):  # one message over two lines
            message = {
                "id": f"m{turn}",
                "role": "assistant",
                "usage": usage,
                "content": [{"type": "text", "text": answer}],
            }
            line = {"type": "assistant", "uuid": f"a{turn}{part}", "timestamp": f"2026-11-01T10:0{turn}:09Z"}
            rows.append({**common, **line, "parentUuid": f"a{turn}0" if part else f"u{turn}", "message": message})
        text_tokens += 2 * len(answer) // 4
        parent = f"a{turn}1"
    return _log(tmp_path, rows)


def test_a_claude_code_session_is_one_call_per_message_behind_a_hidden_head(tmp_path: Path) -> None:
    trace = _import(tmp_path, "claude-code", _session(tmp_path))
    assert [request.at_s for request in trace.requests] == [0.0, 60.0, 120.0]
    assert [request.output_tokens for request in trace.requests] == [300] * 3
    hits = list(ideal_hits(trace))
    # All turns share a head of 10,000 tokens, which the log does not have.
    for before, hit in zip(trace.requests, hits[1:], strict=False):
        assert hit > 10_000
        assert before.num_tokens - 0.03 * before.num_tokens <= hit <= before.num_tokens


def test_rows_that_are_no_requests_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _log(tmp_path, [_openai(0, _turns()[0]), {"level": "info", "msg": "started"}])
    path.write_text(path.read_text() + '{"timestamp": "2026-11-0')
    assert len(_import(tmp_path, "openai-jsonl", path).requests) == 1
    told = capsys.readouterr().err
    assert "1 rows without a prompt" in told
    assert "1 lines that are not JSON" in told


@pytest.mark.parametrize("log_format", [*MAKERS, "vllm", "claude-code"])
def test_a_file_without_a_request_is_refused(tmp_path: Path, log_format: str) -> None:
    path = _log(tmp_path, [{"level": "info", "msg": "started"}])
    with pytest.raises(InvalidRequest, match="no request was found"):
        _import(tmp_path, log_format, path)


def test_a_log_with_its_text_taken_out_is_refused(tmp_path: Path) -> None:
    row = _litellm(0, [{"role": "user", "content": "redacted-by-litellm"}])
    with pytest.raises(InvalidRequest, match="text is not in the log"):
        _import(tmp_path, "litellm", _log(tmp_path, [row]))


def test_one_secret_gives_one_name_for_one_text_and_another_gives_others(tmp_path: Path) -> None:
    path = _log(tmp_path, [_openai(0, _turns()[0])])
    names = []
    for secret in ("11" * 32, "11" * 32, "22" * 32):
        file = tmp_path / "secret"
        file.write_text(secret)
        file.chmod(0o600)
        names.append(_import(tmp_path, "openai-jsonl", path, "--secret-file", str(file)).requests[0].names.tolist())
    assert names[0] == names[1]
    assert not set(names[0]) & set(names[2])


def test_a_json_list_and_a_csv_are_read_like_lines(tmp_path: Path) -> None:
    rows = [_langfuse(index, messages) for index, messages in enumerate(_turns())]
    expected = _import(tmp_path, "langfuse", _log(tmp_path, rows))
    listed = tmp_path / "log.json"
    listed.write_text(json.dumps({"data": rows}, indent=1))
    table = tmp_path / "log.csv"
    cells = [[row["type"], row["start_time"], row["input"], json.dumps(row["usage_details"])] for row in rows]
    quoted = [",".join('"' + cell.replace('"', '""') + '"' for cell in row) for row in cells]
    table.write_text("\n".join(["type,start_time,input,usage_details", *quoted]) + "\n")
    for path in (listed, table):
        found = _import(tmp_path, "langfuse", path)
        assert list(ideal_hits(found)) == list(ideal_hits(expected))


def _hashes(*parts: tuple[int, int]) -> list[bytes]:
    """Block hashes of a prompt made of stretches: (owner's number, number of blocks)."""
    return [bytes([whose]) * 2 + index.to_bytes(30, "big") for whose, number in parts for index in range(number)]


def _record(request_id: str, at_s: int, hashes: list[bytes], hit_blocks: int) -> UsageRecord:
    return record(
        request_id,
        hit=128 * hit_blocks,
        miss=128 * (len(hashes) - hit_blocks) + 5,
        prompt_marks=marks_of(hashes),
        started_us=NOW_US + at_s * 1_000_000,
        finished_us=NOW_US + (at_s + 1) * 1_000_000,
    )


def _ledger(tmp_path: Path, records: list[UsageRecord]) -> Path:
    ledger = Ledger(tmp_path / "ledger")
    ledger.append(records)
    ledger.close()
    return tmp_path / "ledger"


def test_the_ledger_is_a_trace_of_what_hit(tmp_path: Path) -> None:
    first = _hashes((1, 21))
    records = [
        _record("a", 0, first, 0),
        # Continues from the first request. Marks alone show 16 of the 21 blocks, but the bill shows all.
        _record("b", 10, [*first, *_hashes((2, 9))], 21),
        # The blocks were evicted before, so nothing hit, but marks show that 24 of 30 blocks are equal.
        _record("c", 20, [*first, *_hashes((2, 9)), *_hashes((3, 4))], 0),
        _record("d", 30, _hashes((4, 8)), 0),
    ]
    trace = _import(tmp_path, "ledger", _ledger(tmp_path, records))
    assert trace.unit_tokens == 128
    assert [request.num_tokens for request in trace.requests] == [128 * n + 5 for n in (21, 30, 34, 8)]
    assert [request.at_s for request in trace.requests] == [0.0, 10.0, 20.0, 30.0]
    assert [hit // 128 for hit in ideal_hits(trace)] == [0, 21, 24, 0]
    assert [request.cached_tokens for request in trace.requests] == [0, 21 * 128, 0, 0]


def test_a_ledger_without_marks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="marks"):
        _import(tmp_path, "ledger", _ledger(tmp_path, [record()]))


@pytest.mark.usefixtures("plots")
def test_two_commands_say_what_would_be_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [MAKERS["openai-jsonl"](index, messages) for index, messages in enumerate(_turns())]
    _import(tmp_path, "openai-jsonl", _log(tmp_path, rows))
    parser = argparse.ArgumentParser()
    simulate_command.add_arguments(parser)
    plot = tmp_path / "saved.svg"
    argv = ["--trace", str(tmp_path / "trace.jsonl.gz"), "--strategy", "auto", "--plot", str(plot)]
    capsys.readouterr()
    assert simulate_command.run(parser.parse_args(argv)) == 0
    out = capsys.readouterr().out
    assert "at the trace's own resolution of 64 tokens" in out
    assert "without a cache" in out
    assert "% saved" in out
    assert "saved" in plot.read_text()
    assert simulate_command.run(parser.parse_args([*argv, "--json"])) == 0
    savings = json.loads(capsys.readouterr().out)["savings"]
    tokens = sum(_tokens(messages) for messages in _turns())
    assert savings["prompt_cost"] == pytest.approx(tokens * 0.15 / 1e6)
    hit = savings["hit_rate"] * tokens
    assert savings["prompt_cost_cached"] == pytest.approx((hit * 0.003 + (tokens - hit) * 0.15) / 1e6, rel=1e-3)
    assert savings["reported_hit_rate"] == pytest.approx(128 / tokens)
