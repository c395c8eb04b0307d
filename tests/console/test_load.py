"""A replay keeps the trace's prefixes and times, and reports what its clients saw, refusals among them."""

import asyncio
import json

import pytest

from antefix.errors import InvalidRequest
from antefix_console.cli import main
from antefix_console.endpoint.client import EndpointClient, EndpointConfig
from antefix_console.endpoint.reply import Question, Reply, ReportedUsage
from antefix_console.load.load_report import as_text, summarise
from antefix_console.load.prompt_text import TokenRate, measure_token_rate, prompt_text, words
from antefix_console.load.replay import Planned, Sent, replay
from antefix_simulate.generated_traces import generate
from tests.console.caching_door import CachingScript
from tests.gateway.scripted import make_front, serving
from tests.waiting import AT_MOST_S

pytestmark = pytest.mark.slow

pytest.importorskip("httpx")

RATE = TokenRate(tokens_per_word=5.0, fixed_tokens=10.0)


def text_of(request, number, salt="s", scale=1.0):
    return prompt_text(request, number=number, unit_tokens=64, scale=scale, rate=RATE, salt=salt)


def test_prompts_share_what_the_trace_says_and_no_more():
    trace = generate("chat", num_requests=60, unit_tokens=64, seed=3)
    texts = [text_of(request, number) for number, request in enumerate(trace.requests)]
    unit_characters = len(words("x", RATE.num_words(64)))
    for number, request in enumerate(trace.requests):
        assert abs(len(texts[number]) / 5 * 5.0 - request.num_tokens) < 0.05 * request.num_tokens + 64
        for other in range(number):
            names, others = request.names.tolist(), trace.requests[other].names.tolist()
            shared = next((i for i, (a, b) in enumerate(zip(names, others, strict=False)) if a != b), None)
            shared = min(len(names), len(others)) if shared is None else shared
            same = texts[number][: shared * unit_characters] == texts[other][: shared * unit_characters]
            beyond = slice(shared * unit_characters, (shared + 1) * unit_characters)
            assert same and texts[number][beyond] != texts[other][beyond]
    assert text_of(trace.requests[0], 0, salt="t") != texts[0]


async def test_requests_are_sent_at_their_times_whether_or_not_answers_are_there():
    asked = []

    async def ask(question):
        asked.append(asyncio.get_running_loop().time())
        await asyncio.sleep(0.3)
        return Reply(status=200, usage=ReportedUsage(prompt_tokens=1))

    planned = [
        Planned(at_s=0.1 * number, question=lambda: Question(prompt="x"), ideal_tokens=0, trace_tokens=1)
        for number in range(3)
    ]
    sent = await replay(planned, ask, concurrency_max=8)
    assert [each.planned for each in sent] == planned
    assert asked[2] - asked[0] < 0.3 + 2.0 and all(each.late_s >= 0 for each in sent)
    # With one request at a time, the third waits for two answers and is reported as late.
    sent = await replay(planned, ask, concurrency_max=1)
    assert sent[2].late_s > 0.3


async def test_words_per_token_are_measured_at_the_endpoint():
    async def ask(question):
        return Reply(status=200, usage=ReportedUsage(prompt_tokens=12 + 2 * question.prompt.count(" ")))

    assert await measure_token_rate(ask, 0) == TokenRate(tokens_per_word=2.0, fixed_tokens=12.0)


@pytest.mark.parametrize("api", ["chat", "completions", "messages"])
async def test_a_client_reads_text_times_and_usage_of_each_api(tmp_path, api):
    script = CachingScript(pause_s=0.001)
    question = Question(prompt=words("a", 60), max_tokens=6, logprobs=api != "messages")
    async with (
        serving(make_front(script, ledger=tmp_path / "ledger")) as url,
        EndpointClient(EndpointConfig(url=f"{url}/v1", api=api)) as client,
    ):
        await client.choose_model()
        cold, hit = await client.ask(question), await client.ask(question)
    assert cold.ok and hit.ok and cold.text == hit.text == script.say("")[:6]
    assert cold.usage.reports_hits and cold.usage.cached_tokens == 0 and hit.usage.cached_tokens >= 64
    assert cold.usage.prompt_tokens == hit.usage.prompt_tokens >= 300 and hit.usage.output_tokens == 6
    assert 0 < hit.ttft_s <= hit.total_s and len(hit.gaps_s) == 5
    assert len(hit.logprobs) == (0 if api == "messages" else 6)


async def test_a_refusal_is_a_reply_and_an_endpoint_that_is_not_there_too(tmp_path):
    async with (
        serving(make_front(CachingScript(), ledger=tmp_path / "ledger")) as url,
        EndpointClient(EndpointConfig(url=f"{url}/v1", api="chat", model="m")) as client,
    ):
        refused = await client.ask(Question(prompt="x", max_tokens=-1))
    assert not refused.ok and refused.status == 400 and "max_tokens" in refused.error
    async with EndpointClient(EndpointConfig(url=f"{url}/v1", api="chat", model="m", timeout_s=AT_MOST_S)) as client:
        gone = await client.ask(Question(prompt="x"))
    assert not gone.ok and gone.status == 0


@pytest.mark.services
async def test_the_command_reports_hits_next_to_the_ideal(tmp_path, capsys):
    flags = ["--generate", "chat", "--requests", "12", "--scale", "0.02", "--speed", "1000", "--max-output-tokens", "3"]
    async with serving(make_front(CachingScript(), ledger=tmp_path / "ledger")) as url:
        status = await asyncio.to_thread(main, ["load", "--url", f"{url}/v1", *flags, "--concurrency", "1", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert status == 0 and report["num_ok"] == 12 and report["errors"] == {}
    assert 0 < report["hit_rate"] <= 1 and 0 < report["ideal_hit_rate"] <= 1


def test_what_failed_is_counted_by_reason():
    planned = Planned(at_s=0.0, question=lambda: Question(prompt="x"), ideal_tokens=5, trace_tokens=10)
    sent = [
        Sent(planned=planned, at_s=0.0, late_s=0.0, reply=Reply(status=429, error="429: slower", total_s=0.1)),
        Sent(
            planned=planned,
            at_s=0.0,
            late_s=0.0,
            reply=Reply(
                status=200,
                ttft_s=0.2,
                total_s=0.4,
                usage=ReportedUsage(prompt_tokens=100, cached_tokens=40, output_tokens=2, reports_hits=True),
            ),
        ),
    ]
    report = summarise(sent)
    assert (report.num_requests, report.num_ok, report.hit_rate, report.ideal_hit_rate) == (2, 1, 0.4, 0.5)
    assert report.errors == {"429: slower": 1} and "429: slower" in as_text(report)


def test_a_wrong_url_or_api_is_refused():
    with pytest.raises(InvalidRequest, match="is no URL"):
        EndpointConfig(url="127.0.0.1:8000", api="chat")
    with pytest.raises(InvalidRequest, match="unknown API"):
        EndpointConfig(url="http://x", api="soap")
