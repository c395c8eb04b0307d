"""What a process shows of itself as a client: its certificate, the secret, a token, and the grant that it holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc

from antefix.secret import Keyring
from antefix.security import grants, tls
from antefix.security.access_table import NO_ROW, TABLE, GrantRule
from antefix.security.credential_files import CredentialFiles
from antefix.security.identity import Role, role_host
from antefix.security.service_tokens import CALLER_KEY, service_token

Options = Sequence[tuple[str, Any]]


class Credentials:
    """What a process shows of itself as a client.

    files: TLS.  keyring: without TLS, proves that we have the deployment's secret, as this role.
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
        self.role = role
        self.files = files
        self._keyring = keyring if files is None else None
        self._token = token

    @property
    def number(self) -> int:
        """Counts changes of the files."""
        return 0 if self.files is None else self.files.now().number

    def metadata(self, method: str) -> tuple[tuple[str, str | bytes], ...]:
        """What goes with a call of this method."""
        shown: list[tuple[str, str | bytes]] = []
        if self._token:
            shown.append(("authorization", f"Bearer {self._token}"))
        if self._keyring is not None:
            shown.append((CALLER_KEY, service_token(self._keyring, self.role, method)))
        if (grant := grants.held()) and TABLE.get(method, NO_ROW).grant is not GrantRule.NONE:
            shown.append((grants.GRANT_KEY, grant))
        return tuple(shown)

    def target(self, of: Role | None, name: str) -> Options:
        """What the server's certificate must say. of, name: whom we mean to call.

        Certificates of ours carry their role as a host name, so none can stand in for another role, wherever it
        listens. Others are checked for the host name that is called.
        """
        if self.files is None or of is None or not self.files.now().names_roles:
            return ()
        return (("grpc.ssl_target_name_override", role_host(of, name)),)

    def grpc_credentials(self) -> grpc.ChannelCredentials:
        assert self.files is not None
        return tls.channel_credentials(self.files.now())
