"""A real S3 server process (SeaweedFS) on free ports below 10000.

With a higher port it would choose its own gRPC port.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

KEY_ID, KEY = "antefix", "antefix-secret"
BUCKET = "antefix-test"
# These are not the server's default ports, which it uses for its other services.
_PORTS = range(9510, 9900)
_START_S = 180.0


def free_ports(count: int) -> list[int]:
    """`count` neighbouring free ports.

    The next port is free too, because another server may use a lone port's neighbour.
    """
    found: list[int] = []
    for port in _PORTS:
        with closing(socket.socket()) as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                found.clear()
                continue
        found.append(port)
        if len(found) > count:
            return found[:count]
    raise OSError("no free ports")


def environment(endpoint: str) -> dict[str, str]:
    """Environment variables that every S3 client reads."""
    return {
        "AWS_ACCESS_KEY_ID": KEY_ID,
        "AWS_SECRET_ACCESS_KEY": KEY,
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_REGION": "us-east-1",
    }


@contextmanager
def s3_server(directory: Path, *, pids: list[int] | None = None, anybody: bool = False) -> Iterator[str]:
    """The URL of a server with a bucket. Skips the test if `make test-s3` did not set the server's path.

    pids: the server's process ids are added to this list.  anybody: whether unsigned requests may do everything.
    """
    home = os.environ.get("ANTEFIX_S3", "")
    if not home:
        pytest.skip("`make test-s3` says where the S3 server is")
    names = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc")
    ports = free_ports(len(names) + 2)
    identity = {"name": "antefix", "credentials": [{"accessKey": KEY_ID, "secretKey": KEY}], "actions": ["Admin"]}
    others = [{"name": "anonymous", "actions": ["Admin", "Read", "Write", "List"]}] if anybody else []
    (directory / "s3.json").write_text(json.dumps({"identities": [identity, *others]}))
    (directory / "data").mkdir(exist_ok=True)
    command = [
        f"{home}/bin/weed",
        "server",
        "-dir",
        str(directory / "data"),
        "-ip",
        "127.0.0.1",
        "-ip.bind",
        "127.0.0.1",
    ]
    command += ["-filer", "-s3", "-s3.config", str(directory / "s3.json"), "-master.volumeSizeLimitMB", "64"]
    command += [
        "-volume.max",
        "100",
        "-s3.port.lance",
        "0",
        "-s3.port.iceberg",
        "0",
        "-s3.port",
        str(ports[-2]),
        "-s3.port.grpc",
        str(ports[-1]),
    ]
    for name, port in zip(names, ports[:-2], strict=True):
        command += [f"-{name}", str(port)]
    with (directory / "server.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    if pids is not None:
        pids.append(process.pid)
    url = f"http://127.0.0.1:{ports[-2]}"
    try:
        make_bucket(f"{home}/bin/python", url)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def make_bucket(python: str, url: str) -> None:
    """Make the bucket with a well-known client, in the server's environment. Waits until the server answers."""
    script = (
        "import boto3; client = boto3.client('s3'); there = [b['Name'] for b in client.list_buckets()['Buckets']];"
        f" {BUCKET!r} in there or client.create_bucket(Bucket={BUCKET!r})"
    )
    until_s = time.monotonic() + _START_S
    while True:
        made = subprocess.run([python, "-c", script], env={**os.environ, **environment(url)}, capture_output=True)
        if made.returncode == 0:
            return
        if time.monotonic() > until_s:
            raise TimeoutError(made.stderr.decode()[-500:])
        time.sleep(0.5)
