"""The published OpenAPI document describes the HTTP API and is well-formed."""

import json
import re

import httpx2
import pytest
from jsonschema import Draft202012Validator
from starlette.routing import Route

from antefix_router.gateway import openapi
from antefix_router.gateway.access import HttpMeasures
from antefix_router.gateway.app import build_app
from antefix_router.gateway.gateway import Gateway
from antefix_router.gateway.gateway_config import GatewayConfig
from tests.gateway.scripted import Script, make_front, serving
from tests.gateway.test_any_body import BODIES
from tests.waiting import AT_MOST_S


@pytest.fixture
def app():
    front = make_front(Script(), ledger=None)
    return build_app(Gateway(front, GatewayConfig()), GatewayConfig(), HttpMeasures([]))


@pytest.fixture
def document(app):
    return openapi.document([route for route in app.routes if isinstance(route, Route)])


def test_every_address_of_the_door_is_described_with_its_methods(app, document):
    served = {
        (re.sub(r":\w+}", "}", route.path), method.lower())
        for route in app.routes
        for method in route.methods - {"HEAD"}
    }
    described = {(path, method) for path, methods in document["paths"].items() for method in methods}
    assert served == described and len(served) >= 10


def test_the_document_is_well_formed(document):
    json.dumps(document, allow_nan=False)
    schemas = document["components"]["schemas"]
    for schema in schemas.values():
        Draft202012Validator.check_schema(schema)
    named = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document["paths"])))
    assert named <= set(schemas)


async def test_it_is_served_and_good_requests_and_answers_fit_it():
    front = make_front(Script(), ledger=None)
    async with (
        serving(front, chat_format="deepseek-v4") as url,
        httpx2.AsyncClient(base_url=url, timeout=AT_MOST_S) as client,
    ):
        document = (await client.get(openapi.PATH)).json()
        for path, body in BODIES.items():
            operation = document["paths"][path]["post"]
            assert not list(errors_of(document, operation["requestBody"]["content"], body)), path
            answer = await client.post(path, json=body)
            assert not list(errors_of(document, operation["responses"]["200"]["content"], answer.json())), path
            refused = await client.post(path, json={"temperature": "x"})
            assert not list(errors_of(document, operation["responses"]["400"]["content"], refused.json())), path
        for path, name in (("/v1/models", "/v1/models"), ("/v1/models/antefix-tiny", "/v1/models/{name}")):
            answer = await client.get(path)
            content = document["paths"][name]["get"]["responses"]["200"]["content"]
            assert not list(errors_of(document, content, answer.json())), path


async def test_a_door_that_is_not_ready_says_so_as_the_document_has_it():
    gateway = Gateway(make_front(Script(), ledger=None), GatewayConfig())
    app = build_app(gateway, GatewayConfig(), HttpMeasures([]))
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://door") as client:
        document = (await client.get(openapi.PATH)).json()
        for reason, status in (("", "200"), ("no decode worker", "503")):
            gateway.why_unready = lambda reason=reason: reason
            for path in ("/readyz", "/healthz"):
                answer = await client.get(path)
                content = document["paths"][path]["get"]["responses"][status]["content"]
                assert str(answer.status_code) == status
                assert not list(errors_of(document, content, answer.json()))


def errors_of(document, content, value):
    schema = {"components": document["components"], **content["application/json"]["schema"]}
    return Draft202012Validator(schema).iter_errors(value)
