"""Events through Redis are signed: without the deployment's secret, a writer tells routers nothing.

They have a key of their own, derived from each generation of the secret: the store, which must not have the secret,
gets only that (`antefix secret events-key`). An entry is stamped when it is sent, so an old one that is told again
counts no more.

Any process of the deployment has that key. So an entry is signed with its source's epoch, too, which never is in Redis:
there it has a public name. Routers learn the epoch from the source itself, with a snapshot, over a connection to the
process that they mean; from then on nobody else can speak for it.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections import Counter
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from antefix.errors import ConfigError
from antefix.registration import AGE_S_MAX
from antefix.secret import Keyring, read_generations

MAC_BYTES: Final = 16
_AGE_NS_MAX: Final = int(AGE_S_MAX * 1e9)
# Entries of ours have no other fields; `g` and `m` are generation and MAC, `v` the MAC with the epoch.
_SIGNED: Final = ("a", "e", "n", "k", "b", "f", "s")
# Sources come and go with their ports; a name's stamp is forgotten long after it.
_NUM_SOURCES_MAX: Final = 4096


class DropReason(StrEnum):
    """Why an entry was dropped, as metrics name it."""

    FORGED = "forged"
    REPLAYED = "replayed"
    MALFORMED = "malformed"


class EventKeys:
    """Signs with the key of the current generation, checks with each. Immutable."""

    def __init__(self, keys: Mapping[int, bytes], *, generation: int) -> None:
        self._keys = dict(keys)
        self._generation = generation

    @classmethod
    def of(cls, keyring: Keyring) -> EventKeys:
        keys = {number: keyring.events_key(number) for number in keyring.generations}
        return cls(keys, generation=keyring.generation)

    @classmethod
    def from_file(cls, path: str | Path) -> EventKeys:
        """As `antefix secret events-key` writes it: the form of a secret file.  Raises:  ConfigError: see there."""
        numbered = read_generations(path, "events_key_file")
        for _, key in numbered:
            if not 16 <= len(key) <= hashlib.blake2b.MAX_KEY_SIZE:
                raise ConfigError(f"events_key_file {path}: a key must have 16 to 64 bytes, has {len(key)}")
        return cls(dict(numbered), generation=numbered[0][0])

    def lines(self) -> str:
        """What `from_file` reads."""
        rest = [number for number in self._keys if number != self._generation]
        return "".join(f"{number} {self._keys[number].hex()}\n" for number in (self._generation, *rest))

    def sign(self, stream: str, fields: Mapping[str, Any], *, epoch: bytes) -> dict[str, Any]:
        """The fields with the epoch's public name, generation and MACs."""
        fields = {**fields, "e": public_epoch(epoch)}
        raw = {name.encode(): _bytes(value) for name, value in fields.items()}
        mac = _mac(self._keys[self._generation], stream, raw)
        return {**fields, "g": self._generation, "m": mac, "v": _mac(epoch, stream, raw)}

    def holds(self, stream: str, fields: Mapping[bytes, bytes]) -> bool:
        """Whether someone with a key of this deployment said this, in this stream."""
        try:
            key = self._keys.get(int(fields[b"g"]))
            return key is not None and hmac.compare_digest(_mac(key, stream, fields), fields[b"m"])
        except (KeyError, ValueError):
            return False


def public_epoch(epoch: bytes) -> bytes:
    """What an epoch is called where all can read it."""
    return hashlib.blake2b(epoch, digest_size=16, person=b"antefix-epoch").digest()


class EventCheck:
    """What a reader lets in. dropped: what it did not, by reason."""

    def __init__(self, keys: EventKeys) -> None:
        self._keys = keys
        self._stamps: dict[bytes, int] = {}
        self.dropped: Counter[DropReason] = Counter()

    def lets_in(self, stream: str, fields: Mapping[bytes, bytes]) -> bool:
        """Whether it is ours, and newer than what its source said before."""
        if not self._keys.holds(stream, fields):
            return self.drop(DropReason.FORGED)
        source, stamp = fields[b"a"], int(fields[b"s"])
        if stamp <= self._stamps.get(source, 0) or abs(time.time_ns() - stamp) > _AGE_NS_MAX:
            return self.drop(DropReason.REPLAYED)
        if len(self._stamps) >= _NUM_SOURCES_MAX:
            self._stamps.clear()
        self._stamps[source] = stamp
        return True

    def is_of(self, epoch: bytes, stream: str, fields: Mapping[bytes, bytes]) -> bool:
        """Whether the process of this epoch said it itself."""
        if fields[b"e"] == public_epoch(epoch) and hmac.compare_digest(
            _mac(epoch, stream, fields), fields.get(b"v", b"")
        ):
            return True
        return self.drop(DropReason.FORGED)

    def drop(self, why: DropReason) -> bool:
        self.dropped[why] += 1
        return False


class Stamps:
    """Of one source: the time in ns, and always more than the last one."""

    def __init__(self) -> None:
        self._last = 0

    def next(self) -> int:
        self._last = max(self._last + 1, time.time_ns())
        return self._last


def _mac(key: bytes, stream: str, fields: Mapping[bytes, bytes]) -> bytes:
    state = hashlib.blake2b(digest_size=MAC_BYTES, key=key, person=b"antefix-event")
    for part in (stream.encode(), *(fields.get(name.encode(), b"") for name in _SIGNED)):
        state.update(len(part).to_bytes(4, "little"))
        state.update(part)
    return state.digest()


def _bytes(value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()
