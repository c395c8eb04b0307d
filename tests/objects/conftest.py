"""A real S3 server for all tests that use one, with a separate place for each test."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator

import pytest

from tests.objects.s3_server import BUCKET, environment, s3_server

At = Callable[[str], None]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The server's endpoint. Skips the test if `make test-s3` did not set the server's path."""
    pytest.importorskip("obstore")
    with s3_server(tmp_path_factory.mktemp("s3")) as endpoint:
        yield endpoint


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> At:
    """Sets the endpoint for clients that are opened from now on."""

    def use(endpoint: str) -> None:
        for name, value in environment(endpoint).items():
            monkeypatch.setenv(name, value)

    return use


@pytest.fixture
def url(request: pytest.FixtureRequest, server: str, at: At) -> str:
    at(server)
    name = re.sub(r"\[.*", "", request.node.name)
    return f"s3://{BUCKET}/{name}-{random.randrange(1 << 32):08x}"
