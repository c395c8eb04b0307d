"""A whole deployment behind a faulty S3 server: every answer equals a cold run, and no request is stuck."""

from __future__ import annotations

from pathlib import Path

import pytest

from antefix.layout import KVFormat
from antefix_console.bare_model import Reference
from antefix_console.deployment import Deployment, DeploymentConfig
from tests.objects.conftest import At
from tests.objects.faulty_proxy import HARMS, Harm, faulty_proxy
from tests.objects.whole_answers import WholeAnswers
from tests.small_worker_model import small_worker_model

pytestmark = [pytest.mark.s3, pytest.mark.services]
# Objects of a few blocks, so that a hit needs several ranges.
KVSTORE = ("--budget-bytes", "256M", "--object-upload", "all", "--object-wait-s", "0", "--object-segment-bytes", "64K")
POOL = ("--pool-bytes", "64M")
GROWN_MB_MAX = 128


async def test_every_answer_through_a_faulty_s3_server_equals_a_cold_run(
    server: str, url: str, at: At, tmp_path: Path
) -> None:
    harm = Harm(seed=5)
    async with faulty_proxy(server, harm) as proxy:
        at(proxy)
        config = DeploymentConfig(
            model=small_worker_model(),
            data_dir=tmp_path / "data",
            object_store=url,
            extra_flags={"kvstore": KVSTORE, "prefill": POOL, "decode": POOL},
        )
        async with Deployment(config) as deployment:
            found = await WholeAnswers(
                deployment=deployment,
                reference=Reference(small_worker_model(), KVFormat.FP8),
                harm=harm,
                url=url,
                at=at,
                num_documents=6,
                num_tokens=1100,
                share=0.3,
            ).measure(["", *HARMS, "+".join(HARMS)], server=server, proxy=proxy)
    for each in found:
        assert (each.failed, each.stuck, each.different) == (0, 0, 0), each
        assert each.answers == 6 and each.grown_mb < GROWN_MB_MAX, each
        # Without harm, all hits come from the bucket. Under harm, some do, and the rest of the tokens is computed.
        assert each.from_objects >= (1 if each.kind else 5), each
        assert bool(each.harmed) == bool(each.kind), each
