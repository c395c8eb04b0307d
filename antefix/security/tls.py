"""TLS for servers and clients, whose certificates and CAs change while they run.

gRPC servers and HTTP servers read the files at each handshake. A client's channel cannot change its certificate, so
`channels.py` makes a new channel. Running calls keep their connection.
"""

from __future__ import annotations

import os
import ssl
import threading
from typing import Any

import grpc

from antefix.errors import ConfigError
from antefix.security.credential_files import CredentialFiles, Loaded


def server_credentials(files: CredentialFiles, *, mutual: bool = True) -> grpc.ServerCredentials:
    """TLS credentials for a gRPC port.  mutual: callers must have a certificate of a trusted CA."""
    loaded = files.now()
    if not loaded.has_certificate:
        raise ConfigError(f"{files.directory} has no tls.crt and tls.key, which a server with TLS needs")
    lock, served = threading.Lock(), [loaded.digest]

    def fetch() -> Any:
        now = files.now()
        with lock:
            if now.digest == served[0]:
                return None
            served[0] = now.digest
        return _configuration(now)

    return grpc.dynamic_ssl_server_credentials(_configuration(loaded), fetch, require_client_authentication=mutual)


def channel_credentials(loaded: Loaded) -> grpc.ChannelCredentials:
    """TLS credentials for a client's channel, from these files."""
    if not loaded.has_certificate:
        return grpc.ssl_channel_credentials(loaded.ca)
    return grpc.ssl_channel_credentials(loaded.ca, loaded.key, loaded.certificate)


def http_context(files: CredentialFiles, *, mutual: bool = False) -> ssl.SSLContext:
    """The TLS context of an HTTP server. Each TLS handshake uses the contents that the files have at that time."""
    first = files.now()
    context = _context(first, mutual=mutual)
    kept = [(first.digest, context)]

    def choose(connection: Any, name: str | None, of: ssl.SSLContext) -> None:
        now = files.now()
        if kept[0][0] != now.digest:
            kept[0] = (now.digest, _context(now, mutual=mutual))
        connection.context = kept[0][1]

    context.sni_callback = choose
    return context


def _configuration(loaded: Loaded) -> grpc.ServerCertificateConfiguration:
    pair = (loaded.key, loaded.certificate)
    return grpc.ssl_server_certificate_configuration([pair], root_certificates=loaded.ca)


def _context(loaded: Loaded, *, mutual: bool) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # OpenSSL reads a key only from a file. A file in memory has no name, and disappears when it is closed.
    with os.fdopen(os.memfd_create("antefix-tls"), "wb") as file:
        file.write(loaded.key + b"\n" + loaded.certificate)
        file.flush()
        context.load_cert_chain(f"/proc/self/fd/{file.fileno()}")
    if mutual:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=loaded.ca.decode("ascii", "ignore"))
    return context
