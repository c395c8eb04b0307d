"""Signs thinking that is sent to clients, so that it is recognised when it comes back. For clients that can only send
it back encrypted, the thinking is encrypted.

Anthropic's clients resend a thinking block with its signature. Some clients of OpenAI's Responses API resend only
`encrypted_content`. The keys are derived from the deployment's secret and the tenant, so they are the same at all
routers and differ between tenants.
"""

from __future__ import annotations

import base64
import contextlib
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
    """One tenant's signatures. New signatures are made with the current secret. While secrets are rotated, signatures
    made with the older secret are still accepted.
    """

    def __init__(self, keyring: Keyring, tenant: str) -> None:
        self._keyring = keyring
        self._tenant = tenant.encode()

    def sign(self, text: str) -> str:
        return self._signed(text, self._keyring.generation)

    def is_ours(self, text: str, signature: str) -> bool:
        """Whether exactly this text was signed for this tenant by this deployment."""
        made = (self._signed(text, generation) for generation in self._keyring.generations)
        return any(hmac.compare_digest(signature.encode("utf-8", "surrogatepass"), each.encode()) for each in made)

    def seal(self, text: str) -> str:
        """The encrypted text, which no other party can read or change."""
        nonce = os.urandom(_NONCE_BYTES)
        sealed = self._cipher(self._keyring.generation).encrypt(nonce, _bytes(text), _VERSION)
        return _encoded(_VERSION + nonce + sealed)

    def open(self, sealed: str) -> str | None:
        """The decrypted text; None if the text was not encrypted by this deployment for this tenant."""
        try:
            raw = base64.b64decode(sealed, validate=True)
        except ValueError:
            return None
        nonce, rest = raw[1 : 1 + _NONCE_BYTES], raw[1 + _NONCE_BYTES :]
        for generation in self._keyring.generations:
            with contextlib.suppress(ValueError, InvalidTag):
                return self._cipher(generation).decrypt(nonce, rest, raw[:1]).decode("utf-8", "surrogatepass")
        return None

    def _signed(self, text: str, generation: int) -> str:
        key = self._keyring.proof(b"thinking-signature", self._tenant, generation=generation)
        return _encoded(_VERSION + hmac.digest(key, _bytes(text), hashlib.sha256))

    def _cipher(self, generation: int) -> AESGCM:
        return AESGCM(self._keyring.proof(b"thinking-seal", self._tenant, generation=generation))


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _encoded(raw: bytes) -> str:
    return base64.b64encode(raw).decode()
