"""The deployment's secret, and the tenants' keys made from it. Never logged, never sent."""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path

from antefix.block import tenant_key
from antefix.errors import ConfigError

SECRET_BYTES = 32


class Keyring:
    """Tenant keys, derived once each. All roles of a deployment must use the same secret, or nothing ever hits."""

    # Tenants are few beside requests, but names come from callers: the cache of derived keys is bounded.
    _NUM_CACHED_MAX = 4096

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._keys: dict[str, bytes] = {}
        tenant_key(secret, "")  # refuses a bad secret now, not at the first request

    def key(self, tenant: str) -> bytes:
        found = self._keys.get(tenant)
        if found is None:
            if len(self._keys) >= self._NUM_CACHED_MAX:
                self._keys.clear()
            found = self._keys[tenant] = tenant_key(self._secret, tenant)
        return found

    def proof(self, *parts: bytes) -> bytes:
        """32 bytes over these parts that whoever has the secret can make, and nobody else."""
        state = hashlib.blake2b(digest_size=32, key=self._secret, person=b"antefix-service")
        for part in parts:
            # Length first: without it ("ab", "c") and ("a", "bc") would have one proof.
            state.update(len(part).to_bytes(4, "little"))
            state.update(part)
        return state.digest()

    @classmethod
    def from_file(cls, path: str | Path) -> Keyring:
        """Raises:  ConfigError: the file cannot be read or does not hold a hex secret of 16 to 64 bytes."""
        try:
            text = Path(path).read_text().strip()
            return cls(bytes.fromhex(text))
        except (OSError, ValueError) as err:
            raise ConfigError(f"secret file {path}: {err}") from err


def create_secret_file(path: Path) -> Path:
    """Make the file if it is not there, readable by its owner only. Losing it loses every stored block."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return path
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_bytes(SECRET_BYTES).hex() + "\n")
        file.flush()
        os.fsync(file.fileno())
    return path
