"""A directory with a process's credentials. The credential files are read again whenever they change.

    tls.crt, tls.key, ca.crt    certificate, key, and trusted CAs, with the names that cert-manager and SPIFFE use
    identities.toml             identities of other certificates (`identity_file.py`)
    grant.key, grant.pub        the key that signs grants (routers), and the keys that check them (`grants.py`)
    tenant.grant                an engine's grant for its tenant

A directory with only ca.crt is for a client without a certificate. Files that do not match each other, for example
half-written ones, are ignored: the previous files stay in use, which is logged and counted.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from antefix.errors import ConfigError, PermissionDenied
from antefix.security.certificates import (
    CA,
    CERTIFICATE,
    GRANT_KEY,
    GRANT_PUBLIC,
    KEY,
    TENANT_GRANT,
    Issued,
    describe,
)
from antefix.security.grants import Granter, public_keys, unchecked
from antefix.security.identity import named_identity
from antefix.security.identity_file import FILE as IDENTITIES
from antefix.security.identity_file import IdentityFile, load_identities

log = logging.getLogger("antefix.security")

# The shortest time between two checks of the files. A stat of each costs some microseconds.
_LOOK_EVERY_S: Final = 1.0
_FILES: Final = (CERTIFICATE, KEY, CA, IDENTITIES, GRANT_KEY, GRANT_PUBLIC, TENANT_GRANT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """The files' contents at one time.  number: counts changes.  digest: a hash of certificate, key and CAs."""

    number: int
    certificate: bytes
    key: bytes
    ca: bytes
    identities: IdentityFile
    grant_key: bytes = b""
    grant_public: bytes = b""
    tenant_grant: bytes = b""

    @property
    def has_certificate(self) -> bool:
        return bool(self.certificate)

    @property
    def names_roles(self) -> bool:
        """Whether this process's certificate has its role as a host name. If so, other processes' certificates have
        their roles too.
        """
        sans = describe(self.certificate).sans if self.certificate else ()
        return any(named_identity(san) is not None and not san.startswith("spiffe://") for san in sans)

    @property
    def digest(self) -> bytes:
        parts = (self.certificate, self.key, self.ca)
        return hashlib.blake2b(b"".join(len(part).to_bytes(4, "little") + part for part in parts)).digest()

    def issued(self) -> dict[str, Issued]:
        """Certificate and first CA, by file name."""
        files = ((CERTIFICATE, self.certificate), (CA, self.ca))
        return {name: describe(pem) for name, pem in files if pem}


class CredentialFiles:
    """One directory. Thread-safe: TLS handshakes read the files from gRPC's own threads."""

    def __init__(self, directory: Path | str) -> None:
        """Raises:  ConfigError: the files are missing or do not match each other; the message says what to do."""
        self.directory = Path(directory)
        self.num_failed = 0
        self._lock = threading.Lock()
        self._seen = self._stamps()
        self._loaded = self._load(0)
        self._looked_at = time.monotonic()

    def now(self) -> Loaded:
        """The files' contents, at most a second old."""
        if time.monotonic() - self._looked_at < _LOOK_EVERY_S:
            return self._loaded
        with self._lock:
            self._looked_at = time.monotonic()
            stamps = self._stamps()
            if stamps != self._seen:
                self._seen = stamps
                self._take_changes()
            return self._loaded

    def _take_changes(self) -> None:
        try:
            self._loaded = self._load(self._loaded.number + 1)
            log.info("changed certificates and keys in %s were read, and are in use", self.directory)
        except ConfigError as err:
            # Mostly a change that is half done. When it is finished, the files' time stamps change again.
            self.num_failed += 1
            log.warning("the new certificates and keys cannot be used, so the previous ones stay in use: %s", err)

    def _stamps(self) -> tuple[tuple[int, int, int] | None, ...]:
        return tuple(_stamp(self.directory / name) for name in _FILES)

    def _load(self, number: int) -> Loaded:
        certificate, key, ca = (self._read(name) for name in (CERTIFICATE, KEY, CA))
        if not ca:
            raise ConfigError(
                f"{self.directory / CA} is missing: the file with the CA certificates that this process trusts"
            )
        try:
            x509.load_pem_x509_certificates(ca)
            if certificate or key:
                _check_pair(certificate, key)
        except ValueError as err:
            raise ConfigError(f"{self.directory}: {err}") from err
        grant_key, grant_public = self._read(GRANT_KEY), self._read(GRANT_PUBLIC)
        if grant_key:
            Granter.from_pem(grant_key)
        public_keys(grant_public)
        tenant_grant = self._read(TENANT_GRANT)
        if tenant_grant:
            try:
                unchecked(tenant_grant)
            except PermissionDenied as err:
                raise ConfigError(f"{self.directory / TENANT_GRANT}: {err}") from err
        return Loaded(
            number=number,
            certificate=certificate,
            key=key,
            ca=ca,
            identities=load_identities(self.directory / IDENTITIES),
            grant_key=grant_key,
            grant_public=grant_public,
            tenant_grant=tenant_grant,
        )

    def _read(self, name: str) -> bytes:
        try:
            return (self.directory / name).read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as err:
            raise ConfigError(f"{self.directory / name}: {err}") from err


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _check_pair(certificate: bytes, key: bytes) -> None:
    """Raises:  ValueError: certificate or key is missing or unreadable, or they do not belong together."""
    if not certificate or not key:
        raise ValueError(
            f"{CERTIFICATE if not certificate else KEY} is missing; a certificate and its key must be in the same "
            "directory"
        )
    held = serialization.load_pem_private_key(key, None).public_key()
    named = x509.load_pem_x509_certificate(certificate).public_key()
    spki = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    if held.public_bytes(*spki) != named.public_bytes(*spki):
        raise ValueError(f"{KEY} is not the key of {CERTIFICATE}")
