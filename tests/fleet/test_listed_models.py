"""A worker's list of models may hold anything; what is no model, or no length, is passed over."""

import json

import httpx
import pytest

from antefix.errors import Unavailable
from antefix_router.fleet.fleet_config import EnginePlace
from antefix_router.fleet.openai_door import OpenAIDoor
from antefix_router.gateway.http_errors import PassedError


async def models(text):
    transport = httpx.MockTransport(lambda request: httpx.Response(200, text=text))
    async with httpx.AsyncClient(transport=transport) as http:
        return await OpenAIDoor(EnginePlace(url="http://worker"), http).models()


@pytest.mark.parametrize("length", ["null", "[1]", "{}", "1e999", "NaN", '"x"', "-1", "true", "4096.5"])
async def test_a_length_that_is_no_whole_number_is_unknown(length):
    (found,) = await models(f'{{"data": [{{"id": "one", "max_model_len": {length}}}, {{"id": 3}}, "two"]}}')
    assert (found.name, found.num_tokens_max) == ("one", 0)


@pytest.mark.parametrize("length", ["4096", '"4096"'])
async def test_a_length_is_taken(length):
    (found,) = await models(f'{{"data": [{{"id": "one", "max_model_len": {length}}}]}}')
    assert found.num_tokens_max == 4096


@pytest.mark.parametrize("text", ["", "[]", '{"data": 1}', "[" * 100_000])
async def test_an_answer_that_lists_no_models_is_a_worker_that_cannot_serve(text):
    with pytest.raises(Unavailable):
        await models(text)


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
async def test_an_answer_that_no_client_could_read_is_of_a_worker_that_failed(number):
    text = f'{{"choices": [{{"logprobs": [0.5, {number}]}}]}}'
    transport = httpx.MockTransport(lambda request: httpx.Response(200, text=text))
    async with httpx.AsyncClient(transport=transport) as http:
        with pytest.raises(Unavailable, match=r"not finite: choices\[0\]\.logprobs\[1\]"):
            await OpenAIDoor(EnginePlace(url="http://worker"), http).whole("/v1/completions", {}, 5.0)


async def test_a_refusal_that_no_client_could_read_is_passed_as_text():
    text = '{"error": {"message": "too hot", "input": NaN}}'
    transport = httpx.MockTransport(lambda request: httpx.Response(422, text=text))
    async with httpx.AsyncClient(transport=transport) as http:
        with pytest.raises(PassedError) as refused:
            await OpenAIDoor(EnginePlace(url="http://worker"), http).whole("/v1/completions", {}, 5.0)
    assert refused.value.status == 422 and refused.value.body["error"]["message"] == text
    assert json.dumps(refused.value.body, allow_nan=False)
