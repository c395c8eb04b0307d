"""What a command shows to the services that it asks: it is the operator's.

ANTEFIX_CREDENTIALS=DIR      TLS with an operator's certificate (`antefix certs issue operator NAME`)
--data-dir, --secret-file    without TLS, on the deployment's host: its secret; by default antefix-data/secret
ANTEFIX_API_KEY=KEY          a tenant's key, where the router wants one
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from antefix.security.credentials import Credentials

DIRECTORY_VARIABLE: Final = "ANTEFIX_CREDENTIALS"
KEY_VARIABLE: Final = "ANTEFIX_API_KEY"
DEFAULT_DATA_DIR: Final = Path("antefix-data")


def find_credentials(args: argparse.Namespace, environ: Mapping[str, str]) -> Credentials | None:
    """Raises:  ConfigError: the directory or file that is named cannot be used."""
    from antefix.secret import Keyring
    from antefix.security.credential_files import CredentialFiles
    from antefix.security.credentials import Credentials
    from antefix.security.identity import Role

    token = environ.get(KEY_VARIABLE, "")
    if directory := environ.get(DIRECTORY_VARIABLE):
        return Credentials(Role.OPERATOR, files=CredentialFiles(directory), token=token)
    secret = _secret_file(args)
    if secret is None and not token:
        return None
    return Credentials(Role.OPERATOR, keyring=Keyring.from_file(secret) if secret else None, token=token)


def _secret_file(args: argparse.Namespace) -> Path | None:
    named = getattr(args, "secret_file", None)
    if named:
        return Path(named)
    secret = Path(getattr(args, "data_dir", None) or DEFAULT_DATA_DIR) / "secret"
    return secret if secret.is_file() else None
