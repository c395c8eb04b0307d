"""The stable part of a user's name isolates users. The session in the name is a routing hint."""

import json

import httpx2
import pytest

from antefix_router.gateway.user_names import split_user
from tests.gateway.scripted import Script, make_front, serving
from tests.waiting import AT_MOST_S

HASH, ACCOUNT = "0123456789abcdef" * 4, "11111111-2222-4333-8444-555555555555"
ONE, TWO = "5f2b6e1c-0000-4000-8000-000000000000", "5f2b6e1c-0000-4000-8000-000000000001"


def claude(session, **changed):
    return json.dumps({"device_id": HASH, "account_uuid": ACCOUNT, "session_id": session, **changed})


SAME_USER = {
    "JSON": (claude(ONE), claude(TWO)),
    "JSON without an account": (claude(ONE, account_uuid=""), claude(TWO, account_uuid="")),
    "JSON in another order": (claude(ONE), json.dumps(dict(reversed(json.loads(claude(TWO)).items())), indent=1)),
    "text": (f"user_{HASH}_account_{ACCOUNT}_session_{ONE}", f"user_{HASH}_account_{ACCOUNT}_session_{TWO}"),
    "text without an account": (f"user_{HASH}_account__session_{ONE}", f"user_{HASH}_account__session_{TWO}"),
    "text of one hash": (f"user_{HASH}_session_{ONE}", f"user_{HASH}_session_{TWO}"),
    "other members": (
        json.dumps({"userId": "ann", "conversationId": "c1"}),
        json.dumps({"userId": "ann", "conversationId": "c2"}),
    ),
}


@pytest.mark.parametrize("names", SAME_USER.values(), ids=SAME_USER)
def test_sessions_of_one_user_have_one_name(names):
    first, second = (split_user(name) for name in names)
    assert first.user == second.user and first.shape == second.shape != ""
    assert first.session != second.session and first.session and second.session
    assert first.session not in first.user and split_user(first.user).user == first.user


@pytest.mark.parametrize(
    "name",
    [
        "",
        "ann",
        "ann@example.org",
        "guest_session_" + ONE,  # all guests share this name, so without the session they would be one user
        json.dumps({"session_id": ONE}),
        json.dumps({"session_id": ONE, "device_id": "", "account_uuid": None}),
        json.dumps({"device_id": HASH}),
        json.dumps({"device_id": HASH, "session_id": {"x": 1}}),
        json.dumps(["device_id", "session_id"]),
        '{"device_id": "a", "session_id": "\\ud800"}',
        "{" * 3000,
        f"user_{HASH}_account_{ACCOUNT}_session_{ONE}x",
        f"user_{HASH}_account_{ACCOUNT}",
    ],
)
def test_what_is_in_no_known_shape_is_a_user_as_it_is(name):
    assert (split_user(name).user, split_user(name).session) == (name, "")


def test_different_users_stay_apart():
    names = [claude(ONE), claude(ONE, device_id="d"), claude(ONE, account_uuid="a"), claude(ONE, organization="o")]
    names += [f"user_{HASH}_account_{ACCOUNT}_session_{ONE}", f"user_{HASH}_account__session_{ONE}"]
    assert len({split_user(name).user for name in names}) == len(names)


def test_a_session_too_long_for_a_hint_is_ignored():
    assert split_user(claude("s" * 513)).session == "" and split_user(claude("s" * 512)).session


def body_of(api, user):
    said = [{"role": "user", "content": "hi"}]
    if api == "/v1/messages":
        return {"model": "m", "max_tokens": 3, "messages": said, "metadata": {"user_id": user}}
    if api == "/v1/completions":
        return {"model": "m", "prompt": "hi", "user": user}
    return {"model": "m", "input" if api == "/v1/responses" else "messages": said, "user": user}


@pytest.mark.parametrize("api", ["/v1/messages", "/v1/chat/completions", "/v1/responses", "/v1/completions"])
async def test_every_api_isolates_by_the_account_and_places_by_the_session(api):
    script = Script()
    async with (
        serving(make_front(script, ledger=None)) as url,
        httpx2.AsyncClient(base_url=url, timeout=AT_MOST_S) as client,
    ):
        for session in (ONE, TWO):
            answer = await client.post(api, json=body_of(api, claude(session)))
            assert answer.status_code == 200, answer.text
        explicit = {"prompt_cache_key": "mine"}
        if api != "/v1/messages":
            assert (await client.post(api, json={**body_of(api, claude(ONE)), **explicit})).status_code == 200
    assert len({request.cache_tenant for request in script.requests}) == 1
    assert [request.caller.session for request in script.requests] == [ONE, TWO, "mine"][: len(script.requests)]
