"""How fast are checksums and MACs of a payload, and hashes for block names, on one core?

    python benchmarks/checksums.py --json benchmarks/results/checksums.json

Figures are processor time, the least of all rounds, so that they are the same on a busy machine. The payload is 64 MiB
in memory, far more than a core's cache. The names are those of a prompt of 1M tokens: 7,813 blocks of 512 bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import json
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.poly1305 import Poly1305

from antefix.lane_hashes import LaneHashes, compiled_code, used_instead
from benchmarks.run_record import write

PAYLOAD_BYTES = 64 << 20
NUM_BLOCKS, BLOCK_SIZE = 7813, 128
KEY = bytes(range(32))


def payload_functions() -> dict[str, Callable[[bytes], object]]:
    gcm = AESGCM(KEY)
    return {
        "XXH3 (64 bits), no MAC": xxhash.xxh3_64_digest,
        "AES-256-GMAC": lambda data: gcm.encrypt(bytes(12), b"", data),
        "Poly1305": lambda data: Poly1305.generate_tag(KEY, data),
        "BLAKE2b, keyed": lambda data: hashlib.blake2b(data, key=KEY).digest(),
        "HMAC-SHA-256": lambda data: hmac.digest(KEY, data, "sha256"),
    }


def name_functions(raw: bytes) -> dict[str, Callable[[], object]]:
    hashes, code = LaneHashes(KEY, KEY, BLOCK_SIZE), compiled_code()

    def named_by(code: Any) -> None:
        with used_instead(code):
            hashes.names(None, memoryview(raw))

    blocks = [raw[start : start + 4 * BLOCK_SIZE] for start in range(0, len(raw), 4 * BLOCK_SIZE)]

    def running() -> None:
        state = hashlib.sha256()
        for block in blocks:
            state.update(block)
            state.copy().digest()

    compiled = {"the same by machine code": lambda: named_by(code)} if code is not None else {}
    return {
        "hash kind 3, which Antefix uses": lambda: named_by(None),
        **compiled,
        "SHA-256 of all bytes in one call, which names only the last block": lambda: hashlib.sha256(raw).digest(),
        "SHA-256, updated and its digest taken after each block": running,
        "SHA-256 of each block, without a key": lambda: [hashlib.sha256(block).digest() for block in blocks],
        "BLAKE2b-256 of each block, keyed": lambda: [
            hashlib.blake2b(block, key=KEY, digest_size=32).digest() for block in blocks
        ],
    }


def least_s(call: Callable[[], object], rounds: int) -> float:
    """The least processor time of a call."""
    times = []
    for _ in range(rounds):
        started = time.process_time()
        call()
        times.append(time.process_time() - started)
    return min(times)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--json", type=Path, help="also write the record here")
    args = parser.parse_args()
    random = np.random.default_rng(0)
    payload, raw = random.bytes(PAYLOAD_BYTES), random.bytes(NUM_BLOCKS * 4 * BLOCK_SIZE)
    record = {
        "payload_bytes": PAYLOAD_BYTES,
        "payload_gb_per_s": {
            name: round(PAYLOAD_BYTES / least_s(lambda call=call: call(payload), args.rounds) / 1e9, 2)  # type: ignore[misc]
            for name, call in payload_functions().items()
        },
        "num_blocks": NUM_BLOCKS,
        "names_ms": {name: round(1000 * least_s(call, args.rounds), 2) for name, call in name_functions(raw).items()},
    }
    sys.stdout.write(json.dumps(record, indent=1) + "\n")
    if args.json:
        compiler = ["llvmlite"] if find_spec("llvmlite") else []
        write(args.json, record, "cryptography", "xxhash", *compiler)
    return 0


if __name__ == "__main__":
    sys.exit(main())
