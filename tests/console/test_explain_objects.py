"""`antefix explain --object-store` says which blocks the object tier has and which the stores have."""

import asyncio

import pytest

from antefix.layout import KVFormat
from antefix.record import Record, RecordKind
from tests.console.test_explanation import SIZE, Deployed
from tests.objects.small_tier import upload


@pytest.fixture
def deployed(tmp_path):
    made = Deployed(tmp_path)
    yield made
    made.store.close()


def test_blocks_that_only_the_object_tier_has_are_stored_there(deployed, capsys, tmp_path):
    deployed.put(4)
    digest, chain = deployed.names()
    layout = deployed.identity.layout(KVFormat.FP8)
    kinds = (
        (RecordKind.BLOCK, layout.block_bytes, range(2, 10)),
        (RecordKind.CHECKPOINT, layout.checkpoint_bytes, [9]),
    )
    records = [
        Record(
            kind=kind,
            hash=chain.hashes[index],
            parent=chain.parent(index),
            fingerprint=digest,
            position=(index + 1) * SIZE,
            payload=bytes(nbytes),
        )
        for kind, nbytes, indices in kinds
        for index in indices
    ]
    url = f"file://{tmp_path}/bucket"
    asyncio.run(upload(url, records, segment_bytes=1 << 20))
    without = deployed.explain(capsys)
    assert without["stored_blocks"] == 4
    answer = deployed.explain(capsys, "--object-store", url, "--prefill-rate", "200")
    assert deployed.states(answer) == ["stored"] * 10
    assert [block["store"] for block in answer["blocks"]] == [str(tmp_path / "store")] * 4 + [url] * 6
    assert (answer["hit_tokens"], answer["miss_reason"]) == (10 * SIZE, "")
    assert answer["blocks"][9]["place"]["payload_bytes"] == layout.block_bytes
