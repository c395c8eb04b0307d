"""The credentials of a process as a client: its certificate, the secret, a token, and the grant that it holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc

from antefix.block import TokenArray
from antefix.config import require
from antefix.secret import Keyring
from antefix.security import grants, tls
from antefix.security.access_table import NO_ROW, TABLE, GrantRule
from antefix.security.credential_files import CredentialFiles
from antefix.security.grants import Granter
from antefix.security.identity import Role, role_host
from antefix.security.service_tokens import CALLER_KEY, service_token

Options = Sequence[tuple[str, Any]]


class Credentials:
    """The credentials of a process as a client.

    files: for TLS.  keyring: the deployment's secrets, which prove the process's role without TLS.
    token: a bearer token.
    """

    def __init__(
        self,
        role: Role,
        *,
        files: CredentialFiles | None = None,
        keyring: Keyring | None = None,
        token: str = "",
    ) -> None:
        """Raises:  ConfigError: the token cannot be sent."""
        if token:
            # A line's end often comes along when a key is read from a file.
            token = token.strip()
            require(bool(token), "the API key is blank: give a key, or leave it out")
            require(token.isascii() and token.isprintable(), "an API key may have only printable ASCII characters")
        self.role = role
        self.files = files
        self._keyring = keyring
        self._token = token
        self._signs: tuple[bytes, Granter | None] | None = None

    @classmethod
    def of_application(cls, directory: Path | str = "", *, api_key: str = "") -> Credentials:
        """The credentials of a program that calls a router: a certificate, an API key, or both.

        directory: has ca.crt, and tls.crt with tls.key if there is a certificate; empty: without TLS, on one host.
        Raises:  ConfigError: the files or the key cannot be used.
        """
        return cls(Role.NOBODY, files=CredentialFiles(directory) if directory else None, token=api_key)

    @property
    def number(self) -> int:
        """Counts changes of the files."""
        return 0 if self.files is None else self.files.now().number

    def metadata(self, method: str) -> tuple[tuple[str, str | bytes], ...]:
        """The metadata to send with a call of this method."""
        shown: list[tuple[str, str | bytes]] = []
        if self._token:
            shown.append(("authorization", f"Bearer {self._token}"))
        if self._keyring is not None and self.files is None:
            shown.append((CALLER_KEY, service_token(self._keyring, self.role, method)))
        if (grant := grants.held()) and TABLE.get(method, NO_ROW).grant is not GrantRule.NONE:
            shown.append((grants.GRANT_KEY, grant))
        return tuple(shown)

    def grant_for(self, tenant: str, tokens: TokenArray, *, ttl_s: float) -> bytes:
        """This process's own grant for a prompt: the grant that it was given, or one that it signs; empty if it has
        neither.
        """
        if self.files is not None and (given := self.files.now().tenant_grant):
            return given
        granter = self.granter()
        if granter is None or self._keyring is None:
            return b""
        return granter.grant_for(self._keyring, tenant, tokens, ttl_s=ttl_s)

    def grant_for_owners(self, owners: Sequence[bytes], *, ttl_s: float) -> bytes:
        """A grant for these owners and no prompt, for tools that move or delete records; empty: this process may not
        sign one.
        """
        granter = self.granter()
        return b"" if granter is None else granter.grant(owners, bytes(32), ttl_s=ttl_s)

    def granter(self) -> Granter | None:
        """Signs grants, with grant.key or, without one, with the secret."""
        pem = b"" if self.files is None else self.files.now().grant_key
        if self._signs is None or self._signs[0] != pem:
            self._signs = (pem, self._make_granter(pem))
        return self._signs[1]

    def _make_granter(self, pem: bytes) -> Granter | None:
        if pem:
            return Granter.from_pem(pem)
        return Granter.from_secret(self._keyring) if self._keyring is not None else None

    def target(self, of: Role | None, name: str) -> Options:
        """Channel options that name the expected server certificate. of, name: the role and the name of the called
        process.

        Certificates made by Antefix contain the role as a host name, so a process of one role cannot pose as another
        role at any address. Other certificates are checked for the host name that is called.
        """
        if self.files is None or of is None or not self.files.now().names_roles:
            return ()
        return (("grpc.ssl_target_name_override", role_host(of, name)),)

    def grpc_credentials(self) -> grpc.ChannelCredentials:
        """gRPC credentials for one channel, from the present files. Only with TLS."""
        assert self.files is not None
        return tls.channel_credentials(self.files.now())
