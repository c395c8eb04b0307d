"""One request's trace through all processes, as an OTLP collector gets it."""

import pytest

from tests.waiting import AT_MOST_S

httpx2 = pytest.importorskip("httpx2")
pytest.importorskip("opentelemetry.sdk")

from tests.telemetry.otlp_receiver import receiving  # noqa: E402 - it needs what may not be installed

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
COLD = {"tokenize", "look-up", "place", "queue", "plan", "restore", "prefill chunk", "handoff", "first token", "decode"}
COLD |= {"decode steps", "store", "settle"}


async def test_a_request_is_one_trace_from_its_client_to_the_store(deploy, small_model):
    with receiving() as (receiver, url):
        async with deploy(model=small_model, http_address="127.0.0.1:0", traces=url, strategy="zero") as deployment:
            address = f"http://{deployment.one('router').http_address}"
            async with httpx2.AsyncClient(base_url=address, timeout=AT_MOST_S) as client:
                for number in range(2):
                    body = {"model": "m", "prompt": "to be or not to be " * 60, "max_tokens": 80, "temperature": 0}
                    headers = {"traceparent": f"00-{TRACE_ID[:-1]}{number}-{PARENT_ID}-01"}
                    answer = await client.post("/v1/completions", json=body, headers=headers, timeout=AT_MOST_S)
                    assert answer.status_code == 200, answer.text
        # The roles send their remaining spans when they stop.
    cold = [span for span in receiver.spans if span.trace_id == f"{TRACE_ID[:-1]}0"]
    hit = [span for span in receiver.spans if span.trace_id == f"{TRACE_ID[:-1]}1"]
    # 1. Every part of a request has a span, from the process that did the part.
    assert {span.name for span in cold} >= COLD | {"http", "Prefill", "Decode", "Put"}
    assert {span.name for span in hit} >= {"http", "look-up", "plan", "restore", "first token", "decode", "settle"}
    services = {"antefix-router", "antefix-prefill", "antefix-decode", "antefix-kvstore"}
    assert {span.service for span in cold} == services
    # 2. All spans form one tree under the client's own span.
    known = {span.span_id for span in cold}
    (root,) = [span for span in cold if span.name == "http"]
    assert root.parent_id == PARENT_ID and root.attributes["status"] == 200
    assert all(span.parent_id in known for span in cold if span is not root)
    # 3. A span names the restore plan.
    (restored,) = [span for span in cold if span.name == "restore"]
    assert restored.attributes["plan"] == "cold" and restored.attributes["miss_reason"] == "first_seen"
    (again,) = [span for span in hit if span.name == "restore"]
    assert again.attributes["plan"] == "replay" and again.attributes["hit_tokens"] > 1000
    (replayed,) = [span for span in hit if span.name == "replay"]
    assert replayed.attributes["num_tokens"] == again.attributes["replayed_tokens"] > 0
    (steps,) = [span for span in cold if span.name == "decode steps"]
    assert steps.attributes["num_steps"] == 79 and steps.attributes["num_running"] == 1
    # 4. A trace has no text of a prompt.
    assert not [span for span in receiver.spans if any("to be" in str(each) for each in span.attributes.values())]
