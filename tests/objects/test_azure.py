"""The object tier in Azure Blob Storage, served by Microsoft's emulator Azurite (`make test-azure`)."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import random
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Final

import pytest

from antefix.objects.bucket import open_bucket
from antefix.objects.janitor import Janitor, ObjectLimits
from antefix.record import RecordKind
from tests.kvstore.small_store import BLOCK, FINGERPRINT, Prompt
from tests.objects.any_bucket import keeps_what_any_bucket_must
from tests.objects.s3_server import free_ports
from tests.objects.small_tier import OWNER, num_restored, tier_of, upload

pytestmark = [pytest.mark.s3, pytest.mark.services]
PROMPT = Prompt(list(range(BLOCK * 60)), payload_bytes=60_000)
CONTAINER: Final = "antefix"
# The emulator's key, which Microsoft has published.
ACCOUNT: Final = "devstoreaccount1"
KEY: Final = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
VERSION: Final = "2021-08-06"
START_S: Final = 60.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    pytest.importorskip("obstore")
    home = os.environ.get("ANTEFIX_AZURITE", "")
    if not home:
        pytest.skip("`make test-azure` says where Azurite is")
    (port,) = free_ports(1)
    command = [f"{home}/node_modules/.bin/azurite-blob", "--blobHost", "127.0.0.1", "--blobPort", str(port)]
    command += ["--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry"]
    with (tmp_path_factory.mktemp("azurite") / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=Path(log.name).parent)
        try:
            _make_container(port)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait()


@pytest.fixture
def url(server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("AZURE_STORAGE_USE_EMULATOR", "true")
    monkeypatch.setenv("AZURITE_BLOB_STORAGE_URL", server)
    return f"az://{CONTAINER}/{random.randrange(1 << 32):08x}"


def _make_container(port: int) -> None:
    """Make a container with the emulator's shared key. Waits until the emulator answers."""
    until_s = time.monotonic() + START_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1.0).close()
            break
        except OSError:
            if time.monotonic() > until_s:
                raise
            time.sleep(0.1)
    date = formatdate(usegmt=True)
    headers = {"x-ms-date": date, "x-ms-version": VERSION}
    signed = f"PUT{chr(10) * 12}" + "".join(f"{name}:{value}\n" for name, value in headers.items())
    signed += f"/{ACCOUNT}/{ACCOUNT}/{CONTAINER}\nrestype:container"
    mac = base64.b64encode(hmac.digest(base64.b64decode(KEY), signed.encode(), hashlib.sha256)).decode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/{ACCOUNT}/{CONTAINER}?restype=container",
        method="PUT",
        headers={**headers, "Authorization": f"SharedKey {ACCOUNT}:{mac}"},
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert answer.status == 201


async def test_a_container_keeps_what_any_bucket_must(url: str) -> None:
    await keeps_what_any_bucket_must(open_bucket(url))


async def test_any_host_finds_and_reads_what_was_uploaded(url: str) -> None:
    await upload(url, [*PROMPT.blocks(), PROMPT.checkpoint(30)], segment_bytes=1 << 20)
    tier = tier_of(url)
    assert await num_restored(tier, PROMPT) == len(PROMPT.hashes)
    payload = await tier.get(RecordKind.CHECKPOINT, PROMPT.hashes[30], fingerprint=FINGERPRINT, tenant=OWNER)
    assert payload == PROMPT.payload(30, RecordKind.CHECKPOINT)
    await tier.close()


async def test_what_is_over_budget_is_deleted_and_is_a_miss(url: str) -> None:
    writer = await upload(url, PROMPT.blocks(), segment_bytes=1 << 20)
    tier = tier_of(url)
    await tier.load()
    await Janitor(writer.catalog, ObjectLimits(budget_bytes=1)).tidy()
    assert await num_restored(tier, PROMPT) == 0
    await tier.close()
