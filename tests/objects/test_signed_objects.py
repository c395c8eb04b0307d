"""Signatures for S3 include an object's digest, if the network could change the object on its way."""

from __future__ import annotations

import asyncio
import hashlib

import pytest

from antefix.objects import cloud_bucket
from antefix.objects.cloud_bucket import CloudBucket, signs_objects
from tests.waiting import AT_MOST_S


@pytest.mark.parametrize(
    ("environment", "signs"),
    [
        ({}, False),
        ({"AWS_ENDPOINT_URL": "https://s3.example"}, False),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:8333"}, False),
        ({"AWS_ENDPOINT": "http://localhost:8333"}, False),
        ({"AWS_ENDPOINT_URL": "http://[::1]:8333"}, False),
        ({"AWS_ENDPOINT_URL": "http://10.0.0.7:9000"}, True),
        ({"AWS_ENDPOINT_URL_S3": "HTTP://minio.rack:9000"}, True),
        ({"AWS_ENDPOINT": "http://localhost.example:9000"}, True),
        ({"AWS_ENDPOINT_URL": ""}, False),
    ],
)
def test_objects_are_signed_over_plain_http_to_another_host(environment, signs):
    assert signs_objects(environment) is signs


@pytest.mark.s3
@pytest.mark.services
@pytest.mark.parametrize("signs", [True, False])
async def test_the_library_sends_the_digest(signs, at, monkeypatch):
    digests = []

    async def answer(reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
        digests.extend(line.partition(": ")[2] for line in head if line.startswith("x-amz-content-sha256"))
        writer.write(b'HTTP/1.1 200 OK\r\nETag: "1"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n')
        await writer.drain()
        writer.close()

    monkeypatch.setattr(cloud_bucket, "signs_objects", lambda _: signs)
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    at(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    async with server, asyncio.timeout(AT_MOST_S):
        await CloudBucket("s3://bucket/prefix").put("name", [b"text"])
    assert digests == [hashlib.sha256(b"text").hexdigest() if signs else "unsigned-payload"]
