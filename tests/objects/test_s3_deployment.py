"""A whole deployment with a real S3 server: after its disks are wiped, hits come from the bucket.

A purge reaches it.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest

from antefix.layout import KVFormat
from antefix.objects.bucket import open_bucket
from antefix.objects.catalog import Catalog
from antefix.usage import tiers_of_text
from antefix_billing.ledger_files import read_settled
from antefix_console.bare_model import Reference
from antefix_console.cli import main
from antefix_console.deployment import Deployment, DeploymentConfig
from tests.objects.s3_server import BUCKET, environment, s3_server
from tests.objects.whole_answers import ask, until_uploaded, wipe_disks
from tests.small_worker_model import small_worker_model

pytestmark = [pytest.mark.s3, pytest.mark.services]
DOCUMENT = np.frombuffer((Path(__file__).parents[2] / "LICENSE").read_bytes()[:2500], np.uint8).astype(np.uint32)
NUM_TOKENS = 1900
POOL = ("--pool-bytes", "64M")


async def test_hits_come_from_s3_when_every_disk_is_wiped_and_a_purge_empties_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("obstore")
    (tmp_path / "s3").mkdir()
    with s3_server(tmp_path / "s3") as endpoint:
        for name, value in environment(endpoint).items():
            monkeypatch.setenv(name, value)
        model = small_worker_model()
        reference = Reference(model, KVFormat.FP8)
        url = f"s3://{BUCKET}/deployment"
        kvstore = ("--budget-bytes", "256M", "--object-upload", "all", "--object-wait-s", "0")
        config = DeploymentConfig(
            model=model,
            data_dir=tmp_path / "data",
            object_store=url,
            extra_flags={"kvstore": kvstore, "prefill": POOL, "decode": POOL},
        )
        prompt = DOCUMENT[:NUM_TOKENS]
        longer = np.concatenate((prompt, DOCUMENT[:100]))
        async with Deployment(config) as deployment:
            # 1. The prompt is computed cold, and uploaded.
            assert await ask(deployment, prompt) == reference.generate(prompt, 8)
            await until_uploaded(url, NUM_TOKENS // 128)
            # 2. Disk and memory are empty. The first request is a hit from the bucket, whose index was loaded before
            #    the worker reported ready. On a busy machine the read may still be too late.
            for _ in range(3):
                await wipe_disks(deployment)
                assert await ask(deployment, longer) == reference.generate(longer, 8)
                last = [item.record for item in read_settled(config.ledger_dir)][-1]
                if "object:s3" in tiers_of_text(last.hit_tiers):
                    break
            assert tiers_of_text(last.hit_tiers)["object:s3"] > NUM_TOKENS // 2
            # 3. One command removes a tenant's records from the store and from the bucket.
            purge = ["store", "purge", url, deployment.one("kvstore").address, "--tenant", last.tenant]
            args = [*purge, "--secret-file", str(config.data_dir / "secret"), "--json"]
            assert await asyncio.to_thread(main, args) == 0
            purged = json.loads(capsys.readouterr().out)
            assert purged["failed"] == {} and purged["purged"][url] >= NUM_TOKENS // 128
        catalog = Catalog(open_bucket(url))
        await catalog.refresh()
        assert catalog.num_records == 0
        await catalog.bucket.close()
