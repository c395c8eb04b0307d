"""All disks of a running deployment are wiped: answers stay right, and hits come from the object tier."""

import asyncio
import shutil

import numpy as np
import pytest

from antefix.errors import Unavailable
from antefix.objects.bucket import open_bucket
from antefix.objects.catalog import Catalog
from antefix.usage import tiers_of_text
from antefix_billing.ledger_files import read_settled
from tests.waiting import AT_MOST_S

pytestmark = pytest.mark.services
UPLOADS = ("--budget-bytes", "256M", "--object-upload", "all", "--object-wait-s", "0")


async def until_reached(call):
    """Repeat the call until the router has found the restarted workers, which takes a moment."""
    while True:
        try:
            return await call()
        except Unavailable:
            await asyncio.sleep(0.5)


async def test_hits_come_back_when_every_disk_is_wiped(deploy, ask, document, small_model, small_reference, tmp_path):
    url = f"file://{tmp_path}/bucket"
    async with deploy(
        model=small_model, object_store=url, num_decode=1, extra_flags={"kvstore": UPLOADS}
    ) as deployment:
        prompt = document[:1900]
        output, first = await ask(deployment, prompt)
        assert output == small_reference.generate(prompt, 24)
        catalog = Catalog(open_bucket(url))
        async with asyncio.timeout(AT_MOST_S):
            while catalog.num_records < 1900 // 128:
                await asyncio.sleep(0.1)
                await catalog.refresh()
        longer = np.concatenate((prompt, document[:100]))
        # Disk and memory are empty each time. On a busy machine the tier's first answer may come too late.
        async with asyncio.timeout(2 * AT_MOST_S):
            while True:
                for path in deployment.config.store_dir.iterdir():
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                for process in [each for each in deployment.processes if each.role != "router"]:
                    await deployment.kill(process)
                    await deployment.restart(process)
                output, last = await until_reached(lambda: ask(deployment, longer))
                assert output == small_reference.generate(longer, 24)
                records = [item.record for item in read_settled(deployment.config.ledger_dir)]
                if "object:file" in tiers_of_text(records[-1].hit_tiers):
                    break
    assert first.usage.cache_hit_tokens == 0
    assert last.usage.cache_hit_tokens > 0
