"""Thinking that leaves the house: signed, so that it is known when it comes back, or sealed, so that it can come back.

Anthropic's clients resend a thinking block with its signature. Some clients of OpenAI's Responses resend no thinking
but only `encrypted_content`. Keys come from the deployment's secret and the tenant: all routers agree, tenants do not.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from antefix.secret import Keyring

_VERSION: Final = b"\x01"
_NONCE_BYTES: Final = 12


class Signatures:
    """One tenant's."""

    def __init__(self, keyring: Keyring, tenant: str) -> None:
        self._key = keyring.proof(b"thinking-signature", tenant.encode())
        self._seal = AESGCM(keyring.proof(b"thinking-seal", tenant.encode()))

    def sign(self, text: str) -> str:
        return _encoded(_VERSION + self._proof(text))

    def is_ours(self, text: str, signature: str) -> bool:
        """Whether this very text was signed for this tenant by this deployment."""
        return hmac.compare_digest(signature.encode(), self.sign(text).encode())

    def seal(self, text: str) -> str:
        """The text itself, for nobody else to read or to change."""
        nonce = os.urandom(_NONCE_BYTES)
        return _encoded(_VERSION + nonce + self._seal.encrypt(nonce, _bytes(text), _VERSION))

    def open(self, sealed: str) -> str | None:
        """What was sealed, or None where it was not sealed here."""
        try:
            raw = base64.b64decode(sealed, validate=True)
            nonce, rest = raw[1 : 1 + _NONCE_BYTES], raw[1 + _NONCE_BYTES :]
            return self._seal.decrypt(nonce, rest, raw[:1]).decode()
        except (ValueError, InvalidTag):
            return None

    def _proof(self, text: str) -> bytes:
        return hmac.digest(self._key, _bytes(text), hashlib.sha256)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _encoded(raw: bytes) -> str:
    return base64.b64encode(raw).decode()
