"""Fixtures for each session: the HTTP door, a home directory and a picture."""

import base64

import pytest

from tests.clients.door import open_door

# A valid picture of one pixel, because programs check that a picture is valid.
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def pytest_collection_modifyitems(config, items):
    """Skip real programs unless they are asked for, because they take minutes."""
    if "clients" in (config.option.markexpr or "").replace("not clients", ""):
        return
    for item in items:
        if item.get_closest_marker("clients"):
            item.add_marker(pytest.mark.skip(reason="drives real programs: run `make test-clients`"))


@pytest.fixture
async def door(tmp_path):
    async with open_door(tmp_path / "ledger") as door:
        yield door


@pytest.fixture
def home(tmp_path):
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(base64.b64decode(PNG))
    return path
