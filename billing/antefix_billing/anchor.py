"""Anchors: signed copies of the ledger's head (its last entry), kept outside the ledger.

Anchors reveal a ledger that was cut, replaced or rewritten. The ledger's hash chain shows that nothing inside it was
changed. Only a copy kept elsewhere can show that the ledger's end was cut off, that an older copy was put back, or that
the whole ledger was written again: the anchored entry is then missing or different.

An anchor is kept in one of these places:

    file       a file, one JSON object per line, appended and synced
    file://    a directory used as an object store: one object per anchor, antefix-anchors/SOURCE/SEQUENCE.json
    s3://      an object store with the same names; gs:// and az:// as well
    receipt    a customer's receipt for one request states its place in the ledger, so it also serves as an anchor
"""

from __future__ import annotations

import asyncio
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from antefix.checked_files import parse_json, read_text
from antefix.errors import AntefixError, ConfigError, InvalidRequest
from antefix.objects.bucket import CLOUD_SCHEMES, Bucket, StoredObject, open_bucket
from antefix.private_file import write_private
from antefix.split_url import split_url
from antefix_billing.ledger_files import sync_directory
from antefix_billing.places import with_bucket
from antefix_billing.receipt import Signer, signed_of_receipt

_DOMAIN: Final = b"antefix-anchor\0"
_FOLDER: Final = "antefix-anchors"
_FILE: Final = "file"
_NUM_NEWEST: Final = 1000
_NUM_READS: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Anchor:
    """Evidence that one entry was in one ledger at `time_us`.  key_id, signature: hex.  is_receipt: the anchor is a
    customer's receipt.
    """

    source: bytes
    sequence: int
    hash: bytes
    time_us: int
    key_id: str
    signature: bytes
    is_receipt: bool = False

    def to_json(self) -> str:
        values = {
            "source": self.source.hex(),
            "sequence": self.sequence,
            "hash": self.hash.hex(),
            "time_us": self.time_us,
            "key_id": self.key_id,
            "signature": self.signature.hex(),
        }
        return json.dumps(values, separators=(",", ":"))

    @classmethod
    def from_dict(cls, values: Any, what: str) -> Anchor:
        """Read the text of an anchor or a receipt.  Raises:  InvalidRequest: the values are neither."""
        try:
            is_receipt = "payload" in values
            return cls(
                source=bytes.fromhex(values["source"]),
                sequence=int(values["sequence"]),
                hash=bytes.fromhex(values["hash"]),
                time_us=0 if is_receipt else int(values["time_us"]),
                key_id=str(values["key_id"]),
                signature=bytes.fromhex(values["signature"]),
                is_receipt=is_receipt,
            )
        except (KeyError, TypeError, ValueError) as err:
            raise InvalidRequest(f"{what} is neither an anchor of a ledger nor a receipt: {err}") from err

    def is_signed_by(self, public_keys: Iterable[bytes]) -> bool:
        signed = (
            signed_of_receipt(self.source, self.sequence, self.hash)
            if self.is_receipt
            else _signed(self.source, self.sequence, self.hash, self.time_us)
        )
        for key in public_keys:
            try:
                Ed25519PublicKey.from_public_bytes(key).verify(self.signature, signed)
            except (InvalidSignature, ValueError):
                continue
            return True
        return False


def make_anchor(signer: Signer, *, source: bytes, sequence: int, hash: bytes, time_us: int) -> Anchor:
    return Anchor(
        source=source,
        sequence=sequence,
        hash=hash,
        time_us=time_us,
        key_id=signer.key_id,
        signature=signer.sign(_signed(source, sequence, hash, time_us)),
    )


def check_place(place: str) -> None:
    """Check a place for anchors. Raises: ConfigError: the place is neither a path nor a supported URL, or the library
    for it is not installed.
    """
    scheme = split_url(place).scheme
    if scheme in CLOUD_SCHEMES:
        open_bucket(place)
    elif scheme not in ("", _FILE) or not place:
        raise ConfigError(
            "an anchor (a signed hash of the ledger) is written to a file, to file://DIRECTORY or to an object "
            f"store, not to {place!r}"
        )


def write_anchor(anchor: Anchor, place: str) -> None:
    """Write one anchor (a signed hash of the ledger); it is durable when this returns. This call blocks, so it must not
    be made in an event loop.

    place: a place that `check_place` accepts.  Raises:  OSError, Unavailable.
    """
    name = f"{anchor.sequence:020d}.json"
    if split_url(place).scheme in CLOUD_SCHEMES:
        object_name = f"{_FOLDER}/{anchor.source.hex()}/{name}"
        with_bucket(place, lambda bucket: bucket.put(object_name, [anchor.to_json().encode() + b"\n"]))
        return
    directory = _directory_of(place)
    if directory is None:
        path = Path(place)
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, anchor.to_json().encode() + b"\n")
            os.fsync(fd)
        finally:
            os.close(fd)
        return
    folder = directory / _FOLDER / anchor.source.hex()
    folder.mkdir(parents=True, exist_ok=True)
    write_private(folder / name, anchor.to_json() + "\n")
    sync_directory(folder)


def read_anchors(places: Sequence[str]) -> list[Anchor]:
    """Read anchors from files, from directories of files (receipts count too), and from file:// and other object
    stores.

    Raises:  ConfigError: a place does not exist, or holds something else.  Unavailable: an object store does not
    answer.
    """
    return [anchor for place in places for anchor in _anchors_of(place)]


def _anchors_of(place: str) -> list[Anchor]:
    check_place(place)
    if split_url(place).scheme in CLOUD_SCHEMES:
        texts = with_bucket(place, _texts_of_bucket)
        return [anchor for name, text in texts for anchor in _of_text(text, f"{place}/{name}")]
    root = _directory_of(place) or Path(place)
    paths = sorted(root.rglob("*.json")) if root.is_dir() else [root]
    return [anchor for path in paths for anchor in _of_text(read_text(path, "anchors"), str(path))]


async def _texts_of_bucket(bucket: Bucket) -> list[tuple[str, str]]:
    """Name and text of the bucket's anchors, or of a sample of them. Years of anchors are many objects, and each costs
    one call to read.
    """
    by_source: defaultdict[str, list[StoredObject]] = defaultdict(list)
    for each in await bucket.list_objects(f"{_FOLDER}/"):
        by_source[each.name.rpartition("/")[0]].append(each)
    chosen = [each for found in by_source.values() for each in _enough(found)]
    texts: list[tuple[str, str]] = []
    for first in range(0, len(chosen), _NUM_READS):
        part = chosen[first : first + _NUM_READS]
        data = await asyncio.gather(*(bucket.read(each.name, 0, each.nbytes) for each in part))
        texts += [(each.name, bytes(found).decode(errors="replace")) for each, found in zip(part, data, strict=True)]
    return texts


def _enough(found: list[StoredObject]) -> list[StoredObject]:
    """Choose anchors of one ledger, whose names sort by sequence number: the newest ones, and as many of the older
    ones, evenly spaced.
    """
    older, newest = found[:-_NUM_NEWEST], found[-_NUM_NEWEST:]
    return older[:: max(1, len(older) // _NUM_NEWEST)] + newest


def _of_text(text: str, where: str) -> list[Anchor]:
    try:
        whole = json.loads(text)
        rows = whole if isinstance(whole, list) else [whole]
    except ValueError:
        # Each line is one anchor. The last line may be incomplete, since the process may die while it writes.
        lines = text.split("\n")
        rows = [parse_json(line.encode(), f"anchors {where}") for line in lines[:-1] if line.strip()]
    try:
        return [Anchor.from_dict(row, f"anchors {where}") for row in rows]
    except AntefixError as err:
        raise ConfigError(str(err)) from err


def _directory_of(place: str) -> Path | None:
    parts = split_url(place)
    return Path(unquote(parts.netloc + parts.path)) if parts.scheme == _FILE else None


def _signed(source: bytes, sequence: int, hash: bytes, time_us: int) -> bytes:
    return _DOMAIN + source + sequence.to_bytes(8, "little") + hash + time_us.to_bytes(8, "little")
