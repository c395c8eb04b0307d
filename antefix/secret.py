"""The deployment's secrets, by generation, and the keys derived from them. The secrets are never logged and never sent.

New records are named and sealed with the first secret. Older secrets find the records that were written with them
(docs/FORMAT.md, "Names").
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
# A tenant's digest and a user's digest together.
OWNER_BYTES: Final = TENANT_BYTES + USER_BYTES
GENERATION_MAX: Final = 0xFFFF
_NUM_GENERATIONS_MAX: Final = 16


class Keyring:
    """Keys and digests of tenants, derived once each.

    All roles of a deployment must have the same current secret, or no request ever hits. Methods take the generation
    number of the secret to use; 0 means the current secret.
    """

    # Tenants are few compared with requests, but their names come from callers, so the caches are bounded.
    _NUM_CACHED_MAX = 4096

    def __init__(self, secret: bytes, *, generation: int = 1, older: Mapping[int, bytes] | None = None) -> None:
        """older: earlier secrets, by generation, whose records are still read.

        Raises:  InvalidRequest: a secret does not have 16 to 64 bytes, or a generation is not from 1 to 65,535.
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
        """The key of the tenant's block hashes."""
        number = generation or self.generation
        return _kept(self._keys, (tenant, number), lambda: tenant_key(self._secrets[number], tenant))

    def owner(self, tenant: str, generation: int = 0) -> bytes:
        """The owner as records hold it: the tenant's digest, then the user's digest or zeros."""
        number = generation or self.generation
        return _kept(self._owners, (tenant, number), lambda: _owner(self._secrets[number], tenant))

    def seal_key(self, owner: bytes, generation: int) -> bytes | None:
        """The key that seals the owner's records; None: the deployment has no secret of this generation."""
        secret = self._secrets.get(generation)
        if secret is None:
            return None
        return _kept(self._seal_keys, (owner, generation), lambda: _seal_key(secret, owner))

    def events_key(self, generation: int = 0) -> bytes:
        """The key that signs events sent through Redis. Nobody can derive the secret from the events key."""
        secret = self._secrets[generation or self.generation]
        return hashlib.blake2b(digest_size=32, key=secret, person=b"antefix-events").digest()

    def proof(self, *parts: bytes, generation: int = 0) -> bytes:
        """A MAC of 32 bytes over these parts, which only holders of the secret can compute."""
        secret = self._secrets[generation or self.generation]
        state = hashlib.blake2b(digest_size=32, key=secret, person=b"antefix-service")
        for part in parts:
            # Each part's length comes first: without it ("ab", "c") and ("a", "bc") would have the same proof.
            state.update(len(part).to_bytes(4, "little"))
            state.update(part)
        return state.digest()

    def proves(self, proof: bytes, *parts: bytes) -> bool:
        """Whether `proof` was made over these parts with any of the secrets. During a rotation of the secret, some
        processes still use the older secret.
        """
        made = (self.proof(*parts, generation=number) for number in self.generations)
        return any(hmac.compare_digest(each, proof) for each in made)

    @classmethod
    def from_file(cls, path: str | Path) -> Keyring:
        """Read a file with one secret per line: its generation (may be omitted for 1), then the secret in hex. The
        first line is the current secret.

        Raises:  ConfigError: the file cannot be read, other users may read it, or a secret is not 16 to 64 bytes in
            hex.
        """
        numbered = read_generations(path)
        try:
            return cls(numbered[0][1], generation=numbered[0][0], older=dict(numbered[1:]))
        except InvalidRequest as err:
            raise ConfigError(f"secret file {path}: {err}") from None


def read_generations(path: str | Path, what: str = "secret file") -> list[tuple[int, bytes]]:
    """The lines of a file of secrets: generation and secret, the current one first.

    Raises:  ConfigError: it cannot be read, other users may read it, or a line is malformed. The message never contains
             a secret.
    """
    lines = [line.split() for line in read_private(path, what).splitlines() if line.strip()]
    if not lines:
        raise ConfigError(f"{what} {path} is empty: restore it from a backup, or remove it if nothing was stored yet")
    if not 1 <= len(lines) <= _NUM_GENERATIONS_MAX or any(len(words) > 2 for words in lines):
        raise ConfigError(f"{what} {path}: it must have 1 to {_NUM_GENERATIONS_MAX} lines of [GENERATION] HEX")
    try:
        numbered = [(int(words[0]) if len(words) == 2 else 1, bytes.fromhex(words[-1])) for words in lines]
    except ValueError:
        raise ConfigError(f"{what} {path}: a line does not have the form [GENERATION] HEX") from None
    if len({number for number, _ in numbered}) < len(numbered):
        raise ConfigError(f"{what} {path}: each line needs a different generation number")
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
    # The name's length comes first, so that no two pairs of names give the same bytes.
    both = len(name.encode()).to_bytes(4, "little") + name.encode() + user.encode()
    return account + hashlib.blake2b(both, digest_size=USER_BYTES, key=secret, person=b"antefix-user").digest()


def _seal_key(secret: bytes, owner: bytes) -> bytes:
    return hashlib.blake2b(owner, digest_size=32, key=secret, person=b"antefix-seal").digest()


def create_secret_file(path: Path) -> Path:
    """Make the secret file if it does not exist, readable by its owner only. If the secret file is lost, every stored
    block is lost.
    """
    create_private(path, secrets.token_bytes(SECRET_BYTES).hex() + "\n")
    return path
