"""The deployment's secrets, by generation, and what is made from them. Never logged, never sent.

The first secret names and seals what is written; older ones find what was written under them (docs/FORMAT.md, "Names").
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, TypeVar

from antefix.block import USER_SEPARATOR, tenant_key
from antefix.errors import ConfigError, InvalidRequest
from antefix.private_file import create_private, read_private

K = TypeVar("K")
SECRET_BYTES: Final = 32
TENANT_BYTES: Final = 16
USER_BYTES: Final = 8
# Tenant and user digest together.
OWNER_BYTES: Final = TENANT_BYTES + USER_BYTES
GENERATION_MAX: Final = 0xFFFF
_NUM_GENERATIONS_MAX: Final = 16


class Keyring:
    """Keys and digests of tenants, derived once each.

    All roles of a deployment must have the same current secret, or nothing ever hits. What is made of a tenant's name
    takes the generation of the secret, and the current one where none is given.
    """

    # Tenants are few next to requests, but names come from callers: what is kept of them is bounded.
    _NUM_CACHED_MAX = 4096

    def __init__(self, secret: bytes, *, generation: int = 1, older: Mapping[int, bytes] | None = None) -> None:
        """older: secrets that are still read with, by generation.

        Raises:  InvalidRequest: a secret has not 16 to 64 bytes, or a generation is no number from 1 to 65,535.
        """
        self._secrets = {generation: secret, **(older or {})}
        self.generation = generation
        self.generations = tuple(self._secrets)
        self._keys: dict[tuple[str, int], bytes] = {}
        self._owners: dict[tuple[str, int], bytes] = {}
        self._seal_keys: dict[tuple[bytes, int], bytes] = {}
        if older and generation in older:
            raise InvalidRequest(f"two secrets have generation {generation}")
        for number, each in self._secrets.items():
            if not 1 <= number <= GENERATION_MAX:
                raise InvalidRequest(f"a secret's generation must be from 1 to {GENERATION_MAX}, is {number}")
            tenant_key(each, "")  # refuses a bad secret now, not at the first request

    def key(self, tenant: str, generation: int = 0) -> bytes:
        """What the tenant's block hashes are made with."""
        number = generation or self.generation
        return _kept(self._keys, (tenant, number), lambda: tenant_key(self._secrets[number], tenant))

    def owner(self, tenant: str, generation: int = 0) -> bytes:
        """What stands for the tenant in records: its digest, and that of its user or zeros."""
        number = generation or self.generation
        return _kept(self._owners, (tenant, number), lambda: _owner(self._secrets[number], tenant))

    def seal_key(self, owner: bytes, generation: int) -> bytes | None:
        """What the owner's records are sealed with; None where this deployment has no such secret (any more)."""
        secret = self._secrets.get(generation)
        if secret is None:
            return None
        return _kept(self._seal_keys, (owner, generation), lambda: _seal_key(secret, owner))

    def events_key(self, generation: int = 0) -> bytes:
        """What events through Redis are signed with. The secret cannot be had from it."""
        secret = self._secrets[generation or self.generation]
        return hashlib.blake2b(digest_size=32, key=secret, person=b"antefix-events").digest()

    def proof(self, *parts: bytes, generation: int = 0) -> bytes:
        """32 bytes over these parts that anyone who has the secret can make, and nobody else."""
        secret = self._secrets[generation or self.generation]
        state = hashlib.blake2b(digest_size=32, key=secret, person=b"antefix-service")
        for part in parts:
            # Length first: without it ("ab", "c") and ("a", "bc") would have one proof.
            state.update(len(part).to_bytes(4, "little"))
            state.update(part)
        return state.digest()

    def proves(self, proof: bytes, *parts: bytes) -> bool:
        """Whether it was made over these parts with one of the secrets: while they rotate, some use the older one."""
        made = (self.proof(*parts, generation=number) for number in self.generations)
        return any(hmac.compare_digest(each, proof) for each in made)

    @classmethod
    def from_file(cls, path: str | Path) -> Keyring:
        """A secret in hex a line, behind its generation unless that is 1; the first line is the current one.

        Raises:  ConfigError: the file cannot be read, is open to others, or has no hex secrets of 16 to 64 bytes.
        """
        numbered = read_generations(path)
        try:
            return cls(numbered[0][1], generation=numbered[0][0], older=dict(numbered[1:]))
        except InvalidRequest as err:
            raise ConfigError(f"secret file {path}: {err}") from None


def read_generations(path: str | Path, what: str = "secret file") -> list[tuple[int, bytes]]:
    """The lines of a file of secrets: generation and secret, the current one first.

    Raises:  ConfigError: it cannot be read, is open to others, or has another form. The message never holds a secret.
    """
    lines = [line.split() for line in read_private(path, what).splitlines() if line.strip()]
    if not lines:
        raise ConfigError(f"{what} {path} is empty: put its backup there, or remove it if nothing was stored yet")
    if not 1 <= len(lines) <= _NUM_GENERATIONS_MAX or any(len(words) > 2 for words in lines):
        raise ConfigError(f"{what} {path}: one to {_NUM_GENERATIONS_MAX} lines of [GENERATION] HEX")
    try:
        numbered = [(int(words[0]) if len(words) == 2 else 1, bytes.fromhex(words[-1])) for words in lines]
    except ValueError:
        raise ConfigError(f"{what} {path}: a line is not [GENERATION] HEX") from None
    if len({number for number, _ in numbered}) < len(numbered):
        raise ConfigError(f"{what} {path}: each line needs a generation of its own")
    return numbered


def _kept(cache: dict[K, bytes], name: K, make: Callable[[], bytes]) -> bytes:
    found = cache.get(name)
    if found is None:
        if len(cache) >= Keyring._NUM_CACHED_MAX:
            cache.clear()
        found = cache[name] = make()
    return found


def _owner(secret: bytes, tenant: str) -> bytes:
    name, _, user = tenant.partition(USER_SEPARATOR)
    account = hashlib.blake2b(name.encode(), digest_size=TENANT_BYTES, key=secret, person=b"antefix-owner").digest()
    if not user:
        return account + bytes(USER_BYTES)
    # Length first, as everywhere.
    both = len(name.encode()).to_bytes(4, "little") + name.encode() + user.encode()
    return account + hashlib.blake2b(both, digest_size=USER_BYTES, key=secret, person=b"antefix-user").digest()


def _seal_key(secret: bytes, owner: bytes) -> bytes:
    return hashlib.blake2b(owner, digest_size=32, key=secret, person=b"antefix-seal").digest()


def create_secret_file(path: Path) -> Path:
    """Make the file if it is not there, readable by its owner only. Losing it loses every stored block."""
    create_private(path, secrets.token_bytes(SECRET_BYTES).hex() + "\n")
    return path
