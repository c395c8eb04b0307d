"""Receipts: one settled record with its place in the ledger, signed with Ed25519. Anyone who has the public key can
check a receipt.

A receipt is a JSON object:
    payload         the ledger entry's payload, byte for byte, as text
    sequence, previous_hash, hash, source      its place; hash = chain_hash(previous_hash, sequence, SETTLE, payload)
    key_id          first 8 bytes of the public key, hex
    signature       Ed25519 over "antefix-receipt\\0" || source || sequence u64 le || hash

The signature covers the hash, the hash covers the payload: nothing in a receipt can change unnoticed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from antefix.checked_files import read_bytes
from antefix.errors import ConfigError, InvalidRequest
from antefix.private_file import create_private, write_private
from antefix_billing.ledger_files import Settled
from antefix_billing.ledger_format import EntryKind, chain_hash
from antefix_billing.pricing import priced
from antefix_billing.ratecard import RateCards
from antefix_billing.usage_record import UsageRecord

_DOMAIN = b"antefix-receipt\0"
_WAS = "was "
_KEY_FILE_BYTES_MAX = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceiptCheck:
    """The result of checking a receipt. price_ok is None if no rate cards were given."""

    record: UsageRecord
    signature_ok: bool
    hash_ok: bool
    price_ok: bool | None

    @property
    def ok(self) -> bool:
        return self.signature_ok and self.hash_ok and self.price_ok is not False


class Signer:
    """The deployment's receipt key. The public half of the key is published; the private half never leaves the router's
    host.
    """

    def __init__(self, key: Ed25519PrivateKey, older: Sequence[bytes] = (), path: Path | None = None) -> None:
        """older: public keys that were used for signing before.  path: the key file."""
        self._key = key
        self.path = path
        self.public_key = key.public_key().public_bytes_raw()
        self.older = tuple(older)

    @property
    def public_keys(self) -> tuple[bytes, ...]:
        """The current public key, then the earlier ones. Receipts that were signed with any of these keys stay
        valid.
        """
        return (self.public_key, *self.older)

    @classmethod
    def from_file(cls, path: str | Path) -> Signer:
        """Read a key file. The key file's first line is the private key, 32 bytes as hex. Each further line is "was
        PUBLIC_KEY", with an earlier public key.

        Raises:  ConfigError: the file cannot be read or has another format.
        """
        try:
            first, *rest = read_bytes(path, _KEY_FILE_BYTES_MAX).decode("ascii").split("\n")
            older = [bytes.fromhex(line.removeprefix(_WAS)) for line in rest if line.strip()]
            if any(not line.startswith(_WAS) for line in rest if line.strip()) or any(len(key) != 32 for key in older):
                raise ValueError('each line after the first key must be "was" and a public key of 64 hex digits')
            return cls(Ed25519PrivateKey.from_private_bytes(bytes.fromhex(first.strip())), older, Path(path))
        except (OSError, ValueError) as err:
            raise ConfigError(f"receipt key {path}: {err}") from err

    @classmethod
    def rotate(cls, path: Path) -> Signer:
        """Put a new key into the file, which keeps the public keys of the earlier ones.  Raises:  ConfigError."""
        before = cls.from_file(path)
        was = "".join(f"{_WAS}{key.hex()}\n" for key in before.public_keys)
        write_private(path, Ed25519PrivateKey.generate().private_bytes_raw().hex() + "\n" + was)
        return cls.from_file(path)

    @classmethod
    def create(cls, path: Path) -> Signer:
        """The key in the file. If the file does not exist, it is created, readable by its owner only."""
        create_private(path, Ed25519PrivateKey.generate().private_bytes_raw().hex() + "\n")
        return cls.from_file(path)

    @property
    def key_id(self) -> str:
        """The first 8 bytes of the public key, as hex digits."""
        return self.public_key[:8].hex()

    def sign(self, data: bytes) -> bytes:
        return self._key.sign(data)

    def receipt(self, settled: Settled, source: bytes) -> dict[str, Any]:
        return {
            "payload": settled.record.to_payload().decode(),
            "sequence": settled.sequence,
            "previous_hash": settled.previous_hash.hex(),
            "hash": settled.hash.hex(),
            "source": source.hex(),
            "key_id": self.key_id,
            "signature": self._key.sign(signed_of_receipt(source, settled.sequence, settled.hash)).hex(),
        }


def check_receipt(receipt: dict[str, Any], public_key: bytes, cards: RateCards | None = None) -> ReceiptCheck:
    """Verify a receipt with the published key. If rate cards are given, the price is recomputed as well.

    Raises:  InvalidRequest: this is not a receipt.
    """
    try:
        payload = str(receipt["payload"]).encode()
        sequence = int(receipt["sequence"])
        previous, hash, source, signature = (
            bytes.fromhex(receipt[name]) for name in ("previous_hash", "hash", "source", "signature")
        )
        key = Ed25519PublicKey.from_public_bytes(public_key)
        signed = signed_of_receipt(source, sequence, hash)
        hash_ok = chain_hash(previous, sequence, EntryKind.SETTLE, payload) == hash
    except (KeyError, ValueError, TypeError, OverflowError) as err:
        raise InvalidRequest(f"not a receipt: {err}") from err
    try:
        key.verify(signature, signed)
        signature_ok = True
    except InvalidSignature:
        signature_ok = False
    record = UsageRecord.from_payload(payload)
    price_ok = None
    if cards is not None:
        again = priced(record, cards)
        price_ok = (again.price, again.rate_card) == (record.price, record.rate_card)
    return ReceiptCheck(record=record, signature_ok=signature_ok, hash_ok=hash_ok, price_ok=price_ok)


def signed_of_receipt(source: bytes, sequence: int, hash: bytes) -> bytes:
    return _DOMAIN + source + sequence.to_bytes(8, "little") + hash
