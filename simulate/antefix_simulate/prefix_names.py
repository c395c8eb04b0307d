"""Names of a prompt's prefixes, one per unit: keyed hashes, shortened so that every JSON reader keeps them exact.

A name covers everything before it, so equal names mean equal prefixes. Without the key, nobody can test whether a trace
contains some text.
"""

from __future__ import annotations

import hashlib
from typing import Final

import numpy as np

from antefix_simulate.logs.logged_call import LoggedCall, Tokens

# JSON readers that use doubles keep 53 bits. Among ten million units, one collision occurs in about a hundred traces.
NAME_BITS: Final = 52
# A head with more tokens than any model can read is an error in the log.
_HEAD_TOKENS_MAX: Final = 1 << 22


def names_of(call: LoggedCall, *, key: bytes, unit_tokens: int, bytes_per_token: float, per_user: bool) -> list[int]:
    """Names of the complete units of a call's prompt.

    key: 16 to 64 bytes.  bytes_per_token: for text; must be the same for all calls, so that their units align.
    per_user: users share nothing, like the tenants of a deployment.
    """
    state = hashlib.blake2b(digest_size=8, key=key, person=b"antefix-trace")
    if per_user:
        user = call.user.encode(errors="replace")
        state.update(len(user).to_bytes(4, "little") + user)
    if call.tokens is not None:
        return _chain(state, _bytes_of(call.tokens), 4 * unit_tokens)
    head = b""
    if call.head_tokens:
        nbytes = round(min(call.head_tokens, _HEAD_TOKENS_MAX) * bytes_per_token)
        digest = hashlib.blake2b(call.head.encode(errors="replace"), digest_size=16).digest()
        head = (digest * (nbytes // len(digest) + 1))[:nbytes]
    return _chain(state, head + call.text, max(1, round(unit_tokens * bytes_per_token)))


def _chain(state: hashlib.blake2b, data: bytes, unit_bytes: int) -> list[int]:
    names = []
    view = memoryview(data)
    for end in range(unit_bytes, len(data) + 1, unit_bytes):
        state.update(view[end - unit_bytes : end])
        names.append(int.from_bytes(state.digest(), "little") >> (64 - NAME_BITS))
    return names


def _bytes_of(tokens: Tokens) -> bytes:
    return np.ascontiguousarray(tokens, dtype="<u4").tobytes()
