"""The page shows counts that agree with the records, a forest of shared prefixes, and no text of a prompt."""

import asyncio
import hashlib
import itertools
import json
import random
import urllib.request
from types import SimpleNamespace

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from antefix.errors import PermissionDenied, Unauthenticated
from antefix.miss_reason import MissReason
from antefix.restore_report import RestoreReport
from antefix_billing.usage_record import Status, UsageRecord
from antefix_console.deployment import Deployment, DeploymentConfig
from antefix_router.page.activity import Activity, Life
from antefix_router.page.explained import explained
from antefix_router.page.page import _FILES, page_routes
from antefix_router.page.prefix_forest import PrefixForest
from tests.gateway.scripted import MODEL
from tests.waiting import AT_MOST_S


def record(number=0, *, tenant="", hit=64, prompt=100, at_s=1000.0, **changed):
    fields = {
        "request_id": f"r{number}",
        "source": "s",
        "model": "m",
        "status": Status.STOP,
        "tenant": tenant,
        "prompt_tokens": prompt,
        "cache_hit_tokens": hit,
        "hit_memory_tokens": hit // 2,
        "last_hit_hash": "ab" if hit else "",
        "output_tokens": 5,
        "started_us": int(at_s * 1e6),
        "finished_us": int((at_s + 2.0) * 1e6),
        "ttft_us": 500_000,
        **changed,
    }
    return UsageRecord(**fields)


def test_a_series_and_a_span_add_up_to_what_was_noted():
    now = [1000.0]
    activity = Activity(clock=lambda: now[0])
    for number in range(90):
        activity.note(record(number, tenant=f"t{number % 3}"), None)
        now[0] += 20.0
    assert activity.total.requests == 90 and activity.total.hit_tokens == 90 * 64
    for seconds in (60, 600, 3600):
        points = activity.series(seconds)
        assert len(points) <= 120 and len({b["at"] - a["at"] for a, b in itertools.pairwise(points)}) <= 1
        assert abs(sum(point["requests"] for point in points) - activity.over(seconds).requests) <= 1
    assert activity.over(3600).prompt_tokens == 9000
    assert [name for name, _ in activity.busiest(2)] and len(activity.busiest(9)) == 3
    # Four hours later no count is recent, and the totals stay.
    now[0] += 5 * 3600
    activity.note(record(91), None)
    assert activity.over(3600).requests == 1 and activity.total.requests == 91


def test_what_is_kept_is_bounded():
    activity = Activity(clock=lambda: 0.0)
    for number in range(3000):
        activity.note(record(number, tenant=f"t{number}"), None)
    assert len(activity.newest) == 500 and len(activity.busiest(10_000)) == 1000


def test_a_life_adds_up_to_the_request():
    life = Life.of(record(), RestoreReport(restore_s=0.1, compute_s=0.3, predicted_s=0.2))
    assert life.wait_s + life.restore_s + life.compute_s == pytest.approx(0.5) and life.output_s == pytest.approx(1.5)
    # Clocks of two processes may differ. No part is ever negative or longer than the request.
    odd = Life.of(record(), RestoreReport(restore_s=9.0, compute_s=9.0))
    assert (odd.wait_s, odd.restore_s, odd.compute_s) == (0.0, 0.5, 0.0)


def test_each_reason_for_a_miss_has_a_sentence():
    for reason in MissReason:
        lines = explained(record(miss_reason=reason))
        assert lines[0] == "64 of 100 prompt tokens hit (64.0%)."
        assert any("missed" in line for line in lines) == (reason is not MissReason.NONE)


def name(*blocks):
    return [hashlib.sha256(repr(blocks[: i + 1]).encode()).digest() for i in range(len(blocks))]


def test_prompts_that_part_inside_a_run_cut_it():
    forest = PrefixForest()
    forest.note(name(1, 2, 3, 4), b"a")
    forest.note(name(1, 2, 9), b"b")
    forest.note(name(1, 2), b"a")
    (root,) = forest.roots.values()
    assert (len(root.hashes), root.num_prompts, root.tenants) == (2, 3, {b"a", b"b"})
    assert sorted((len(run.hashes), run.num_prompts) for run in root.children.values()) == [(1, 1), (2, 1)]
    assert max((run.path for run in forest.walk()), key=len) == name(1, 2, 3, 4)


def test_a_forest_holds_what_a_dictionary_of_prefixes_says():
    rng, forest, counted = random.Random(5), PrefixForest(), {}
    for _ in range(300):
        prompt = name(*(rng.randrange(2) for _ in range(rng.randrange(1, 9))))
        forest.note(prompt, b"x")
        for each in prompt:
            counted[each] = counted.get(each, 0) + 1
    found = {}
    for run in forest.walk():
        assert (
            not run.children or len(run.children) > 1 or run.num_prompts > next(iter(run.children.values())).num_prompts
        )
        found.update(dict.fromkeys(run.hashes, run.num_prompts))
    # If a prompt ends inside a run of blocks, it counts for all blocks of the run. So counts may be too high, never too
    # low.
    assert found.keys() == counted.keys() and all(found[each] >= counted[each] for each in counted)
    assert forest.num_hashes == len(counted)


def test_a_forest_forgets_what_is_used_least():
    now = [0.0]
    forest = PrefixForest(hashes_max=50, clock=lambda: now[0])
    for number in range(40):
        now[0] += 1
        forest.note(name("shared", number, number), b"x")
    assert forest.num_hashes <= 50 and forest.num_hashes == sum(len(run.hashes) for run in forest.walk())
    assert name("shared", 39, 39)[-1] in {each for run in forest.walk() for each in run.hashes}
    forest.note(name(*range(51)), b"x")  # longer than the forest's room
    assert forest.num_hashes <= 50


@pytest.mark.parametrize(("error", "status"), [(Unauthenticated("who?"), 401), (PermissionDenied("no"), 403)])
def test_the_data_needs_leave_and_the_page_does_not(error, status):
    def check(request):
        raise error

    view = SimpleNamespace(data=None)  # this value is never read
    client = TestClient(Starlette(routes=page_routes(view, check)))
    assert client.get("/ui/data").status_code == status
    assert client.get("/ui").status_code == 200 and client.get("/ui/secret").status_code == 404


def get(url):
    with urllib.request.urlopen(url, timeout=AT_MOST_S) as answer:
        return answer.headers, answer.read()


@pytest.mark.services
async def test_the_page_of_a_deployment_agrees_with_its_answers_and_shows_no_text(tmp_path):
    config = DeploymentConfig(model=MODEL, data_dir=tmp_path / "data", http_address="127.0.0.1:0")
    async with Deployment(config) as deployment:
        url = f"http://{deployment.one('router').http_address}"
        secret = "the canary sings at midnight " * 12
        body = {"model": "m", "prompt": secret, "max_tokens": 3, "temperature": 0}
        usages = []
        for _ in range(2):
            request = urllib.request.Request(
                f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
            )
            with await asyncio.to_thread(urllib.request.urlopen, request, timeout=AT_MOST_S) as answer:
                usages.append(json.loads(answer.read())["usage"])
        headers, text = await asyncio.to_thread(get, f"{url}/ui/data?seconds=600")
        data = json.loads(text)
        for path in _FILES:
            head, content = await asyncio.to_thread(get, url + path)
            assert content and "default-src 'none'" in head["content-security-policy"]
        assert (await asyncio.to_thread(get, f"{url}/ui"))[1].startswith(b"<!doctype html>")
    assert data["total"]["requests"] == 2
    assert data["total"]["prompt_tokens"] == sum(usage["prompt_tokens"] for usage in usages)
    hits = [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages]
    assert data["total"]["hit_tokens"] == sum(hits) > 0 and data["requests"][0]["hit_tokens"] == hits[1]
    assert {worker["role"] for worker in data["workers"]} == {"prefill", "decode"}
    assert {worker["version"] for worker in data["workers"]} == {data["version"]} == {data["store"]["version"]}
    (run,) = data["forest"]
    assert run["prompts"] == 2 and run["tokens"] == usages[0]["prompt_tokens"] // 64 * 64
    assert sum(age["tokens"] for age in data["store"]["ages"]) == run["tokens"]
    assert b"canary" not in text and headers["cache-control"] == "no-store"
