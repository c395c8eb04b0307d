"""The credentials with which a command identifies itself to services as the operator's.

ANTEFIX_CREDENTIALS=DIR      TLS with an operator's certificate (`antefix certs issue operator NAME`)
--data-dir, --secret-file    without TLS, on the deployment's host: its secret; by default antefix-data/secret
ANTEFIX_API_KEY=KEY          a tenant's key, where the router wants one
"""

from __future__ import annotations

import argparse
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from antefix.config import require
from antefix.split_url import split_url

if TYPE_CHECKING:
    from antefix.block import TokenArray
    from antefix.security.credentials import Credentials

DIRECTORY_VARIABLE: Final = "ANTEFIX_CREDENTIALS"
KEY_VARIABLE: Final = "ANTEFIX_API_KEY"
_GRANT_S: Final = 300.0
DEFAULT_DATA_DIR: Final = Path("antefix-data")


def find_credentials(args: argparse.Namespace, environ: Mapping[str, str]) -> Credentials | None:
    """Raises:  ConfigError: the directory or file that is named cannot be used."""
    from antefix.secret import Keyring
    from antefix.security.credential_files import CredentialFiles
    from antefix.security.credentials import Credentials
    from antefix.security.identity import Role

    token, directory, secret = environ.get(KEY_VARIABLE, ""), environ.get(DIRECTORY_VARIABLE), secret_file(args)
    is_given = directory is None or bool(directory.strip())
    require(is_given, f"{DIRECTORY_VARIABLE} is empty, which would be no TLS: unset it, or name a directory")
    if not (token or directory or secret):
        return None
    files = CredentialFiles(directory) if directory else None
    keyring = Keyring.from_file(secret) if secret else None
    return Credentials(Role.OPERATOR, files=files, keyring=keyring, token=token)


def hold_grant(address: str, tenant: str, tokens: TokenArray) -> None:
    """Send a grant of the operator's own with the following calls, which do a router's work without a router."""
    from antefix.security.grants import hold
    from antefix.security.own_credentials import credentials_for

    shown = credentials_for(address)
    hold(b"" if shown is None else shown.grant_for(tenant, tokens, ttl_s=_GRANT_S))


def tls_for_url(url: str, *, shows_key: bool) -> ssl.SSLContext | None:
    """How a command checks the certificate of an https:// server: by the CAs in the operator's directory, if there is
    one.

    Raises:  ConfigError: a key would cross a network unencrypted.
    """
    from antefix.security.listening import check_calling
    from antefix.security.own_credentials import credentials_for

    parts = split_url(url)
    if parts.scheme != "https":
        if shows_key:
            check_calling(f"{parts.netloc}:0" if parts.port is None else parts.netloc, has_tls=False)
        return None
    shown = credentials_for(parts.netloc)
    ca = shown.files.now().ca.decode() if shown is not None and shown.files is not None else None
    return ssl.create_default_context(cadata=ca)


def secret_file(args: argparse.Namespace) -> Path | None:
    """The file with the secret that the command shows; None: there is none."""
    named = getattr(args, "secret_file", None)
    if named:
        return Path(named)
    secret = Path(getattr(args, "data_dir", None) or DEFAULT_DATA_DIR) / "secret"
    return secret if secret.is_file() else None
