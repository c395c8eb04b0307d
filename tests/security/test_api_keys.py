"""API keys: permissions, expiry, what is stored of a key, and the effect of errors in key files."""

import contextlib
import json
import stat
from datetime import UTC, datetime, timedelta

import httpx2
import pytest

from antefix.errors import ConfigError, InvalidRequest, PermissionDenied, Unauthenticated
from antefix.security.access_table import TABLE
from antefix.security.credentials import Credentials
from antefix.security.identity import Role
from antefix_billing import api_keys, key_file
from antefix_billing.api_keys import KeyBook, Scope, digest_of, new_key
from antefix_billing.key_register import KeyRegister, Refused
from antefix_billing.receipt import Signer, check_receipt
from antefix_billing.tenants import load_tenants
from antefix_console.cli import main
from antefix_router.front import BillingConfig, open_front
from antefix_router.key_callers import caller_of_key
from antefix_router.load_shedding import LoadShedding
from tests.gateway.scripted import Script, make_front, serving
from tests.waiting import AT_MOST_S

ALL = frozenset(Scope)
SOON = datetime.now(UTC) + timedelta(hours=1)
ASK = {"model": "any", "max_tokens": 3, "messages": [{"role": "user", "content": "hello"}]}


def book_of(*keys):
    book = KeyBook()
    for key in keys:
        book = book.added(key)
    return book


def register_of(*keys):
    register = KeyRegister()
    register.take(book_of(*keys))
    return register


def test_a_key_does_what_its_scopes_say_and_nothing_else():
    for scope in Scope:
        text, key = new_key("acme", [scope])
        register = register_of(key)
        for asked in Scope:
            if asked is scope or (scope, asked) == (Scope.ADMIN, Scope.USAGE):
                assert register.authenticate(text, asked).tenant == "acme"
            else:
                with pytest.raises(PermissionDenied, match=asked.value):
                    register.authenticate(text, asked)
        assert register.refused[Refused.SCOPE] == (1 if scope is Scope.ADMIN else 2)


@pytest.mark.parametrize("wrong", ["", " ", "afx-", "afx-00000000-" + "0" * 48, "é", "\ud800"])
def test_no_key_and_a_wrong_key_are_refused_also_where_no_key_is_known(wrong):
    for register in (KeyRegister(), register_of(new_key("acme")[1])):
        with pytest.raises(Unauthenticated, match="missing or not known"):
            register.authenticate(wrong)


@pytest.mark.parametrize("key", [" ", "k\u00e9y", "two\nlines", "\udcff", "\0"])
def test_a_key_that_no_call_can_carry_is_refused_before_any_call(key):
    with pytest.raises(ConfigError, match="API key"):
        Credentials.of_application(api_key=key)


def test_a_keys_line_end_is_not_sent():
    shown = dict(Credentials.of_application(api_key="key\n").metadata("/antefix.v1.RouterService/Generate"))
    assert shown["authorization"] == "Bearer key"


def test_a_key_ends_when_it_expires_and_at_once_when_it_is_revoked():
    text, key = new_key("acme", expires=SOON)
    register = register_of(key)
    assert register.authenticate(text, now=SOON - timedelta(seconds=1)).key_id == key.id
    with pytest.raises(Unauthenticated, match="expired"):
        register.authenticate(text, now=SOON)
    register.take(api_keys.revoke(register.book, key.id))
    with pytest.raises(Unauthenticated, match="revoked"):
        register.authenticate(text)


def test_a_rotated_key_overlaps_with_the_one_before():
    text, key = new_key("acme", [Scope.USAGE], note="laptop")
    follower, book = api_keys.rotate(book_of(key), key.id, until=SOON)
    register = KeyRegister()
    register.take(book)
    before, after = SOON - timedelta(minutes=1), SOON + timedelta(minutes=1)
    for each, now in ((text, before), (follower, before), (follower, after)):
        assert register.authenticate(each, Scope.USAGE, now).scopes == {Scope.USAGE}
    with pytest.raises(Unauthenticated):
        register.authenticate(text, Scope.USAGE, after)
    # A rotation never extends an old key's time.
    _, book = api_keys.rotate(book, book.keys[-1].id, until=SOON + timedelta(days=1), expires=SOON + timedelta(days=9))
    assert api_keys.rotate(book, key.id, until=SOON + timedelta(days=1))[1].find(key.id).expires == SOON


def test_nobody_goes_back_to_a_book_with_keys_that_were_revoked_since():
    text, key = new_key("acme")
    old = book_of(key)
    register = KeyRegister()
    register.take(api_keys.revoke(old, key.id))
    assert not register.take(old)
    with pytest.raises(Unauthenticated, match="revoked"):
        register.authenticate(text)


def test_a_file_of_keys_holds_none_of_them_and_only_its_owner_reads_it(tmp_path, capsys, open_umask):
    path = tmp_path / "keys" / "api-keys.json"
    assert main(["keys", "create", "acme", "--file", str(path), "--scopes", "generate,usage,admin"]) == 0
    text = capsys.readouterr().out.strip()
    kept = path.read_text()
    assert text not in kept
    assert text.rpartition("-")[2] not in kept
    assert digest_of(text).hex() in kept
    for each in (path, *path.parent.iterdir()):
        assert stat.S_IMODE(each.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert main(["keys", "list", "--file", str(path), "--json"]) == 0
    assert text not in capsys.readouterr().out


def test_the_commands_make_replace_list_and_revoke(tmp_path, capsys):
    file = ["--file", str(tmp_path / "keys.json")]
    out = tmp_path / "acme.key"
    assert main(["keys", "create", "acme", *file, "--expires", "90d", "--note", "ci", "--output", str(out)]) == 0
    assert capsys.readouterr().out == ""
    first = key_file.read_book(file[1]).keys[0]
    assert digest_of(out.read_text().strip()) == first.digest
    assert main(["keys", "rotate", first.id, *file, "--overlap", "1h", "--json"]) == 0
    (made,) = json.loads(capsys.readouterr().out)
    assert (made["tenant"], made["note"], made["state"]) == ("acme", "ci", "valid")
    assert main(["keys", "revoke", first.id, *file]) == 0
    capsys.readouterr()
    assert main(["keys", "list", *file]) == 0
    shown = capsys.readouterr().out
    assert first.id in shown
    assert "revoked" in shown
    register = KeyRegister()
    register.take(key_file.read_book(file[1]))
    assert register.authenticate(made["key"]).tenant == "acme"
    with pytest.raises(Unauthenticated):
        register.authenticate(out.read_text().strip())


@pytest.mark.parametrize(
    "args",
    [
        ["create", "acme", "--scopes", "everything"],
        ["create", "acme", "--scopes", ""],
        ["create", "acme", "--expires", "never"],
        ["create", "acme", "--expires", "2020-01-01"],
        ["create", "a\x1b[2J"],
        ["create", ""],
        ["create", "*"],
        ["revoke", "00000000"],
        ["rotate", "00000000"],
        ["create", "acme", "--redis", "redis://127.0.0.1:1"],
        ["create", "acme", "--redis", "redis://user:canary@127.0.0.1:1", "--secret-file", "x"],
    ],
)
def test_a_wrong_command_changes_nothing(args, tmp_path, capsys):
    path = tmp_path / "keys.json"
    key_file.write_book(path, book_of(new_key("other")[1]))
    before = path.read_text()
    assert main(["keys", *args, "--file", str(path)]) == 2
    assert path.read_text() == before
    assert "canary" not in capsys.readouterr().err


def faulty_books():
    row = json.loads(api_keys.to_json(book_of(new_key("acme")[1])))["keys"][0]
    yield from ("", "[]", "{}", "null", '{"version": 1}', "[" * 100_000, "\x00")
    for rows in ([row, row], [{**row, "scopes": []}], [{**row, "scopes": ["root"]}], [{**row, "sha256": "00"}]):
        yield json.dumps({"version": 1, "number": 1, "keys": rows})
    for change in (
        {"tenant": ""},
        {"tenant": "*"},
        {"tenant": "a\nb"},
        {"id": "x"},
        {"expires": "soon"},
        {"expires": 5},
        {"more": "1"},
    ):
        yield json.dumps({"version": 1, "number": 1, "keys": [{**row, **change}]})
    # The digest of an empty key, which every caller without a key would have.
    yield json.dumps({"version": 1, "number": 1, "keys": [{**row, "sha256": digest_of("").hex()}]})
    yield json.dumps({"version": 2, "number": 1, "keys": [row]})
    yield json.dumps({"version": 1, "number": -1, "keys": [row]})
    yield json.dumps({"version": 1, "number": 1, "keys": [row], "open": True})


@pytest.mark.parametrize("text", faulty := list(faulty_books()), ids=range(len(faulty)))
def test_a_faulty_file_of_keys_is_refused(text, tmp_path):
    path = tmp_path / "keys.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="file of API keys"):
        key_file.read_book(path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        '[[tenant]]\nname = "acme"\n',
        '[[tenant]]\nname = "acme"\napi_key_sha256 = []\n',
        'keys = "needed"\n',
        'keys = "off"\n[[tenant]]\nname = "acme"\n',
        f'keys = "none"\n[[tenant]]\nname = "acme"\napi_key_sha256 = ["{"ab" * 32}"]\n',
        f'[[tenant]]\nname = "acme"\napi_key_sha256 = ["{digest_of("").hex()}"]\n',
        f'[[tenant]]\nname = "*"\napi_key_sha256 = ["{"ab" * 32}"]\n',
        f'[[tenant]]\nname = ""\napi_key_sha256 = ["{"ab" * 32}"]\n',
        f'[[tenant]]\nname = "acme"\napi_keys_sha256 = ["{"ab" * 32}"]\n',
        f'[[tenants]]\nname = "acme"\napi_key_sha256 = ["{"ab" * 32}"]\n',
        f'tenant = ["acme"]\napi_key_sha256 = ["{"ab" * 32}"]\n',
        *(
            f'[[tenant]]\nname = "a"\napi_key_sha256 = ["{"ab" * 32}"]\nlimit = [{{ window = "day", {limit} }}]\n'
            for limit in ('money = "NaN"', 'money = "Infinity"', 'money = "-1"', "tokens = -1", "")
        ),
    ],
)
def test_a_tenants_file_that_would_let_everybody_in_stops_the_start(text, tmp_path):
    path = tmp_path / "tenants.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="tenants file"):
        load_tenants(path)


def test_who_wants_no_keys_says_so_and_limits_hold(tmp_path):
    path = tmp_path / "tenants.toml"
    path.write_text('keys = "none"\n[[tenant]]\nname = "*"\nrequests = 2\n')
    assert not load_tenants(path).needs_keys
    assert load_tenants(path).default.requests == 2
    with pytest.raises(ConfigError, match="there are keys"):
        load_tenants(path, has_other_keys=True)


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_may_change_decides_nothing(mode, tmp_path):
    tenants, keys = tmp_path / "tenants.toml", tmp_path / "keys.json"
    tenants.write_text(f'[[tenant]]\nname = "acme"\napi_key_sha256 = ["{"ab" * 32}"]\n')
    key_file.write_book(keys, book_of(new_key("acme")[1]))
    load_tenants(tenants)
    for path, read in ((tenants, load_tenants), (keys, key_file.read_book)):
        path.chmod(mode)
        with pytest.raises(ConfigError, match="chmod go-w"):
            read(path)


def opened(**settings):
    nothing = dict.fromkeys(("identity", "tokenizer", "keyring"))
    return open_front(
        BillingConfig(**settings), None, fingerprint=b"", shedding=LoadShedding(0.0, lambda: 1), **nothing
    )


GUARDS = [
    ("router", "tenants_file"),
    ("router", "api_keys_file"),
    ("router", "redis_password_file"),
    ("kvstore", "keys_file"),
    ("kvstore", "encrypt_key_file"),
    ("router", "credentials"),
    ("prefill", "credentials"),
    ("kvstore", "redis_ca_file"),
]


@pytest.mark.parametrize(("role", "setting"), GUARDS)
def test_a_setting_that_guards_is_never_empty(role, setting, tmp_path, capsys, monkeypatch):
    """A setting is empty if a variable of a shell was not set."""
    flag = "--" + setting.replace("_", "-")
    assert main(["serve", role, flag, "", "--print-config"]) == 2
    monkeypatch.setenv(f"ANTEFIX_{role}_{setting}".upper(), " ")
    assert main(["serve", role, "--print-config"]) == 2
    monkeypatch.undo()
    (tmp_path / "antefix.toml").write_text(f'[{role}]\n{setting} = ""\n')
    assert main(["serve", role, "--print-config", "--config", str(tmp_path / "antefix.toml")]) == 2
    assert capsys.readouterr().err.count("is empty") == 3


@pytest.mark.parametrize("flag", ["--tenants-file", "--api-keys-file"])
def test_antefix_up_takes_no_empty_name_either(flag, capsys):
    assert main(["up", flag, ""]) == 2
    assert "is empty" in capsys.readouterr().err


@pytest.mark.parametrize("setting", ["tenants_file", "api_keys_file"])
def test_a_file_that_is_not_there_stops_the_start(setting, tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        opened(**{setting: str(tmp_path / "missing")})


@pytest.fixture
async def door(tmp_path):
    """The HTTP API of a router with keys: a client, and a function that makes a key."""
    register = KeyRegister(named={digest_of("old-form"): "old"})

    def key(tenant, *scopes):
        text, row = new_key(tenant, scopes)
        register.take(register.book.added(row))
        return {"authorization": f"Bearer {text}"}

    key.register = register
    signer = Signer.create(tmp_path / "receipts.key")
    front = make_front(Script(), ledger=tmp_path / "ledger", keys=register, signer=signer)
    async with serving(front) as url, httpx2.AsyncClient(base_url=url, timeout=AT_MOST_S) as client:
        yield client, key


GENERATING = {
    "/v1/chat/completions": ASK,
    "/v1/completions": {"model": "any", "prompt": "hello", "max_tokens": 3},
    "/v1/responses": {"model": "any", "input": "hello", "max_output_tokens": 3},
    "/v1/messages": ASK,
    "/v1/messages/count_tokens": ASK,
}


async def test_every_address_of_the_door_asks_for_its_scope(door):
    client, key = door
    generate, usage, admin = (key("acme", scope) for scope in (Scope.GENERATE, Scope.USAGE, Scope.ADMIN))
    for path, body in GENERATING.items():
        assert (await client.post(path, json=body, headers=generate)).status_code == 200
        for headers, status in ((usage, 403), (admin, 403), ({}, 401), ({"x-api-key": "wrong"}, 401)):
            assert (await client.post(path, json=body, headers=headers)).status_code == status, path
    for headers, status in ((generate, 200), (usage, 403), ({}, 401)):
        assert (await client.get("/v1/models", headers=headers)).status_code == status
    for headers, status in ((generate, 403), (usage, 404), (admin, 404), ({}, 401)):
        assert (await client.get("/v1/usage/receipts/none", headers=headers)).status_code == status
    # Public paths, which reveal nothing about any tenant.
    assert (await client.get("/healthz")).status_code == 200
    assert (await client.get("/v1/usage/public_key")).status_code == 200


async def test_keys_of_the_old_form_generate_and_read_their_own_receipts(door):
    client, _ = door
    headers = {"x-api-key": "old-form"}
    assert (await client.post("/v1/messages", json=ASK, headers=headers)).status_code == 200
    assert (await client.get("/v1/usage/receipts/none", headers=headers)).status_code == 404


async def test_a_receipt_is_for_its_tenant_and_for_admins(door):
    client, key = door
    mine, other, admin = key("acme", Scope.GENERATE, Scope.USAGE), key("other", Scope.USAGE), key("ops", Scope.ADMIN)
    answer = await client.post("/v1/chat/completions", json=ASK, headers={**mine, "idempotency-key": "r1"})
    assert answer.status_code == 200
    where = "/v1/usage/receipts/r1"
    receipt = (await client.get(where, headers=mine)).json()
    public = bytes.fromhex((await client.get("/v1/usage/public_key")).json()["public_key"])
    assert check_receipt(receipt, public).ok
    assert (await client.get(where, headers=other)).status_code == 404
    assert (await client.get(where, params={"tenant": "acme"}, headers=other)).status_code == 403
    assert (await client.get(where, params={"tenant": "acme"}, headers=admin)).json() == receipt


async def test_a_revoked_key_is_refused_from_the_next_request_on(door):
    client, key = door
    headers = key("acme", Scope.GENERATE)
    assert (await client.post("/v1/messages", json=ASK, headers=headers)).status_code == 200
    register = key.register
    register.take(api_keys.revoke(register.book, register.book.keys[0].id))
    refused = await client.post("/v1/messages", json=ASK, headers=headers)
    assert (refused.status_code, refused.json()["error"]["message"]) == (401, "the API key is revoked")


def test_an_unknown_key_id_says_so():
    with pytest.raises(InvalidRequest, match="no key"):
        KeyBook().find("00000000")


GENERATE, EXPORT = "/antefix.v1.RouterService/Generate", "/antefix.v1.UsageService/Export"
HEALTH = "/grpc.health.v1.Health/Check"


def test_over_grpc_a_key_does_what_its_scopes_say_too():
    texts, rows = zip(*(new_key("acme", [scope]) for scope in Scope), strict=True)
    register = register_of(*rows)
    generate, usage, admin = texts
    own = caller_of_key(register, generate, GENERATE)
    # The bill names the key that the caller used.
    assert (own.role, own.tenant(""), own.key_id) == (Role.TENANT, "acme", rows[0].id)
    assert caller_of_key(register, usage, EXPORT).tenant("") == "acme"
    with pytest.raises(PermissionDenied):
        caller_of_key(register, usage, EXPORT).tenant("other")
    assert caller_of_key(register, admin, EXPORT).tenant("other") == "other"
    for key, method in ((generate, EXPORT), (usage, GENERATE), (admin, GENERATE)):
        with pytest.raises(PermissionDenied, match="scope"):
            caller_of_key(register, key, method)
    for key in texts:
        assert caller_of_key(register, key, HEALTH).role is not Role.OPERATOR
    with pytest.raises(Unauthenticated):
        caller_of_key(register, "wrong", HEALTH)
    # An admin's key allows no other methods.
    for method in TABLE:
        if not method.startswith("/antefix.v1.UsageService/"):
            with contextlib.suppress(PermissionDenied):
                assert caller_of_key(register, admin, method).role is Role.TENANT


def test_a_command_with_an_empty_name_of_credentials_does_not_go_without_tls(monkeypatch, capsys):
    monkeypatch.setenv("ANTEFIX_CREDENTIALS", "")
    assert main(["window", "--router", "127.0.0.1:1"]) == 2
    assert "ANTEFIX_CREDENTIALS is empty" in capsys.readouterr().err
