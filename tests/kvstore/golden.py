"""Makes the golden store of the present format version: `python -m tests.kvstore.golden` writes it next to the others.

Run it only once for each new version, because its stores must open for ever.
"""

from __future__ import annotations

import json
import tarfile
import tempfile
from pathlib import Path

import numpy as np

from antefix.block import Family, Labels
from antefix.record import RecordKind
from antefix.secret import Keyring
from antefix.store_files.codec import PlanePart, PlanePlan
from antefix.store_files.record_format import FORMAT_VERSION
from antefix.store_files.seal import Seals
from antefix_kvstore.kvstore_config import KvStoreConfig
from antefix_kvstore.storage_engine import StorageEngine
from tests.kvstore.small_store import BLOCK, Prompt

GOLDEN = Path(__file__).parents[1] / "golden"
KEYS = {"acme": "11" * 32}
# For version 2: the secret that names owners and seals records.
SECRET = bytes(range(32))
KEYRING = Keyring(SECRET, generation=3)
PLAN = PlanePlan(parts=(PlanePart(num_rows=32, fields=((48, 1), (32, 2))),))
RAW = Prompt(list(range(BLOCK * 5)), payload_bytes=333)


class Coded(Prompt):
    """Payloads that compress, made without a random generator so that no library version changes them."""

    def __init__(self) -> None:
        super().__init__([9] * BLOCK * 3, payload_bytes=PLAN.payload_bytes, fingerprint=b"C" * 32)

    def payload(self, index: int, kind: RecordKind = RecordKind.BLOCK) -> bytes:
        ramp = np.arange(self.payload_bytes, dtype=np.uint32)
        return ((ramp * ramp * (index + 3) // 7) % 5).astype(np.uint8).tobytes()


CODED = Coded()


def write(target: Path, *, keys_file: str = "", secret_file: str = "") -> None:
    """One store as a tar file: raw and coded blocks, checkpoints, two segments, an evicted record."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name) / "store"
        config = KvStoreConfig(
            dir=str(directory),
            budget_bytes=1 << 20,
            block_ttl_s=0,
            checkpoint_ttl_s=0,
            compression="zstd",
            keys_file=keys_file,
            secret_file=secret_file,
        )
        engine = StorageEngine(config)
        engine.register(CODED.fingerprint, BLOCK, {RecordKind.BLOCK: PLAN})
        tenant = {"tenant": KEYRING.owner("acme"), "labels": Labels(family=Family.V4.code, num_cards=2)}
        seals = Seals(KEYRING)
        engine.put([seals.seal(RAW.block(i, cost_s=0.5, **tenant)) for i in range(5)])
        engine.put([seals.seal(RAW.checkpoint(4, **tenant))])
        engine.segments.roll(engine.clock_ms())
        engine.put([seals.seal(CODED.block(i, **tenant)) for i in range(3)])
        engine.close()
        with tarfile.open(target, "w:gz") as tar:
            tar.add(directory, "store")


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    write(GOLDEN / f"store-v{FORMAT_VERSION}.tar.gz")
    with tempfile.TemporaryDirectory() as name:
        keys = Path(name) / "keys.json"
        keys.write_text(json.dumps(KEYS))
        keys.chmod(0o600)
        secret = Path(name) / "secret"
        secret.write_text(f"3 {SECRET.hex()}\n")
        secret.chmod(0o600)
        write(GOLDEN / f"store-v{FORMAT_VERSION}-encrypted.tar.gz", keys_file=str(keys), secret_file=str(secret))


if __name__ == "__main__":
    main()
