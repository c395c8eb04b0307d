"""The spans of one process, as a collector gets them, and no spans if tracing is off."""

import os
import subprocess
import sys
import time

import pytest

from antefix.errors import ConfigError
from antefix.telemetry import begin, span
from antefix.telemetry.context import bind_parent, outgoing, traceparent
from antefix.telemetry.tracing import serving, start_tracing
from antefix_prefill.run_prompt import run_prompt

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture(autouse=True)
def own_context():
    """Give each test its own context, because `serving` sets its span in the context of the tests' thread."""
    yield
    bind_parent("")
    if "opentelemetry.context" in sys.modules:
        context = sys.modules["opentelemetry.context"]
        context.attach(context.Context())


@pytest.fixture
def tracing():
    """The receiver of spans. `stop()` sends the remaining spans."""
    pytest.importorskip("opentelemetry.sdk")
    from tests.telemetry.otlp_receiver import receiving

    with receiving() as (receiver, url):
        receiver.stop = start_tracing(url, role="test")
        yield receiver
        receiver.stop()


def test_off_a_span_is_one_shared_object_that_does_nothing():
    assert span("a", size=1) is span("b") is begin("c")
    with span("a") as opened, serving("d") as served:
        opened.set(size=1)
        served.set(size=2)
    assert outgoing() is None


def test_off_a_callers_trace_is_handed_on_all_the_same():
    bind_parent(TRACE)
    assert traceparent() == TRACE


def test_on_what_is_handed_on_is_the_innermost_span(tracing):
    bind_parent(TRACE)
    with serving("outer"):
        outer = traceparent()
        with span("inner"):
            inner = traceparent()
    tracing.stop()
    spans = {each.name: each for each in tracing.spans}
    assert outer[36:52] == spans["outer"].span_id and inner[36:52] == spans["inner"].span_id
    assert spans["inner"].parent_id == spans["outer"].span_id and spans["outer"].parent_id == TRACE[36:52]
    assert {each.trace_id for each in tracing.spans} == {TRACE[3:35]}


def test_a_caller_that_does_not_sample_is_not_traced(tracing):
    bind_parent(TRACE[:-2] + "00")
    with serving("outer"), span("inner"):
        pass
    tracing.stop()
    assert not tracing.spans


def test_a_share_of_nothing_traces_nothing():
    pytest.importorskip("opentelemetry.sdk")
    from tests.telemetry.otlp_receiver import receiving

    with receiving() as (receiver, url):
        stop = start_tracing(url, role="test", share=0.0)
        with serving("outer"):
            pass
        stop()
        assert not receiver.spans


def test_without_the_extra_the_setting_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
    with pytest.raises(ConfigError, match=r"sending traces needs .*: pip install .*\[otel\]"):
        start_tracing("http://127.0.0.1:1", role="test")


@pytest.mark.parametrize(("strategy", "plan"), [("boundary", "checkpoint"), ("zero", "replay")])
async def test_a_restore_tells_what_it_read_from_where(make_engine, make_prompt, tracing, strategy, plan):
    first, second = make_engine(strategy), make_engine(strategy)
    tokens = [number % 200 for number in range(1500)]
    await run_prompt(first, make_prompt(first, tokens))
    began_s = time.time()
    await run_prompt(second, make_prompt(second, tokens))
    tracing.stop()
    spans = [each for each in tracing.spans if each.started_s >= began_s]
    reads = [each for each in spans if each.name == "read"]
    blocks = [each for each in reads if each.attributes["what"] == "blocks"]
    assert blocks and all(each.attributes["tier"] == "disk" for each in reads)
    assert any(each.attributes["what"] == "checkpoint" for each in reads) == (plan == "checkpoint")
    (planned,) = [each for each in spans if each.name == "plan"]
    assert planned.attributes["plan"] == plan
    assert bool([each for each in spans if each.name == "replay"]) == (plan == "replay")


@pytest.mark.services
def test_off_a_role_imports_nothing_of_it():
    code = (
        "import sys, antefix_router.server, antefix_kvstore.server, antefix_prefill.server, antefix_decode.server;"
        "sys.exit(any(name.startswith('opentelemetry.exporter') for name in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, env={**os.environ, "PYTHONPATH": ":".join(sys.path)}
    )
    assert done.returncode == 0
