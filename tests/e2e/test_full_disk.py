"""Store, ledger and logs of real processes on one small file system that another process fills."""

from __future__ import annotations

import pytest

from antefix.sampling import Sampling
from antefix.store.remote_store import RemoteStore
from antefix_billing.ledger_files import read_settled
from antefix_billing.reconcile import verify
from antefix_console.deployment import Deployment, DeploymentConfig
from tests.e2e.conftest import SMALL_POOL
from tests.small_disk import fill, free_bytes, small_disk
from tests.waiting import until

MIB = 1 << 20


# Free bytes. 0 is a disk that takes no more bytes.
LEVELS = [(MIB, 0), pytest.param((4 * MIB, MIB, 256 << 10, 16 << 10, 0), marks=pytest.mark.long)]
# `ignore_eos`, because an answer that begins with the end token would be empty.
SAMPLING = Sampling(max_tokens=12, ignore_eos=True)


@pytest.mark.parametrize("levels", LEVELS)
async def test_hits_are_answered_and_billed_at_every_fill_level(tmp_path, ask, document, small_model, levels):
    with small_disk(tmp_path / "small", 24 * MIB) as disk:
        flags = {"prefill": SMALL_POOL, "decode": SMALL_POOL}
        config = DeploymentConfig(model=small_model, data_dir=disk / "data", extra_flags=flags)
        async with Deployment(config) as deployment:
            # The default budget is 64 GiB. Here the store takes the smaller space that the disk has.
            store = RemoteStore(deployment.one("kvstore").address)
            assert (await store.stats()).budget_bytes < 24 * MIB
            first, _ = await ask(deployment, document, sampling=SAMPLING)
            # Each level also gets a new prompt, because a known prompt writes no blocks.
            for number, but in enumerate(levels):
                fill(disk / f"ballast{number}", but=but)
                again, last = await ask(deployment, document, sampling=SAMPLING)
                assert again == first and last.usage.cache_hit_tokens > 2000
                other = document[::-1][number * 100 :].copy()
                fresh, _ = await ask(deployment, other, sampling=SAMPLING)
                assert fresh
            assert free_bytes(disk) < MIB and (await store.stats()).stopped
            # After space becomes free, the store writes again without a restart.
            for number in range(len(levels)):
                (disk / f"ballast{number}").unlink(missing_ok=True)

            async def writes_again():
                return not (await store.stats()).stopped

            await until(writes_again)
            await store.close()
        records = [item.record for item in read_settled(config.ledger_dir)]
        assert len(records) == 1 + 2 * len(levels) and verify(config.ledger_dir).ok
        assert any("bytes free" in record.write_error for record in records)
