"""Sets up the security of one process from its settings: guard, credentials and grants.

--credentials DIR     TLS: certificates identify processes
--secret-file FILE    without TLS, on one host: the secret proves that a process belongs to the deployment
neither               open: every process on this host may call; used by the store and in tests
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import grpc
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from prometheus_client.core import Metric

from antefix.config import setting
from antefix.errors import ConfigError
from antefix.secret import Keyring
from antefix.security import grants, own_credentials, tls
from antefix.security.credential_files import CredentialFiles
from antefix.security.credentials import Credentials
from antefix.security.grants import GrantCheck, Granter
from antefix.security.guard import Guard, TokenCheck
from antefix.security.identity import Role
from antefix.security.listening import check_calling, check_listening
from antefix.telemetry.shown import counter, gauge

log = logging.getLogger("antefix.security")

_CHECKING: Final = (Role.KVSTORE, Role.PREFILL, Role.DECODE)


def credentials_setting() -> Any:
    return setting(
        "",
        "directory with tls.crt, tls.key and ca.crt (from `antefix certs`, cert-manager or SPIFFE); the process then"
        " speaks TLS and trusts nothing but certificates. Without it, the process listens on loopback only",
        guards=True,
    )


class ProcessSecurity:
    """The guard, credentials and grants of one process. `use` makes these credentials the default of the whole
    process.
    """

    def __init__(
        self,
        role: Role,
        *,
        files: CredentialFiles | None = None,
        keyring: Keyring | None = None,
        tokens: TokenCheck = lambda *_: None,
        needs_token: Callable[[], bool] = lambda: False,
    ) -> None:
        """Raises:  ConfigError: with TLS, the keys that sign or check grants are missing."""
        self.role = role
        self.files = files
        self._keyring = keyring
        self._checked: tuple[int, Sequence[Ed25519PublicKey]] = (-1, ())
        self._of_secret = grants.secret_keys(keyring) if keyring is not None else ()
        if files is not None:
            _check_grant_files(role, files, has_keys=bool(self.grant_keys()))
        self.grant_check = GrantCheck(self.grant_keys)
        self.credentials = Credentials(role, files=files, keyring=keyring)
        self.guard = Guard(
            files=files, keyring=keyring, grant_check=self.grant_check, tokens=tokens, needs_token=needs_token
        )

    @property
    def has_tls(self) -> bool:
        return self.files is not None

    def use(self) -> None:
        """Use these credentials for this process's calls from now on, and log how the process is protected."""
        own_credentials.use(self.credentials)
        if self.files is not None:
            log.info(
                "TLS with the certificate in %s is on; callers prove who they are with certificates",
                self.files.directory,
            )
        elif self._keyring is not None:
            log.info(
                "TLS is off (no --credentials): only loopback and Unix sockets are served, and services prove that "
                "they have the deployment's secret"
            )
        else:
            log.warning(
                "TLS is off and there is no secret: only loopback and Unix sockets are served, and every "
                "process of this host may call"
            )

    def granter(self) -> Granter | None:
        """Signs grants, with grant.key or, without one, with the secret."""
        return self.credentials.granter()

    def grant_keys(self) -> Sequence[Ed25519PublicKey]:
        """The public keys of the processes whose grants are accepted."""
        number, keys = self._checked
        loaded = self.files.now() if self.files is not None else None
        if loaded is None or not loaded.grant_public:
            return self._of_secret
        if number != loaded.number:
            keys = grants.public_keys(loaded.grant_public)
            self._checked = (loaded.number, keys)
        return keys

    def secret_marks(self, num_bytes: int) -> list[bytes]:
        """One short mark per secret, the mark of the current secret first. Equal secrets have equal marks, and a mark
        reveals nothing else about its secret.
        """
        if self._keyring is None:
            return []
        ring = self._keyring
        numbers = sorted(ring.generations, key=lambda number: number != ring.generation)
        return [ring.proof(b"about", generation=number)[:num_bytes] for number in numbers]

    def check_listening(self, address: str, *, flag: str = "--address") -> None:
        """Raises:  ConfigError: without TLS, an address that other hosts may reach."""
        check_listening(address, has_tls=self.has_tls, flag=flag)

    def check_calling(self, addresses: Iterable[str]) -> None:
        """Raises:  ConfigError: without TLS, one of them is on another host."""
        for address in addresses:
            self.check_calling_one(address)

    def check_calling_one(self, address: str) -> None:
        """Raises:  ConfigError: without TLS, it is on another host."""
        check_calling(address, has_tls=self.has_tls)

    def server_credentials(self, *, mutual: bool = True) -> grpc.ServerCredentials | None:
        """The TLS credentials of a server; None if there is no TLS. mutual: whether callers must show a certificate."""
        return None if self.files is None else tls.server_credentials(self.files, mutual=mutual)

    def metrics(self) -> Iterable[Metric]:
        """Metrics of refused calls and of the certificates' remaining time."""
        yield from self.guard.metrics()
        if self.files is None:
            return
        left = {(name,): 86400 * issued.days_left for name, issued in self.files.now().issued().items()}
        help_text = "Time until a certificate of this process, or of the CA that it trusts, expires."
        yield gauge("antefix_security_certificate_left_seconds", help_text, left, ("file",))
        failed = {(): float(self.files.num_failed)}
        yield counter(
            "antefix_security_failed_reloads",
            "Changed certificate files that were not used because they do not belong together, since the start.",
            failed,
        )


def _check_grant_files(role: Role, files: CredentialFiles, *, has_keys: bool) -> None:
    """Raises:  ConfigError: a service has no key to check grants, or a router no key to sign
    grants that others accept.
    """
    loaded, source = files.now(), "take it from the directory of `antefix certs init`, or give --secret-file"
    if role in _CHECKING and not has_keys:
        raise ConfigError(f"{files.directory} has no grant.pub, the public key that checks grants: {source}")
    if role is Role.ROUTER and loaded.grant_public and not loaded.grant_key:
        raise ConfigError(f"{files.directory} has grant.pub, but no grant.key for this router to sign grants: {source}")


OPEN = ProcessSecurity(Role.NOBODY)


def open_security(
    role: Role,
    directory: str,
    *,
    keyring: Keyring | None = None,
    tokens: TokenCheck = lambda *_: None,
    needs_token: Callable[[], bool] = lambda: False,
) -> ProcessSecurity:
    """directory: the setting `credentials`. Raises: ConfigError: the credential files of the process cannot be used."""
    files = CredentialFiles(directory) if directory else None
    return ProcessSecurity(role, files=files, keyring=keyring, tokens=tokens, needs_token=needs_token)
