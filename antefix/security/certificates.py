"""A private CA and certificates for roles: what `antefix certs` makes. Keys are made as ECDSA P-256, and files with
mode 0600.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from antefix.errors import ConfigError
from antefix.secret import Keyring
from antefix.security.grants import Granter
from antefix.security.identity import DOMAIN, NAME, Role, role_host

CERTIFICATE, KEY, CA = "tls.crt", "tls.key", "ca.crt"
CA_KEY: Final = "ca.key"
GRANT_KEY, GRANT_PUBLIC, TENANT_GRANT = "grant.key", "grant.pub", "tenant.grant"
CA_DAYS: Final = 3650
DAYS: Final = 90
# Hosts' clocks differ, so a certificate is valid from a little before it was made.
_BACKDATED: Final = datetime.timedelta(minutes=10)
# The roles that sign grants.
_GRANTING: Final = (Role.ROUTER, Role.OPERATOR)


@dataclass(frozen=True, slots=True, kw_only=True)
class Issued:
    """The contents of a certificate."""

    subject: str
    sans: tuple[str, ...]
    serial: int
    not_before: datetime.datetime
    not_after: datetime.datetime

    @property
    def days_left(self) -> float:
        return (self.not_after - datetime.datetime.now(datetime.UTC)).total_seconds() / 86400


def make_ca(directory: Path, *, days: int = CA_DAYS) -> None:
    """Make a CA and the key that signs grants: ca.crt, ca.key, grant.key and grant.pub.

    Raises:  ConfigError: there is one already, or the directory cannot be written.
    """
    if (directory / CA_KEY).exists():
        raise ConfigError(
            f"{directory / CA_KEY} exists already: if it were replaced, nobody would trust the certificates "
            "that it signed"
        )
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Antefix deployment")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    grant_key = ed25519.Ed25519PrivateKey.generate()
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_private(directory / CA_KEY, _pem(key))
        write_private(directory / CA, certificate.public_bytes(serialization.Encoding.PEM))
        write_private(directory / GRANT_KEY, _pem(grant_key))
        write_private(directory / GRANT_PUBLIC, _public_pem(grant_key.public_key()))
    except OSError as err:
        raise ConfigError(f"{directory}: {err}") from err


def issue(
    ca_directory: Path, directory: Path, role: Role, name: str, *, hosts: Sequence[str] = (), days: int = DAYS
) -> Issued:
    """Make a role's certificate and key, and copy the other files that the role needs from the CA's directory.

    hosts: host names and IP addresses under which others call the process.
    Raises:  ConfigError: the CA's files cannot be used, the name is invalid, or the directory cannot be written.
    """
    if not NAME.fullmatch(name):
        raise ConfigError(f"name {name!r}: a name has at most 63 lower-case letters, digits and hyphens")
    try:
        ca_key = serialization.load_pem_private_key((ca_directory / CA_KEY).read_bytes(), None)
        ca_pem = (ca_directory / CA).read_bytes()
        ca = x509.load_pem_x509_certificate(ca_pem)
    except (OSError, ValueError) as err:
        raise ConfigError(f"the CA in {ca_directory}: {err}; `antefix certs init` makes one") from err
    assert isinstance(ca_key, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.UTC)
    end = min(now + datetime.timedelta(days=days), ca.not_valid_after_utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{role} {name}")]))
        .issuer_name(ca.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        .add_extension(x509.SubjectAlternativeName(_sans(role, name, hosts)), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Write the key first, so that a reader that sees the new certificate also finds its key.
        write_private(directory / KEY, _pem(key))
        write_private(directory / CERTIFICATE, pem)
        write_private(directory / CA, ca_pem)
        for file in (GRANT_PUBLIC, *((GRANT_KEY,) if role in _GRANTING else ())):
            if (ca_directory / file).exists():
                write_private(directory / file, (ca_directory / file).read_bytes())
    except OSError as err:
        raise ConfigError(f"{directory}: {err}") from err
    return describe(pem)


def write_lasting_grant(
    ca_directory: Path, directory: Path, keyring: Keyring, tenant: str, *, days: int = DAYS
) -> None:
    """Sign an engine's grant for a tenant, into the directory that has its certificate.

    Raises:  ConfigError: the CA has no key that signs grants, or the directory cannot be written.
    """
    try:
        granter = Granter.from_pem((ca_directory / GRANT_KEY).read_bytes())
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_private(directory / TENANT_GRANT, granter.lasting_grant(keyring, tenant, ttl_s=days * 86400.0))
    except OSError as err:
        raise ConfigError(f"{err}; `antefix certs init` makes a CA that has {GRANT_KEY}") from err


def describe(pem: bytes) -> Issued:
    """The contents of the first certificate in a file.  Raises:  ConfigError: it has no certificate."""
    try:
        certificate = x509.load_pem_x509_certificate(pem)
    except ValueError as err:
        raise ConfigError(f"the file does not begin with a certificate: {err}") from err
    return Issued(
        subject=certificate.subject.rfc4514_string(),
        sans=sans_of(certificate),
        serial=certificate.serial_number,
        not_before=certificate.not_valid_before_utc,
        not_after=certificate.not_valid_after_utc,
    )


def sans_of(certificate: x509.Certificate) -> tuple[str, ...]:
    """The URIs, host names and IP addresses in the certificate, in this order."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    hosts = [host.lower() for host in names.get_values_for_type(x509.DNSName)]
    return (*uris, *hosts, *map(str, names.get_values_for_type(x509.IPAddress)))


def write_private(path: Path, data: bytes) -> None:
    """Replace a file atomically. A file made here can be read only by its owner."""
    fresh = path.with_name(path.name + ".new")
    fresh.unlink(missing_ok=True)
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
    fresh.replace(path)


def _sans(role: Role, name: str, hosts: Sequence[str]) -> list[x509.GeneralName]:
    sans: list[x509.GeneralName] = [
        x509.UniformResourceIdentifier(f"spiffe://{DOMAIN}/{role}/{name}"),
        x509.DNSName(role_host(role, name)),
        x509.DNSName(role_host(role)),
    ]
    for host in dict.fromkeys(hosts):
        try:
            sans.append(x509.IPAddress(ipaddress.ip_address(host.strip("[]"))))
        except ValueError:
            if not host.isascii() or "/" in host or ":" in host:
                raise ConfigError(f"--host {host!r} is no host name and no IP address") from None
            sans.append(x509.DNSName(host))
    return sans


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _public_pem(key: ed25519.Ed25519PublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
