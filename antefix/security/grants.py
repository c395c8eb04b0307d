"""Grants are a router's signed permissions for a worker to act for a tenant for a short time. Without a grant, the
store refuses calls for a tenant.

    offset  size       field
    0       1          version, 1
    1       8          key: first bytes of the SHA-256 of the public key that verifies the signature
    9       8          expires, Unix time in ms, u64
    17      32         prompt: proof over the prompt's first 128 tokens (`prompt_root`)
    49      1          num_owners, at least 1
    50      24 each    owners: the tenant as owner in the store, under each of the deployment's secrets
    ...     64         Ed25519 signature of all bytes before it

Little-endian. A grant is sent in a call's metadata; a task that serves the call sends it on with its own calls. No
router calls an engine, so an engine has a long-lived grant for its tenant (`antefix certs grant`).
"""

from __future__ import annotations

import hashlib
import struct
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from antefix.block import TokenArray
from antefix.errors import ConfigError, PermissionDenied
from antefix.secret import OWNER_BYTES, Keyring

GRANT_KEY: Final = "antefix-grant-bin"
VERSION: Final = 1
# The clocks of a deployment differ by less than this. `antefix doctor` measures the differences.
SKEW_S: Final = 30.0
# How many tokens of a prompt a grant is bound to: one block of V4.
ROOT_TOKENS: Final = 128
_HEAD: Final = struct.Struct("<B8sQ32sB")
_SIGNATURE_BYTES: Final = 64
_KEY_NAME_BYTES: Final = 8
# How many verified grants are cached. Verifying a signature takes 100 times as long as finding it in the cache.
_NUM_KNOWN_MAX: Final = 4096

_held: ContextVar[bytes] = ContextVar("antefix_grant", default=b"")


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """owners: whose records may be read, written, pinned and evicted.  prompt: the request's `prompt_root`."""

    owners: tuple[bytes, ...]
    prompt: bytes
    expires_ms: int

    def check_owner(self, owner: bytes) -> None:
        """Raises:  PermissionDenied: the grant is for another tenant."""
        if owner not in self.owners:
            raise PermissionDenied("the grant (permission to use the store) is for another tenant")


def hold(grant: bytes) -> None:
    """Send this grant with all calls of this task and of tasks that it starts from now on; empty: no grant."""
    _held.set(grant)


def held() -> bytes:
    """The grant that this task sends with its calls."""
    return _held.get()


def owners_of(keyring: Keyring, tenant: str) -> list[bytes]:
    """The tenant as owner in the store, under each of the deployment's secrets."""
    return [keyring.owner(tenant, number) for number in keyring.generations]


def prompt_root(keyring: Keyring, tokens: TokenArray) -> bytes:
    """A MAC over the prompt's beginning that binds a grant to it. Only processes that have the secret can compute this
    MAC.
    """
    return keyring.proof(*_root_parts(tokens))


def fits_prompt(keyring: Keyring, grant: Grant, tokens: TokenArray) -> bool:
    """Whether the grant is for this prompt, under any of the deployment's secrets."""
    return keyring.proves(grant.prompt, *_root_parts(tokens))


def _root_parts(tokens: TokenArray) -> tuple[bytes, bytes]:
    return b"prompt-root", np.ascontiguousarray(tokens[:ROOT_TOKENS], "<u4").tobytes()


class Granter:
    """Signs grants. Only routers and operators' tools have a key that signs grants."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self._name = key_name(key.public_key())

    @classmethod
    def from_pem(cls, pem: bytes) -> Granter:
        """Raises:  ConfigError: it is not an Ed25519 key."""
        try:
            key = serialization.load_pem_private_key(pem, None)
        except ValueError as err:
            raise ConfigError(f"grant.key: {err}") from err
        if not isinstance(key, Ed25519PrivateKey):
            raise ConfigError("grant.key must be an Ed25519 key, as `antefix certs init` makes it")
        return cls(key)

    @classmethod
    def from_secret(cls, keyring: Keyring) -> Granter:
        """A granter whose key is derived from the deployment's secret, for one host without certificates."""
        return cls(_secret_key(keyring, keyring.generation))

    def sign(self, grant: Grant) -> bytes:
        body = _HEAD.pack(VERSION, self._name, grant.expires_ms, grant.prompt, len(grant.owners))
        body += b"".join(grant.owners)
        return body + self._key.sign(body)

    def grant(self, owners: Sequence[bytes], prompt: bytes, *, ttl_s: float) -> bytes:
        """A signed grant that is valid from now on for `ttl_s` seconds."""
        expires_ms = round(1000 * (time.time() + ttl_s + SKEW_S))
        return self.sign(Grant(owners=tuple(owners), prompt=prompt, expires_ms=expires_ms))

    def grant_for(self, keyring: Keyring, tenant: str, tokens: TokenArray, *, ttl_s: float) -> bytes:
        """A signed grant for a tenant's prompt. The grant covers records named under any of the deployment's
        secrets.
        """
        return self.grant(owners_of(keyring, tenant), prompt_root(keyring, tokens), ttl_s=ttl_s)

    def lasting_grant(self, keyring: Keyring, tenant: str, *, ttl_s: float) -> bytes:
        """A grant for an engine that keeps its KV in the store. The grant names no prompt, so no worker accepts it."""
        return self.grant(owners_of(keyring, tenant), keyring.proof(b"no-prompt"), ttl_s=ttl_s)


class GrantCheck:
    """Checks grants against the public keys of the processes that may sign them."""

    def __init__(self, keys: Callable[[], Sequence[Ed25519PublicKey]]) -> None:
        """keys: a function that returns the public keys; called at each check. `keys` must return the same object while
        they do not change.
        """
        self._keys = keys
        self._known_with: Sequence[Ed25519PublicKey] = ()
        self._known: OrderedDict[bytes, Grant] = OrderedDict()

    def check(self, signed: bytes) -> Grant:
        """Raises:  PermissionDenied: there is no grant, no permitted key signed it, or it has expired."""
        if not signed:
            raise PermissionDenied("this call needs a grant that a router signed, and was made without one")
        keys = self._keys()
        if keys is not self._known_with:
            # Grants signed with a removed key are no longer valid.
            self._known.clear()
            self._known_with = keys
        grant = self._known.get(signed)
        if grant is None:
            grant = _verify(signed, keys)
            if len(self._known) >= _NUM_KNOWN_MAX:
                self._known.popitem(last=False)
            self._known[signed] = grant
        late_s = time.time() - grant.expires_ms / 1000
        if late_s > 0:
            raise PermissionDenied(f"the grant has expired {late_s:.0f} s ago, or the clocks of the two hosts differ")
        return grant


def unchecked(signed: bytes) -> Grant:
    """The contents of a grant, without checking its signature.  Raises:  PermissionDenied: the text is not a grant."""
    return _parse(signed)[1]


def _parse(signed: bytes) -> tuple[bytes, Grant]:
    """The name of the key that verifies the grant, and the grant's contents."""
    body = signed[:-_SIGNATURE_BYTES]
    try:
        version, name, expires_ms, prompt, num_owners = _HEAD.unpack_from(body)
        rows = body[_HEAD.size :]
        if version != VERSION or not num_owners or len(rows) != num_owners * OWNER_BYTES:
            raise ValueError("not of version 1")
    except (struct.error, ValueError) as err:
        raise PermissionDenied(f"the grant is malformed: {err}") from err
    owners = tuple(rows[at : at + OWNER_BYTES] for at in range(0, len(rows), OWNER_BYTES))
    return name, Grant(owners=owners, prompt=prompt, expires_ms=expires_ms)


def _verify(signed: bytes, keys: Sequence[Ed25519PublicKey]) -> Grant:
    name, grant = _parse(signed)
    body, signature = signed[:-_SIGNATURE_BYTES], signed[-_SIGNATURE_BYTES:]
    for key in keys:
        if key_name(key) != name:
            continue
        try:
            key.verify(signature, body)
        except InvalidSignature:
            break
        return grant
    raise PermissionDenied("the grant was not signed by a router of this deployment")


def key_name(key: Ed25519PublicKey) -> bytes:
    """The short name by which a grant refers to a key."""
    raw = key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return hashlib.sha256(raw).digest()[:_KEY_NAME_BYTES]


def public_keys(pem: bytes) -> tuple[Ed25519PublicKey, ...]:
    """The keys in a file of PEM blocks, such as grant.pub.

    Raises:  ConfigError: one of the keys is not an Ed25519 key.
    """
    end = b"-----END PUBLIC KEY-----"
    found = []
    for block in pem.split(end)[:-1]:
        try:
            key = serialization.load_pem_public_key(block.strip() + b"\n" + end + b"\n")
        except ValueError as err:
            raise ConfigError(f"grant.pub: {err}") from err
        if not isinstance(key, Ed25519PublicKey):
            raise ConfigError("grant.pub must hold Ed25519 keys, as `antefix certs init` makes them")
        found.append(key)
    return tuple(found)


def secret_keys(keyring: Keyring) -> tuple[Ed25519PublicKey, ...]:
    """The public keys for grants that were signed with the deployment's secrets."""
    return tuple(_secret_key(keyring, number).public_key() for number in keyring.generations)


def _secret_key(keyring: Keyring, generation: int) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(keyring.proof(b"grant-key", generation=generation))
