"""Names of version 1, used to find records in stores of that version. New records never get such names."""

from __future__ import annotations

import hashlib

from antefix.block import CPU_FLOAT32, HASH_BYTES, Fingerprint


def digest_v1(fingerprint: Fingerprint) -> bytes:
    """The digest that version 1 of the naming scheme computed from the fields that it had. Fields that version 1 did
    not have must hold the value that version 1 implied.

    Version 1 of the names put the arithmetic into the field `exactness`, unless it was a CPU in float32. Chains, tenant
    keys and block hashes of version 1 are made as in version 2.
    """
    exactness = fingerprint.exactness
    if fingerprint.arithmetic != CPU_FLOAT32:
        exactness = f"{exactness}-{fingerprint.arithmetic}"
    state = hashlib.blake2b(digest_size=HASH_BYTES, person=b"antefix-fingerpr")
    for part in (
        fingerprint.weights_revision.encode(),
        fingerprint.geometry.digest(),
        str(fingerprint.kv_format).encode(),
        b"1",
        fingerprint.tokenizer.encode(),
        exactness.encode(),
        fingerprint.namespace.encode(),
    ):
        # Each part's length comes first: without it ("ab", "c") and ("a", "bc") would share a name.
        state.update(len(part).to_bytes(4, "little"))
        state.update(part)
    return state.digest()
