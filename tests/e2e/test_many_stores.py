"""Three stores in one deployment: answers equal a cold run whichever store is lost, and the bill names the tiers."""

import numpy as np
import pytest

from antefix.usage import tiers_of_text
from antefix_billing.ledger_files import read_settled
from antefix_billing.reconcile import verify_all

pytestmark = pytest.mark.services


async def test_answers_survive_the_loss_of_stores_and_the_bill_agrees_with_all_logs(
    deploy, ask, document, small_model, small_reference
):
    asked = []
    async with deploy(num_stores=3, num_prefill=2, model=small_model) as deployment:
        config = deployment.config

        async def check(prompt):
            output, last = await ask(deployment, prompt)
            assert output == small_reference.generate(prompt, 24)
            asked.append(last.usage)
            return last.usage

        await check(document[:1000])
        # A conversation moves between workers, so each worker's store gets a part of it.
        for length in (1300, 1600, 1900):
            usage = await check(document[:length])
            assert usage.cache_hit_tokens >= (length - 300) // 128 * 128
        stores = [process for process in deployment.processes if process.role == "kvstore"]
        for lost in stores[:2]:
            await deployment.kill(lost)
            await check(np.concatenate((document[:1900], document[:100])))
            await check(document[:2100])
        records = [item.record for item in read_settled(config.ledger_dir)]
    assert len(records) == len(asked)
    for record in records:
        assert sum(tiers_of_text(record.hit_tiers).values()) == record.hit_store_tokens
        assert all(tier.split(":")[0] in ("page_cache", "disk", "peer") for tier in tiers_of_text(record.hit_tiers))
    logs = [config.usage_log_dir_of(number) for number in range(3)]
    verdict = verify_all([config.ledger_dir], store_log=logs, anchors={})
    assert verdict.ok, verdict.to_json()
    assert sum((config.store_dir_of(number) / "segments").is_dir() for number in range(3)) == 3
