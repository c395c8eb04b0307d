"""Certificates and CAs: made, shown, from other tools, changed under load, and refused if they do not fit."""

import asyncio
import datetime
import ssl
import time
import urllib.error
import urllib.request

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from antefix import rpc
from antefix.errors import ConfigError, PermissionDenied, Unauthenticated
from antefix.security import credential_files, guard
from antefix.security.certificates import describe, issue, make_ca
from antefix.security.credential_files import CredentialFiles
from antefix.security.credentials import Credentials
from antefix.security.identity import Role
from antefix.security.identity_file import load_identities
from antefix.security.process_security import ProcessSecurity
from antefix.security.tls import http_context
from antefix.telemetry.exposition import MetricsServer, Registry
from tests.waiting import AT_MOST_S

STATS = "/antefix.v1.KvStoreService/Stats"


@pytest.fixture(autouse=True)
def looks_at_files_at_once(monkeypatch):
    monkeypatch.setattr(credential_files, "_LOOK_EVERY_S", 0.0)


async def status_of(address, credentials, *, of=Role.KVSTORE, method=STATS):
    """The status of one call over a new connection. ADMITTED: the guard let the call through."""
    async with rpc.channel(address, of=of, credentials=credentials) as channel:
        return await status_over(channel, method)


async def status_over(channel, method=STATS):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_unary(method)(b"", timeout=AT_MOST_S)
    return caught.value.code()


# The status of a service without methods of its own.
ADMITTED = grpc.StatusCode.INTERNAL


def test_a_certificate_says_role_name_and_hosts_and_its_key_is_private(tmp_path):
    make_ca(tmp_path / "ca")
    issued = issue(tmp_path / "ca", tmp_path / "p1", Role.PREFILL, "p1", hosts=["w1.example", "10.0.0.5", "[::1]"])
    assert issued.sans[0] == "spiffe://antefix.internal/prefill/p1"
    assert {"p1.prefill.antefix.internal", "w1.example", "10.0.0.5", "::1"} < set(issued.sans)
    assert 89 < issued.days_left <= 90
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in tmp_path.glob("*/*"))
    # Only a role that signs grants has the key for them, and no role gets the CA's key.
    assert sorted(path.name for path in (tmp_path / "p1").iterdir()) == ["ca.crt", "grant.pub", "tls.crt", "tls.key"]
    issue(tmp_path / "ca", tmp_path / "r1", Role.ROUTER, "r1")
    assert (tmp_path / "r1" / "grant.key").exists()
    with pytest.raises(ConfigError, match="exists already"):
        make_ca(tmp_path / "ca")
    with pytest.raises(ConfigError, match="lower-case"):
        issue(tmp_path / "ca", tmp_path / "x", Role.PREFILL, "../p1")
    with pytest.raises(ConfigError, match="antefix certs init"):
        issue(tmp_path / "none", tmp_path / "x", Role.PREFILL, "p1")


async def test_a_role_answers_for_itself_alone(authority, serve):
    server = await serve(authority.security("kvstore"))
    assert await status_of(server.address, authority.credentials("router")) is ADMITTED
    # A server at the store's address with a stolen worker certificate. No client of the store talks to it.
    rogue = await serve(authority.security("prefill"))
    assert await status_of(rogue.address, authority.credentials("router")) is grpc.StatusCode.UNAVAILABLE


async def test_a_connection_is_not_downgraded(authority, serve, keyring):
    tls = await serve(authority.security("kvstore"))
    # Clients without TLS, with or without the secret, and a client without a certificate.
    for caller in (None, Credentials(Role.ROUTER, keyring=keyring)):
        assert await status_of(tls.address, caller) is grpc.StatusCode.UNAVAILABLE
    bare = grpc.ssl_channel_credentials((authority.ca / "ca.crt").read_bytes())
    options = (("grpc.ssl_target_name_override", "kvstore.antefix.internal"),)
    async with grpc.aio.secure_channel(tls.address, bare, options=options) as channel:
        assert await status_over(channel) is grpc.StatusCode.UNAVAILABLE
    # A client with a certificate does not talk to a server without one.
    plain = await serve(ProcessSecurity(Role.KVSTORE, keyring=keyring))
    assert await status_of(plain.address, authority.credentials("router")) is grpc.StatusCode.UNAVAILABLE
    # If a server requires certificates, the secret proves nothing.
    async with rpc.channel(tls.address, of=Role.KVSTORE, credentials=authority.credentials("metrics")) as channel:
        shown = Credentials(Role.ROUTER, keyring=keyring).metadata(STATS)
        with pytest.raises(PermissionDenied), rpc.rpc_errors():
            await channel.unary_unary(STATS)(b"", timeout=AT_MOST_S, metadata=shown)


async def test_a_certificate_of_another_ca_is_nobodys(authority, serve, tmp_path):
    make_ca(tmp_path / "ca")
    issue(tmp_path / "ca", tmp_path / "r", Role.ROUTER, "r")
    server = await serve(authority.security("kvstore"))
    stranger = Credentials(Role.ROUTER, files=CredentialFiles(tmp_path / "r"))
    assert await status_of(server.address, stranger) is grpc.StatusCode.UNAVAILABLE


async def test_an_expired_certificate_ends_a_connection_that_outlives_it(authority, serve, monkeypatch):
    server = await serve(authority.security("kvstore"))
    async with rpc.channel(server.address, of=Role.KVSTORE, credentials=authority.credentials("router")) as channel:
        assert await status_over(channel) is ADMITTED
        later = time.time() + 91 * 86400
        monkeypatch.setattr(guard.time, "time", lambda: later)
        with pytest.raises(Unauthenticated, match="has expired"), rpc.rpc_errors():
            await channel.unary_unary(STATS)(b"", timeout=AT_MOST_S)


async def test_a_revoked_certificate_is_refused_at_once(serve, tmp_path):
    make_ca(tmp_path / "ca")
    for role, name in ((Role.KVSTORE, "s"), (Role.PREFILL, "p1"), (Role.PREFILL, "p2")):
        issue(tmp_path / "ca", tmp_path / name, role, name)
    server = await serve(ProcessSecurity(Role.KVSTORE, files=CredentialFiles(tmp_path / "s")))
    stolen = Credentials(Role.PREFILL, files=CredentialFiles(tmp_path / "p1"))
    async with rpc.channel(server.address, of=Role.KVSTORE, credentials=stolen) as channel:
        assert await status_over(channel) is ADMITTED
        (tmp_path / "s" / "identities.toml").write_text('revoked = ["spiffe://antefix.internal/prefill/p1"]\n')
        with pytest.raises(Unauthenticated, match="revoked"), rpc.rpc_errors():
            await channel.unary_unary(STATS)(b"", timeout=AT_MOST_S)
    assert (
        await status_of(server.address, Credentials(Role.PREFILL, files=CredentialFiles(tmp_path / "p2"))) is ADMITTED
    )


async def test_new_certificates_and_a_new_ca_drop_no_stream(serve, tmp_path):
    """Server and client change to another CA while one stream runs. In between, both CAs are trusted."""
    make_ca(tmp_path / "old")
    make_ca(tmp_path / "new")
    both = b"".join((tmp_path / ca / "ca.crt").read_bytes() for ca in ("old", "new"))
    processes = ((Role.KVSTORE, "s"), (Role.ROUTER, "r"))
    for role, name in processes:
        issue(tmp_path / "old", tmp_path / name, role, name)
    server = await serve(ProcessSecurity(Role.KVSTORE, files=CredentialFiles(tmp_path / "s")))
    credentials = Credentials(Role.ROUTER, files=CredentialFiles(tmp_path / "r"))
    async with rpc.channel(server.address, of=Role.KVSTORE, credentials=credentials) as channel:
        watch = channel.unary_stream("/grpc.health.v1.Health/Watch")(b"", timeout=AT_MOST_S)
        await watch.read()
        served = [await serving_serial(server.port)]
        for ca in ("old", "new"):
            for _, name in processes:
                (tmp_path / name / "ca.crt").write_bytes(both)
            for role, name in processes:
                issue(tmp_path / ca, tmp_path / name, role, name)
                (tmp_path / name / "ca.crt").write_bytes(both)
            assert await status_over(channel) is ADMITTED
            served.append(await serving_serial(server.port))
        for _, name in processes:
            (tmp_path / name / "ca.crt").write_bytes((tmp_path / "new" / "ca.crt").read_bytes())
        assert await status_over(channel) is ADMITTED
        assert len(set(served)) == 3, "each change is served"
        issue(tmp_path / "old", tmp_path / "late", Role.ROUTER, "late")
        (tmp_path / "late" / "ca.crt").write_bytes(both)
        late = Credentials(Role.ROUTER, files=CredentialFiles(tmp_path / "late"))
        assert await status_of(server.address, late) is grpc.StatusCode.UNAVAILABLE, "the old CA is believed no more"
        await server.health.enter_graceful_shutdown()
        assert await watch.read() is not grpc.aio.EOF, "the stream still runs, and hears of what happens"


async def serving_serial(port):
    """The serial number of the certificate that a new connection gets."""

    def connect():
        pem = ssl.get_server_certificate(("127.0.0.1", port), timeout=AT_MOST_S)
        return describe(pem.encode()).serial

    return await asyncio.to_thread(connect)


def test_half_of_a_change_leaves_what_was_there(tmp_path, caplog):
    make_ca(tmp_path / "ca")
    issue(tmp_path / "ca", tmp_path / "s", Role.KVSTORE, "s")
    files = CredentialFiles(tmp_path / "s")
    before = files.now()
    issue(tmp_path / "ca", tmp_path / "t", Role.KVSTORE, "s")
    (tmp_path / "s" / "tls.key").write_bytes((tmp_path / "t" / "tls.key").read_bytes())
    assert files.now() is before
    assert files.num_failed == 1
    assert "tls.key is not the key of tls.crt" in caplog.text
    (tmp_path / "s" / "tls.crt").write_bytes((tmp_path / "t" / "tls.crt").read_bytes())
    assert files.now().certificate == (tmp_path / "t" / "tls.crt").read_bytes()
    (tmp_path / "s" / "ca.crt").unlink()
    assert files.now().ca
    with pytest.raises(ConfigError, match=r"ca\.crt is missing"):
        CredentialFiles(tmp_path / "s")


def test_a_service_that_checks_grants_needs_keys_for_it(tmp_path, keyring):
    make_ca(tmp_path / "ca")
    issue(tmp_path / "ca", tmp_path / "s", Role.KVSTORE, "s")
    (tmp_path / "s" / "grant.pub").unlink()
    with pytest.raises(ConfigError, match=r"grant\.pub.*--secret-file"):
        ProcessSecurity(Role.KVSTORE, files=CredentialFiles(tmp_path / "s"))
    ProcessSecurity(Role.KVSTORE, files=CredentialFiles(tmp_path / "s"), keyring=keyring)
    issue(tmp_path / "ca", tmp_path / "r", Role.ROUTER, "r")
    ProcessSecurity(Role.ROUTER, files=CredentialFiles(tmp_path / "r"), keyring=keyring)
    (tmp_path / "r" / "grant.key").unlink()
    with pytest.raises(ConfigError, match=r"no grant\.key for this router to sign"):
        ProcessSecurity(Role.ROUTER, files=CredentialFiles(tmp_path / "r"), keyring=keyring)


# --- of other makers -----------------------------------------------------------------------------------------------


def foreign(directory, ca_dir, sans):
    """Write tls.crt, tls.key and ca.crt as cert-manager does: a PKCS#8 key that is not RSA, no subject, only SANs."""
    ca_key = serialization.load_pem_private_key((ca_dir / "ca.key").read_bytes(), None)
    ca = x509.load_pem_x509_certificate((ca_dir / "ca.crt").read_bytes())
    key, now = ec.generate_private_key(ec.SECP384R1()), datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(x509.Name([])).issuer_name(ca.subject)
    builder = builder.public_key(key.public_key()).serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now - datetime.timedelta(1)).not_valid_after(now + datetime.timedelta(1))
    names = [x509.UniformResourceIdentifier(s) if "://" in s else x509.DNSName(s) for s in sans]
    pem = builder.add_extension(x509.SubjectAlternativeName(names), critical=True).sign(ca_key, hashes.SHA256())
    directory.mkdir()
    private = serialization.PrivateFormat.PKCS8
    (directory / "tls.key").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, private, serialization.NoEncryption())
    )
    (directory / "tls.crt").write_bytes(pem.public_bytes(serialization.Encoding.PEM))
    (directory / "ca.crt").write_bytes((ca_dir / "ca.crt").read_bytes())
    return directory


async def test_files_of_cert_manager_and_spiffe_work_unchanged(authority, serve, tmp_path, keyring):
    store = foreign(tmp_path / "store", authority.ca, ["localhost", "store.antefix.svc"])
    router = foreign(tmp_path / "router", authority.ca, ["spiffe://cluster.local/ns/antefix/sa/router", "localhost"])
    other = foreign(tmp_path / "other", authority.ca, ["spiffe://cluster.local/ns/shop/sa/router"])
    (store / "identities.toml").write_text(
        '[[identity]]\nname = "spiffe://cluster.local/ns/antefix/sa/router"\nrole = "router"\n'
    )
    server = await serve(
        ProcessSecurity(Role.KVSTORE, files=CredentialFiles(store), keyring=keyring), address="localhost:0"
    )
    credentials = Credentials(Role.ROUTER, files=CredentialFiles(router))
    assert await status_of(server.address, credentials) is ADMITTED
    # The certificate is checked against the called host name.
    assert await status_of(f"127.0.0.1:{server.port}", credentials) is grpc.StatusCode.UNAVAILABLE
    stranger = Credentials(Role.ROUTER, files=CredentialFiles(other))
    assert await status_of(server.address, stranger) is grpc.StatusCode.UNAUTHENTICATED


async def test_a_certificate_for_two_identities_is_refused(authority, serve, tmp_path):
    sans = ["spiffe://antefix.internal/prefill/p1", "r1.router.antefix.internal"]
    both = Credentials(Role.ROUTER, files=CredentialFiles(foreign(tmp_path / "both", authority.ca, sans)))
    server = await serve(authority.security("kvstore"))
    assert await status_of(server.address, both) is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[[identity]]\nname = 'x'\n", "role"),
        ("[[identity]]\nname = 'x'\nrole = 'king'\n", "king"),
        ("[[identity]]\nname = 'x'\nrole = 'local'\n", "local"),
        ("[[identity]]\nname = 'x'\nrole = 'tenant'\ntenant = 'a'\n", "unknown names: tenant"),
        ("[[identity]]\nname = 'x'\nrole = 'tenant'\n", "one tenant"),
        ("[[identity]]\nname = 'x'\nrole = 'tenant'\ntenants = ['a', 'b']\n", "one tenant"),
        ("[[identity]]\nname = 'x'\nrole = 'frontend'\ntenants = 'acme'\n", "list of strings"),
        ("[[identity]]\nname = 'x'\nrole = 'prefill'\ntenants = ['a']\n", "acts for no tenants"),
        ("people = []\n", "people"),
        ("[[identity", "identities.toml"),
    ],
)
def test_a_wrong_file_of_identities_is_named(tmp_path, text, named):
    (tmp_path / "identities.toml").write_text(text)
    with pytest.raises(ConfigError, match=named):
        load_identities(tmp_path / "identities.toml")


# --- HTTP ------------------------------------------------------------------------------------------------------------


def fetch(port, authority, role=None):
    context = ssl.create_default_context(cafile=authority.ca / "ca.crt")
    if role:
        directory = authority.files(role).directory
        context.load_cert_chain(directory / "tls.crt", directory / "tls.key")
    with urllib.request.urlopen(f"https://127.0.0.1:{port}/metrics", context=context, timeout=AT_MOST_S) as answer:
        return answer.read().decode()


async def test_metrics_are_for_those_with_a_certificate(authority):
    registry = Registry("kvstore")
    server = MetricsServer(registry, "127.0.0.1", 0, tls=http_context(authority.files("kvstore"), mutual=True))
    port = int(server.address.rpartition(":")[2])
    assert "antefix_build_info" in await asyncio.to_thread(fetch, port, authority, "metrics")
    with pytest.raises((ssl.SSLError, urllib.error.URLError, ConnectionError)):
        await asyncio.to_thread(fetch, port, authority)
    with pytest.raises((urllib.error.URLError, ConnectionError)):
        await asyncio.to_thread(
            lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=AT_MOST_S).read()
        )
    server.close()


async def test_a_process_shows_how_long_its_certificates_last(authority):
    security = authority.security("kvstore")
    registry = Registry("kvstore")
    registry.add(security.metrics)
    text = registry.text()
    (line,) = [
        line
        for line in text.splitlines()
        if line.startswith('antefix_security_certificate_left_seconds{file="tls.crt"')
    ]
    assert 89 * 86400 < float(line.split()[-1]) < 90 * 86400
    assert "antefix_security_failed_reloads_total 0.0" in text


async def test_an_http_server_takes_over_new_certificates(tmp_path):
    make_ca(tmp_path / "ca")
    issue(tmp_path / "ca", tmp_path / "s", Role.ROUTER, "s", hosts=["127.0.0.1"])
    server = MetricsServer(Registry("router"), "127.0.0.1", 0, tls=http_context(CredentialFiles(tmp_path / "s")))
    port = int(server.address.rpartition(":")[2])
    first = await serving_serial(port)
    issue(tmp_path / "ca", tmp_path / "s", Role.ROUTER, "s", hosts=["127.0.0.1"])
    assert await serving_serial(port) != first
    server.close()
