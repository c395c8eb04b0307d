"""A whole deployment over TLS answers, hits, and gives nothing to callers without permission."""

import asyncio
import hashlib
import json
import ssl
import time
import urllib.error
import urllib.request

import grpc
import numpy as np
import pytest

from antefix import rpc
from antefix.clients import DecodeClient, PrefillClient, RouterClient
from antefix.errors import PermissionDenied, Unauthenticated, Unavailable
from antefix.generation_request import Caller, GenerationRequest
from antefix.registration import Registration
from antefix.sampling import Sampling
from antefix.secret import Keyring
from antefix.security import grants
from antefix.security.credentials import Credentials
from antefix.security.identity import Role
from antefix.v1 import router_pb2, router_pb2_grpc
from antefix_console.cli import main
from tests.security.tls_deployment import TlsDeployment
from tests.waiting import AT_MOST_S, until

pytestmark = pytest.mark.services
PROMPT = np.arange(300, dtype=np.uint32) % 61
WARM_UP = PROMPT[7:]


@pytest.fixture
async def deployment(authority, tmp_path):
    tenants = tmp_path / "tenants.toml"
    digest = hashlib.sha256(b"acme's key").hexdigest()
    tenants.write_text(f'[[tenant]]\nname = "acme"\napi_key_sha256 = ["{digest}"]\n')
    router = authority.files("router", "router1").directory
    (router / "identities.toml").write_text(
        '[[identity]]\nname = "spiffe://antefix.internal/frontend/web"\nrole = "frontend"\ntenants = ["globex"]\n'
    )
    flags = ("--http-address", "localhost:0", "--tenants-file", str(tenants), "--token-address", "localhost:0")
    flags += ("--ledger-dir", str(tmp_path / "ledger"))
    async with TlsDeployment(authority, tmp_path, router_flags=flags) as deployment:
        yield deployment


async def ask(client, prompt=PROMPT, **options):
    tokens, last = [], None
    async for message in client.generate(prompt, Sampling(max_tokens=6), **options):
        tokens += [int(token) for token in message.tokens]
        last = message
    return tokens, last.usage.cache_hit_tokens


async def test_a_deployment_over_tls(deployment, authority, monkeypatch, capsys, tmp_path):
    said = deployment.said
    router = said["router"]["address"]
    # 1. A front end gets answers for its listed tenants, and hits its stored prefixes.
    web = authority.credentials("frontend", "web")
    async with RouterClient(router, credentials=web) as client:
        await until_there(client)
        tokens, cold = await ask(client, tenant="globex")
        assert (len(tokens), cold) == (6, 0)
        assert await ask(client, tenant="globex") == (tokens, 256)
        for other in ("acme", ""):
            with pytest.raises(PermissionDenied, match="only globex"):
                await ask(client, tenant=other)
        with pytest.raises(PermissionDenied):
            await client.status()
    # 2. A tenant's certificate decides the tenant, whatever the request's field says. Another tenant's KV is a miss.
    async with RouterClient(router, credentials=authority.credentials("tenant", "acme")) as client:
        assert await ask(client) == (tokens, 0)
        assert await ask(client, tenant="acme") == (tokens, 256)
        with pytest.raises(PermissionDenied):
            await ask(client, tenant="globex")
    # 3. A tenant's key decides too, over TLS without a certificate.
    await keys_over_grpc(deployment, authority, tokens)
    await keys_over_http(deployment, authority)
    # 4. Workers and store refuse a stolen worker certificate.
    await stolen_worker(deployment, authority)
    # 5. No process can register as another one.
    await registrations(deployment, authority)
    # 6. The operator's commands work with the operator's certificate.
    monkeypatch.setenv("ANTEFIX_CREDENTIALS", str(authority.files("operator", "me").directory))
    assert await asyncio.to_thread(main, ["window", "--router", router, "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["workers"]) == {
        said["prefill"]["address"],
        said["decode"]["address"],
    }
    assert await asyncio.to_thread(main, ["doctor", "--deployment", router, "--json"]) == 0
    findings = {each["check"]: each for each in json.loads(capsys.readouterr().out)["findings"]}
    assert {f"{role} {each['address']}" for role, each in said.items()} < set(findings)
    assert {each["status"] for each in findings.values()} == {"ok"}
    assert "certificate valid for 90 days" in findings[f"kvstore {said['kvstore']['address']}"]["detail"]
    # `top` trusts the operator's CA, and never sends its key unencrypted.
    door = said["router"]["http_address"]
    for url, problem in ((f"https://{door}", "asks for an API key"), (f"http://{door}", "no router answers")):
        assert await asyncio.to_thread(main, ["top", "--url", url, "--json"]) != 0
        assert problem in capsys.readouterr().err
    (tmp_path / "key").write_text("afx-key")
    (tmp_path / "key").chmod(0o600)
    elsewhere = ["top", "--url", "http://10.0.0.1:8000", "--key-file", str(tmp_path / "key"), "--json"]
    assert await asyncio.to_thread(main, elsewhere) == 2
    assert "with TLS only" in capsys.readouterr().err
    for role in said:
        assert "TLS with the certificate" in deployment.log(role)


async def until_there(client):
    """Wait until the workers have registered, which takes a moment."""
    await until(lambda: ask(client, WARM_UP, tenant="globex"), "the workers register", despite=Unavailable)


async def keys_over_grpc(deployment, authority, tokens):
    address = deployment.said["router"]["token_address"]
    bare = grpc.ssl_channel_credentials((authority.ca / "ca.crt").read_bytes())
    message = router_pb2.GenerateRequest(tokens={"ids": PROMPT.tobytes()}, sampling={"max_tokens": 6})
    async with grpc.aio.secure_channel(address, bare) as channel:
        stub = router_pb2_grpc.RouterServiceStub(channel)

        async def generate(key, **changes):
            message.MergeFrom(router_pb2.GenerateRequest(**changes))
            metadata = (("authorization", f"Bearer {key}"),) if key else ()
            with rpc.rpc_errors():
                return [answer async for answer in stub.Generate(message, timeout=AT_MOST_S, metadata=metadata)]

        answers = await generate("acme's key")
        assert answers[-1].usage.cache_hit_tokens == 256
        for key in ("another key", "", deployment.secret.read_text().strip()):
            with pytest.raises(Unauthenticated):
                await generate(key)
        with pytest.raises(PermissionDenied):
            await generate("acme's key", tenant="globex")


async def keys_over_http(deployment, authority):
    address = deployment.said["router"]["http_address"]
    context = ssl.create_default_context(cafile=authority.ca / "ca.crt")

    def get(scheme, key):
        headers = {"authorization": f"Bearer {key}"} if key else {}
        body = json.dumps({"model": "m", "prompt": "Hello", "max_tokens": 2}).encode()
        request = urllib.request.Request(f"{scheme}://{address}/v1/completions", body, headers)
        request.add_header("content-type", "application/json")
        with urllib.request.urlopen(
            request, context=context if scheme == "https" else None, timeout=AT_MOST_S
        ) as answer:
            return answer.status

    assert await asyncio.to_thread(get, "https", "acme's key") == 200
    with pytest.raises(urllib.error.HTTPError, match="401"):
        await asyncio.to_thread(get, "https", "another")
    with pytest.raises((urllib.error.URLError, ConnectionError, OSError)):
        await asyncio.to_thread(get, "http", "acme's key")


async def stolen_worker(deployment, authority):
    stolen = authority.credentials("prefill", "prefill1")
    request = GenerationRequest(tokens=PROMPT, sampling=Sampling(max_tokens=4), caller=Caller(tenant="globex"))
    decode, prefill = (deployment.said[role]["address"] for role in ("decode", "prefill"))
    router = authority.credentials("router", "stolen-too")
    for shown in (stolen, authority.credentials("tenant", "globex"), router):
        # Even the router's certificate is refused, because it has no grant.
        async with DecodeClient(decode, credentials=shown) as client:
            with pytest.raises(PermissionDenied):
                async for _ in client.decode(request, request.sampling, handoff=b"", emitted=(), timeout_s=AT_MOST_S):
                    pass
        async with PrefillClient(prefill, credentials=shown) as client:
            with pytest.raises(PermissionDenied):
                await client.prefill(request, timeout_s=AT_MOST_S)
    # A stolen grant for one tenant and prompt is not valid for another.
    keyring, granter = Keyring.from_file(deployment.secret), authority.granter()
    for tenant, tokens in (("acme", PROMPT), ("globex", PROMPT + 1)):
        grants.hold(granter.grant_for(keyring, tenant, tokens, ttl_s=60))
        async with PrefillClient(prefill, credentials=router) as client:
            with pytest.raises(PermissionDenied, match=r"another tenant|another prompt"):
                await client.prefill(request, timeout_s=AT_MOST_S)
    grants.hold(b"")


async def registrations(deployment, authority):
    keyring = Keyring.from_file(deployment.secret)
    operator = RouterClient(deployment.said["router"]["address"], credentials=authority.credentials("operator", "me"))
    status = await operator.status()
    await operator.close()

    async def register(credentials, role, address, *, secret=keyring, ttl_s=5.0, age_s=0.0):
        said = Registration(
            role=role,
            address=address,
            fingerprint=status.fingerprint,
            instance=b"i" * 16,
            ttl_s=ttl_s,
            said_at_ms=round(1000 * (time.time() - age_s)),
        )
        message = router_pb2.RegisterWorkerRequest(
            role=role,
            address=address,
            fingerprint=said.fingerprint,
            instance=said.instance,
            ttl_s=ttl_s,
            said_at_ms=said.said_at_ms,
            proof=said.proof(secret),
        )
        async with rpc.channel(operator.address, of=Role.ROUTER, credentials=credentials) as channel:
            with rpc.rpc_errors():
                await router_pb2_grpc.RouterServiceStub(channel).RegisterWorker(message, timeout=AT_MOST_S)

    p2 = authority.credentials("prefill", "p2")
    with pytest.raises(PermissionDenied, match="may not register as a decode worker"):
        await register(p2, "decode", "127.0.0.1:9")
    with pytest.raises(PermissionDenied, match=r"may not register at evil\.example"):
        await register(p2, "prefill", "evil.example:9")
    for ttl_s in (5.0, 0.0):
        with pytest.raises(PermissionDenied, match="is registered by prefill1"):
            await register(p2, "prefill", deployment.said["prefill"]["address"], ttl_s=ttl_s)
    for role in ("tenant", "frontend", "router", "kvstore"):
        with pytest.raises(PermissionDenied):
            await register(authority.credentials(role, "acme"), "prefill", "127.0.0.1:9")
    with pytest.raises(Unauthenticated):
        await register(p2, "prefill", "127.0.0.1:9", secret=Keyring(b"a thief's own secret, 32 bytes .."))
    with pytest.raises(Unauthenticated, match="more than 300 s old"):
        await register(p2, "prefill", "127.0.0.1:9", age_s=301)
    with pytest.raises(Unavailable):
        await register(Credentials(Role.PREFILL, keyring=keyring), "prefill", "127.0.0.1:9")
