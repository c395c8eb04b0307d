"""Signs events that go through Redis: routers ignore entries that were written without the deployment's key.

The key that signs events is derived from each generation of the secret. The store must not have the deployment's
secret, so it gets only the events key (`antefix secret events-key`). Each entry carries the time when it was sent, so a
replayed old entry is dropped.

Every process of the deployment has the events key. So an entry is also signed with its source's epoch, a random value
that never appears in Redis, where only its hash is used as a public name. Routers get the epoch of a source together
with a snapshot, over a direct connection. From then on, no process without the epoch can forge that source's events.
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
# The fields that are signed. `g` and `m` are generation and MAC, `v` is the MAC with the epoch.
_SIGNED: Final = ("a", "e", "n", "k", "b", "f", "s")
# Sources come and go with their ports, so the oldest sources' stamps are forgotten at this number.
_NUM_SOURCES_MAX: Final = 4096


class DropReason(StrEnum):
    """Why an entry was dropped. The values of this enum are used as labels of metrics."""

    FORGED = "forged"
    REPLAYED = "replayed"
    MALFORMED = "malformed"


class EventKeys:
    """Signs events with the key of the current secret, and checks them with the keys of all generations. Immutable."""

    def __init__(self, keys: Mapping[int, bytes], *, generation: int) -> None:
        self._keys = dict(keys)
        self._generation = generation

    @classmethod
    def of(cls, keyring: Keyring) -> EventKeys:
        keys = {number: keyring.events_key(number) for number in keyring.generations}
        return cls(keys, generation=keyring.generation)

    @classmethod
    def from_file(cls, path: str | Path) -> EventKeys:
        """Read a file that `antefix secret events-key` wrote, in the form of a secret file.

        Raises:  ConfigError: as for a secret file.
        """
        numbered = read_generations(path, "events_key_file")
        for _, key in numbered:
            if not 16 <= len(key) <= hashlib.blake2b.MAX_KEY_SIZE:
                raise ConfigError(f"events_key_file {path}: a key must have 16 to 64 bytes, has {len(key)}")
        return cls(dict(numbered), generation=numbered[0][0])

    def lines(self) -> str:
        """The keys as a text that `from_file` can read."""
        rest = [number for number in self._keys if number != self._generation]
        return "".join(f"{number} {self._keys[number].hex()}\n" for number in (self._generation, *rest))

    def sign(self, stream: str, fields: Mapping[str, Any], *, epoch: bytes) -> dict[str, Any]:
        """The fields of an entry, with the epoch's public name, the secret's generation and the signatures (MACs)."""
        fields = {**fields, "e": public_epoch(epoch)}
        raw = {name.encode(): _bytes(value) for name, value in fields.items()}
        mac = _mac(self._keys[self._generation], stream, raw)
        return {**fields, "g": self._generation, "m": mac, "v": _mac(epoch, stream, raw)}

    def holds(self, stream: str, fields: Mapping[bytes, bytes]) -> bool:
        """Whether this entry was signed for this stream with a key of this deployment."""
        try:
            key = self._keys.get(int(fields[b"g"]))
            return key is not None and hmac.compare_digest(_mac(key, stream, fields), fields[b"m"])
        except (KeyError, ValueError):
            return False


def public_epoch(epoch: bytes) -> bytes:
    """The public name of an epoch, used in Redis."""
    return hashlib.blake2b(epoch, digest_size=16, person=b"antefix-epoch").digest()


class EventCheck:
    """Decides which entries a reader of Redis accepts. dropped: the number of refused entries, by reason."""

    def __init__(self, keys: EventKeys) -> None:
        self._keys = keys
        self._stamps: dict[bytes, int] = {}
        self.dropped: Counter[DropReason] = Counter()

    def lets_in(self, stream: str, fields: Mapping[bytes, bytes]) -> bool:
        """Whether the entry has a valid signature and is newer than its source's last one."""
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
        """Whether the entry was signed by the process with this epoch."""
        if fields[b"e"] == public_epoch(epoch) and hmac.compare_digest(
            _mac(epoch, stream, fields), fields.get(b"v", b"")
        ):
            return True
        return self.drop(DropReason.FORGED)

    def drop(self, why: DropReason) -> bool:
        self.dropped[why] += 1
        return False


class Stamps:
    """The time stamps of one source's entries: the time in ns, strictly increasing."""

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
