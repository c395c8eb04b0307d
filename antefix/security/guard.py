"""Checks each call before it is served: the caller's identity, the access table, and the router's grant if needed.

For every call of every service, `antefix.rpc` asks the guard. `admitted()` returns the admitted caller within the task
that serves the call.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final

from cryptography import x509
from prometheus_client import Counter
from prometheus_client.core import Metric

from antefix.errors import AntefixError, ConfigError, PermissionDenied, Unauthenticated
from antefix.secret import Keyring
from antefix.security import grants
from antefix.security.access_table import NO_ROW, TABLE, GrantRule
from antefix.security.certificates import sans_of
from antefix.security.credential_files import CredentialFiles
from antefix.security.grants import Grant, GrantCheck
from antefix.security.identity import LOCAL, NOBODY, Identity, Role
from antefix.security.service_tokens import CALLER_KEY, check_service_token

log = logging.getLogger("antefix.security")

# Maps a bearer token and the called method to the token's owner; None: no tokens are used. Raises Unauthenticated for
# an unknown token, and PermissionDenied for a token that is not valid for this method.
TokenCheck = Callable[[str, str], Identity | None]

_NUM_CERTIFICATES_MAX: Final = 1024
_LOG_EVERY_S: Final = 10.0
_NUM_LOGGED_MAX: Final = 256
_HEALTH: Final = "/grpc.health.v1.Health/"


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted:
    """A call that is being served.  is_open: the service authenticates nobody, so it needs no grants."""

    identity: Identity = LOCAL
    grant: Grant | None = None
    is_open: bool = True

    def needed_grant(self) -> Grant | None:
        """The grant that came with the call; None if the service authenticates nobody. Raises: PermissionDenied: the
        call came without a grant.
        """
        if self.grant is None and not self.is_open:
            raise PermissionDenied("this call needs a grant that a router signed, and was made without one")
        return self.grant


_OPEN: Final = Admitted()
_admitted: ContextVar[Admitted] = ContextVar("antefix_admitted", default=_OPEN)


def admitted() -> Admitted:
    """The admitted call that this task serves."""
    return _admitted.get()


NOBODYS_GRANTS: Final = GrantCheck(lambda: ())


class Guard:
    """The guard of one service. Without files and keyring the service is open; `check_listening` then allows only
    loopback.

    files: with TLS, callers show certificates.  keyring: without TLS, services prove that they have the secret.
    tokens: finds the owner of a bearer token.  needs_token: whether callers without any credentials are refused.
    """

    def __init__(
        self,
        *,
        files: CredentialFiles | None = None,
        keyring: Keyring | None = None,
        grant_check: GrantCheck = NOBODYS_GRANTS,
        tokens: TokenCheck = lambda *_: None,
        needs_token: Callable[[], bool] = lambda: False,
    ) -> None:
        self._files = files
        self._keyring = keyring if files is None else None
        self._grants = grant_check
        self._tokens = tokens
        self._needs_token = needs_token
        self._known: dict[tuple[int, bytes], Identity] = {}
        self._logged: dict[tuple[str, str], float] = {}
        self.refused = Counter(
            "antefix_security_refused_calls",
            "Calls that were refused before they were served, by method and reason.",
            ("method", "reason"),
            registry=None,
        )

    @property
    def is_open(self) -> bool:
        return self._files is None and self._keyring is None

    def admit(self, method: str, context: Any) -> None:
        """Admit the call, and record its caller for the task that serves it.

        Raises:  Unauthenticated: the caller shows no credentials, or wrong ones.
            PermissionDenied: the caller may not call this method, or lacks a grant.
        """
        metadata = {str(key): value for key, value in context.invocation_metadata() or ()}
        identity, reason = NOBODY, "identity"
        try:
            identity = self._identify(method, metadata, context)
            reason = "table"
            row = TABLE.get(method, NO_ROW)
            if identity.role not in row.roles and not (self.is_open and identity.role is Role.LOCAL):
                self._refuse(identity, method, known=row is not NO_ROW)
            reason = "grant"
            self._hold(identity, row.grant, metadata)
        except AntefixError as err:
            # A method name that is not in the table is text from the caller, so it must not become a label.
            self.refused.labels(method if method in TABLE else "(other)", reason).inc()
            self._log(identity, method, err)
            raise

    def metrics(self) -> Iterable[Metric]:
        yield from self.refused.collect()

    def _hold(self, identity: Identity, rule: GrantRule, metadata: Mapping[str, Any]) -> None:
        signed = bytes(metadata.get(grants.GRANT_KEY, b""))
        is_asked = rule is GrantRule.NEEDED or (rule is GrantRule.OPTIONAL and bool(signed))
        grant = self._grants.check(signed) if is_asked and not self.is_open else None
        grants.hold(signed if grant is not None else b"")
        _admitted.set(Admitted(identity=identity, grant=grant, is_open=self.is_open))

    def _identify(self, method: str, metadata: Mapping[str, Any], context: Any) -> Identity:
        """The caller's identity: from its token if it shows a token, else from its certificate, else from the
        secret.
        """
        scheme, _, token = str(metadata.get("authorization", "")).partition(" ")
        if scheme.lower() == "bearer" and (owner := self._tokens(token.strip(), method)) is not None:
            return owner
        if self._files is not None:
            return self._of_certificate(context)
        if self._keyring is not None and CALLER_KEY in metadata:
            return check_service_token(self._keyring, str(metadata[CALLER_KEY]), method)
        if self._needs_token() and not method.startswith(_HEALTH):
            raise Unauthenticated(
                "this service needs an API key: send the key as gRPC metadata, authorization: Bearer KEY"
            )
        return LOCAL

    def _of_certificate(self, context: Any) -> Identity:
        shown = context.auth_context().get("x509_pem_cert")
        if not shown:
            raise Unauthenticated("the caller showed no certificate and no token: send authorization: Bearer KEY")
        assert self._files is not None
        loaded = self._files.now()
        key = (loaded.number, shown[0])
        identity = self._known.get(key)
        if identity is None:
            if len(self._known) >= _NUM_CERTIFICATES_MAX:
                self._known.clear()
            identity = self._known[key] = identity_of(shown[0], self._files)
        if time.time() > identity.expires_s:
            # A connection may last longer than the certificate that was checked in its handshake.
            raise Unauthenticated(f"the certificate of {identity} has expired: connect again with a new one")
        return identity

    def _refuse(self, identity: Identity, method: str, *, known: bool) -> None:
        if not known:
            raise PermissionDenied(f"the table of allowed calls lets nobody call {method}")
        if identity.role in (Role.LOCAL, Role.NOBODY):
            of_secret = "the deployment's secret (a service: --secret-file; a command: --data-dir)"
            how = of_secret if self._files is None else "a certificate"
            raise Unauthenticated(f"{method} is only for callers that prove who they are, with {how}")
        raise PermissionDenied(f"{identity} may not call {method}")

    def _log(self, identity: Identity, method: str, err: AntefixError) -> None:
        """Log a refusal, each kind at most once per interval, so that callers cannot fill a disk with log lines."""
        now, kind = time.monotonic(), (str(identity.role), method[:200])
        if now - self._logged.get(kind, -_LOG_EVERY_S) < _LOG_EVERY_S:
            return
        if len(self._logged) >= _NUM_LOGGED_MAX:
            self._logged.clear()
        self._logged[kind] = now
        log.warning(
            "refused %s of %s: %s",
            *(text.encode("unicode_escape").decode() for text in (kind[1], str(identity), str(err))),
        )


def identity_of(pem: bytes, files: CredentialFiles) -> Identity:
    """The identity of a certificate. TLS has already checked that a trusted CA signed the certificate.

    Raises:  Unauthenticated: the certificate has no identity, or several, or is revoked.
    """
    certificate = x509.load_pem_x509_certificate(pem)
    sans = sans_of(certificate)
    identities = files.now().identities
    if identities.is_revoked(sans, certificate.serial_number):
        raise Unauthenticated("the certificate is revoked")
    try:
        found = identities.find(sans)
    except ConfigError as err:
        raise Unauthenticated(str(err)) from err
    if found is None:
        raise Unauthenticated(f"identities.toml has no entry for the certificate of {', '.join(sans) or 'no name'}")
    role, name, tenants = found
    hosts = frozenset(san for san in sans if not san.startswith("spiffe://"))
    if role is Role.OPERATOR:
        tenants = frozenset({"*"})
    return Identity(
        role=role, name=name, tenants=tenants, hosts=hosts, expires_s=certificate.not_valid_after_utc.timestamp()
    )
