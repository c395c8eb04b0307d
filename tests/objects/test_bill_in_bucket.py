"""Anchors and archived ledgers in a real S3 server: missing objects are noticed, and a server that fails costs neither
entries nor segments."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from antefix.errors import Unavailable
from antefix.objects.bucket import open_bucket
from antefix_billing.anchor import read_anchors
from antefix_billing.archive import check_archive, prune, restore
from antefix_billing.ledger import Ledger
from antefix_billing.ledger_files import read_entries
from antefix_billing.receipt import Signer
from antefix_billing.reconcile import verify_all
from antefix_router.anchoring import Anchoring
from tests.billing.usage_records import NOW_US, record
from tests.objects.faulty_proxy import Harm, faulty_proxy

pytestmark = [pytest.mark.s3, pytest.mark.services]


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    ledger = Ledger(tmp_path / "ledger", segment_bytes=1500)
    for number in range(14):
        ledger.append([record(f"r{number}")])
    yield ledger
    ledger.close()


@pytest.fixture
def signer(tmp_path: Path) -> Signer:
    return Signer.create(tmp_path / "receipts.key")


def test_a_cut_ledger_shows_by_its_anchor_in_the_bucket(ledger: Ledger, signer: Signer, url: str) -> None:
    anchoring = Anchoring(ledger, signer, [url], 3600.0)
    anchoring.anchor()
    ledger.append([record("last")])
    anchoring.anchor()
    assert (anchoring.anchored_to, anchoring.num_failed) == (ledger.sequence, 0)
    assert [each.sequence for each in read_anchors([url])] == [ledger.sequence - 1, ledger.sequence]

    def verdict():
        return verify_all(
            [ledger.directory],
            store_log=None,
            anchors={},
            signed=read_anchors([url]),
            public_keys=[signer.public_key],
        )

    assert verdict().ok
    last = max(ledger.directory.glob("usage-*.ledger"))
    last.write_bytes(last.read_bytes()[:-700])
    (ledger.directory / "acknowledged").unlink()
    assert not verdict().ok and "are gone" in verdict().ledgers[0][1].anchors.faults[0]


def test_a_pruned_ledger_is_held_against_its_archive_and_comes_back(
    ledger: Ledger, signer: Signer, url: str, tmp_path: Path
) -> None:
    before = [entry.hash for _, entry in read_entries(ledger.directory)]
    summary = prune(ledger.directory, before_us=NOW_US * 2, place=url, signer=signer, now_us=NOW_US)
    assert summary is not None and summary.last > 8
    assert check_archive(ledger.directory, url) == []
    restore(url, ledger.source, tmp_path / "whole", ledger=ledger.directory)
    assert [entry.hash for _, entry in read_entries(tmp_path / "whole")] == before

    async def harm() -> None:
        bucket = open_bucket(url)
        names = [each.name for each in await bucket.list_objects("antefix-ledgers/") if each.name.endswith(".ledger")]
        await bucket.put(names[0], [b"other bytes"])
        await bucket.delete([names[1]])
        await bucket.close()

    asyncio.run(harm())
    assert len(check_archive(ledger.directory, url)) == 1


async def test_a_store_that_fails_costs_no_segment_and_the_next_anchor_comes(
    ledger: Ledger, signer: Signer, url: str, server: str, at
) -> None:
    anchoring = Anchoring(ledger, signer, [url], 3600.0)
    async with faulty_proxy(server, Harm(share=1.0, kinds=("500", "reset", "503"))) as proxy:
        at(proxy)
        await asyncio.to_thread(anchoring.anchor)
        assert anchoring.num_failed and not anchoring.anchored_to
        with pytest.raises(Unavailable):
            await asyncio.to_thread(
                prune, ledger.directory, before_us=NOW_US * 2, place=url, signer=signer, now_us=NOW_US
            )
    assert next(read_entries(ledger.directory))[1].sequence == 1
    # Some answers are damaged. The library repeats those requests, and reads return the written bytes.
    async with faulty_proxy(server, Harm(share=0.2, kinds=("500", "reset", "slow-down", "delay"))) as proxy:
        at(proxy)
        await asyncio.to_thread(anchoring.anchor)
        assert anchoring.anchored_to == ledger.sequence
        assert await asyncio.to_thread(
            prune, ledger.directory, before_us=NOW_US * 2, place=url, signer=signer, now_us=NOW_US
        )
    at(server)
    assert await asyncio.to_thread(check_archive, ledger.directory, url) == []
