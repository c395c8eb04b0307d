"""The object tier through the client of Google Cloud Storage. The server behind it is not Google's.

The client uses GCS's XML interface, which equals S3's in the calls that the tier makes. So a proxy passes the client's
requests to the S3 server: it removes the empty token and writes names with plain slashes. This tests our use of the
client, its URLs, ranges, lists and errors. It does not test Google's service or its sign-in.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager
from urllib.parse import unquote_to_bytes

import pytest

from antefix.objects.bucket import open_bucket
from antefix.record import RecordKind
from tests.kvstore.small_store import BLOCK, FINGERPRINT, Prompt
from tests.objects.any_bucket import keeps_what_any_bucket_must
from tests.objects.faulty_proxy import Harm, faulty_proxy
from tests.objects.s3_server import BUCKET, s3_server
from tests.objects.small_tier import OWNER, num_restored, tier_of, upload

pytestmark = [pytest.mark.s3, pytest.mark.services]
PROMPT = Prompt(list(range(BLOCK * 60)), payload_bytes=60_000)


def _as_s3(request: bytes) -> bytes:
    head, body = request.split(b"\r\n\r\n", 1)
    first, *lines = head.split(b"\r\n")
    method, target, version = first.split(b" ")
    path, question, query = target.partition(b"?")
    lines = [line for line in lines if not line.lower().startswith(b"authorization:")]
    first = b" ".join([method, unquote_to_bytes(path) + question + query, version])
    return b"\r\n".join([first, *lines]) + b"\r\n\r\n" + body


@pytest.fixture(scope="module")
def open_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    pytest.importorskip("obstore")
    with s3_server(tmp_path_factory.mktemp("s3"), anybody=True) as endpoint:
        yield endpoint


@pytest.fixture
def harm() -> Harm:
    return Harm(seed=11, kinds=("reset", "500", "503", "flip", "truncate"))


@pytest.fixture
async def bucket(open_server: str, harm: Harm, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[str]:
    proxy: AbstractAsyncContextManager[str] = faulty_proxy(open_server, harm, rewrite=_as_s3)
    async with proxy as url:
        account = {"gcs_base_url": url, "disable_oauth": True}
        account |= dict.fromkeys(("client_email", "private_key", "private_key_id"), "")
        monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", json.dumps(account))
        yield f"gs://{BUCKET}"


async def test_a_bucket_keeps_what_any_bucket_must(bucket: str) -> None:
    # Few objects, because all requests are sent at once, and each has its own connection to the proxy.
    await keeps_what_any_bucket_must(open_bucket(f"{bucket}/any"), num_objects=40)


async def test_another_host_reads_what_was_uploaded_and_no_harm_makes_a_byte_wrong(bucket: str, harm: Harm) -> None:
    url = f"{bucket}/tier"
    await upload(url, [*PROMPT.blocks(), PROMPT.checkpoint(30)], segment_bytes=1 << 20)
    tier = tier_of(url)
    assert (await tier.held(PROMPT.hashes, fingerprint=FINGERPRINT)).num_leading == len(PROMPT.hashes)
    assert await num_restored(tier, PROMPT) == len(PROMPT.hashes)
    payload = await tier.get(RecordKind.CHECKPOINT, PROMPT.hashes[30], fingerprint=FINGERPRINT, tenant=OWNER)
    assert payload == PROMPT.payload(30, RecordKind.CHECKPOINT)
    harm.share = 0.3
    # Every returned byte is checked. Their number depends on which answers were damaged.
    for _ in range(3):
        await num_restored(tier, PROMPT)
    assert harm.done
    await tier.close()
