"""Canaries: a busy deployment gets unique prompts, keys and secrets, and all its outputs are searched for them."""

import asyncio
import contextlib
import io
import logging
import stat
import threading
from pathlib import Path

import httpx2
import numpy as np
import pytest

from antefix import errors
from antefix.outward import outward, without_places
from antefix.telemetry.logs import FORMATS, set_up_logs, tell_of_crashes, trace_of
from antefix.tokenizer import load_tokenizer
from antefix_billing.api_keys import KeyBook, Scope, new_key
from antefix_billing.key_file import write_book
from antefix_console.cli import main
from antefix_console.deployment import Deployment, DeploymentConfig
from antefix_router.gateway.http_errors import NotFound, Provider, error_body
from antefix_router.gateway.notes import IgnoredFields, Notes
from tests.waiting import AT_MOST_S

MODEL = Path(__file__).parents[2] / "models" / "antefix-tiny"
TEXT = "Canary7Prompt says that the vault opens at nine, and Canary7Name holds the key. "
SMALL = ("--pool-bytes", "64M")


@pytest.fixture
async def busy(tmp_path, start_redis, open_umask):
    """A deployment with keys, encryption, Redis with a password, debug logs and traces."""
    pytest.importorskip("opentelemetry.sdk")
    from tests.telemetry.otlp_receiver import receiving

    password = "canary-redis-password"
    server = await asyncio.to_thread(start_redis, "--user", "antefix", "on", f">{password}", "~*", "&*", "+@all")
    (tmp_path / "redis.password").write_text(password)
    (tmp_path / "redis.password").chmod(0o600)
    key, row = new_key("acme", Scope)
    write_book(tmp_path / "keys.json", KeyBook().added(row))
    with receiving() as (receiver, url):
        config = DeploymentConfig(
            model=MODEL,
            data_dir=tmp_path / "data",
            http_address="127.0.0.1:0",
            api_keys_file=str(tmp_path / "keys.json"),
            encrypt=True,
            window_pool=server.url.replace("redis://", "redis://antefix@"),
            redis_password_file=str(tmp_path / "redis.password"),
            log_level="debug",
            log_format="json",
            traces=url,
            grace_s=5.0,
            extra_flags={"prefill": SMALL, "decode": SMALL, "kvstore": ("--budget-bytes", "256M")},
        )
        async with Deployment(config) as deployment:
            yield deployment, key, password, receiver


def requests_of(key):
    """Requests of all kinds of clients: right ones, wrong ones, and some that are cut off."""
    chat = [{"role": "system", "content": TEXT * 3}, {"role": "user", "content": TEXT * 20}]
    ask = {"model": "m", "max_tokens": 4, "messages": chat, "seed": 1}
    auth = {"authorization": f"Bearer {key}"}
    yield "/v1/chat/completions", ask, auth
    yield "/v1/chat/completions", ask, {**auth, "idempotency-key": "again"}
    yield "/v1/chat/completions", ask, {**auth, "idempotency-key": "again"}
    yield "/v1/chat/completions", {**ask, "stream": True, "logprobs": True}, auth
    yield "/v1/messages", {**ask, "messages": chat[1:], "system": TEXT}, {"x-api-key": key}
    yield "/v1/responses", {"model": "m", "input": TEXT * 10, "max_output_tokens": 4, "seed": 1}, auth
    yield "/v1/completions", {"model": "m", "prompt": TEXT, "max_tokens": 4, "seed": 1, "user": "someone"}, auth
    # Wrong requests.
    yield "/v1/chat/completions", ask, {"authorization": f"Bearer {key}x"}
    yield "/v1/chat/completions", {**ask, "messages": TEXT}, auth
    yield "/v1/chat/completions", {**ask, "temperature": TEXT}, auth
    yield "/v1/chat/completions", {**ask, "tools": [{"type": TEXT, "function": {"name": TEXT}}]}, auth
    yield "/v1/chat/completions", {**ask, "response_format": {"type": "json_schema", "json_schema": TEXT}}, auth
    yield "/v1/chat/completions", {**ask, "max_tokens": 10**9}, auth
    yield "/v1/chat/completions", (TEXT + "{").encode(), auth
    yield "/v1/chat/completions", ('{"messages": "' + "\\ud800" + TEXT).encode(), auth
    yield f"/v1/completions?api_key={key}", {"model": "m", "prompt": TEXT, "max_tokens": 2, "seed": 1}, auth


def canaries(key, deployment, password):
    """Texts that must appear nowhere: by name, all forms of each text."""
    tokenizer = load_tokenizer(MODEL)
    ids = [int(token) for token in tokenizer.encode(TEXT)][8:20]
    data = deployment.config.data_dir
    secrets = {name: (data / name).read_text().split()[-1] for name in ("secret", "store.key")}
    receipts = (deployment.config.ledger_dir / "receipts.key").read_text().strip()
    return {
        "prompt": [b"Canary7Prompt", b"Canary7Name", b"vault opens"],
        "token ids": [
            ", ".join(map(str, ids)).encode(),
            ",".join(map(str, ids)).encode(),
            " ".join(map(str, ids)).encode(),
            np.array(ids, "<u4").tobytes(),
            np.array(ids, "<i8").tobytes(),
        ],
        "API key": [key.encode(), key.rpartition("-")[2].encode()],
        "Redis' password": [password.encode()],
        "receipt key": [receipts.encode()],
        **{name: [text.encode(), bytes.fromhex(text)] for name, text in secrets.items()},
    }


# Files whose purpose is to hold one of these secrets.
HOLD = {"secret": "secret", "store.key": "store.key", "receipts.key": "receipt key"}


def found_in(where, data, forms, but=""):
    return [f"{name} in {where}" for name, each in forms.items() if name != but for form in each if form in data]


@pytest.mark.services
@pytest.mark.whole_starts
async def test_a_busy_deployment_leaves_no_canary_anywhere(busy):
    deployment, key, password, receiver = busy
    url = "http://" + deployment.one("router").http_address
    answers = []
    async with httpx2.AsyncClient(base_url=url, timeout=AT_MOST_S) as client:

        async def send(path, body, headers):
            raw = {"content": body} if isinstance(body, bytes) else {"json": body}
            answer = await client.post(path, headers=headers, **raw)
            answers.append((path, answer.status_code, answer.text, dict(answer.headers)))

        for each in requests_of(key):
            await send(*each)
        # A client that leaves, and a worker that dies under its requests.
        with contextlib.suppress(httpx2.TimeoutException):
            await client.post("/v1/chat/completions", json=next(requests_of(key))[1], timeout=0.05)
        killed = deployment.one("decode")
        under_way = [asyncio.create_task(send(*each)) for each in list(requests_of(key))[:4]]
        await asyncio.sleep(0.2)
        await deployment.kill(killed)
        await asyncio.gather(*under_way)
        for each in list(requests_of(key))[:2]:
            await send(*each)
        metrics = {}
        for process in deployment.processes:
            if process.alive:
                metrics[process.role] = (await client.get(f"http://{process.metrics_address}/metrics")).text
    assert {status for _, status, *_ in answers} >= {200, 400, 401, 503}
    forms = canaries(key, deployment, password)
    found = []
    # 1. The process list, as every user of the host sees it, and the processes' environments.
    for process in deployment.processes:
        for name in ("cmdline", "environ"):
            with contextlib.suppress(OSError):
                seen = await asyncio.to_thread(Path(f"/proc/{process.process.pid}/{name}").read_bytes)
                found += found_in(f"{process.role}'s {name}", seen, forms)
                assert not seen or name == "environ" or process.role.encode() in seen.split(b"\0")
    # 2. Metrics, and traces.
    for role, text in metrics.items():
        found += found_in(f"{role}'s metrics", text.encode(), forms)
    await deployment.stop()
    assert len(receiver.spans) > 20
    for span in receiver.spans:
        found += found_in("a trace", f"{span.name} {span.attributes}".encode(), forms)
    # 3. Every file, including logs: its content, and who may open it.
    data = deployment.config.data_dir
    paths = sorted(path for path in data.rglob("*") if path.is_file())
    assert {"logs", "store", "ledger", "usage-log"} <= {path.relative_to(data).parts[0] for path in paths}
    assert any(
        "POST /v1/chat/completions" in path.read_text(errors="replace") for path in paths if "logs" in path.parts
    )
    for path in paths:
        found += found_in(path.relative_to(data), path.read_bytes(), forms, but=HOLD.get(path.name, ""))
    modes = [(path, stat.S_IMODE(path.stat().st_mode)) for path in (data, *data.rglob("*"))]
    found += [f"{path} is {mode:o}" for path, mode in modes if mode != (0o700 if path.is_dir() else 0o600)]
    # 4. Answers have no key, no secret, and no internal names. A client's own text may come back.
    places = [each.address for each in deployment.processes if each.role != "router"]
    inside = {**forms, "a place": [place.encode() for place in (*places, str(data), str(MODEL.parent))]}
    for name in ("prompt", "token ids"):
        del inside[name]
    for path, status, text, headers in answers:
        found += found_in(f"the answer {status} to {path}", f"{text} {headers}".encode(), inside)
    assert found == []


# Output that leaves the deployment.


@pytest.mark.parametrize(
    "place",
    [
        "127.0.0.1:7003", "10.1.2.3", "ipv4:10.1.2.3:7003", "[::1]:7001", "ipv6:%5B::1%5D:7001",
        "worker-3.cluster.local:7002", "decode:7003", "localhost:7001", "http://10.0.0.1:80/v1",
        "redis://user@redis:6379/0", "unix:/run/antefix/store.sock", "/var/lib/antefix/store",
        "/tmp/x/segments/000000000001.seg", "grpc://store:1",
    ],
)  # fmt: skip
def test_no_place_is_told_outside(place):
    for message in (
        f"the service cannot be reached: {place}: refused",
        f"{place} is down",
        f"({place})",
        f"at '{place}'",
    ):
        told = without_places(message)
        assert place not in told
        assert not [part for part in place.replace("/", ":").split(":") if len(part) > 3 and part in told.split()]
        assert "(a service)" in told


@pytest.mark.parametrize(
    "message",
    [
        "no decode worker is left to try", "rate limit: 10 tokens per minute, of which 5 are used", "it is 12:30",
        "the request needs 900 blocks, this worker's pool has 100", "internal error 3f9c01ab; the service's log has it",
        "and/or", "0.5 of 2.0", "model antefix-tiny 1.0", "ratio 3:1",
    ],
)  # fmt: skip
def test_what_is_no_place_stays(message):
    assert without_places(message) == message


@pytest.mark.parametrize("provider", Provider)
def test_errors_from_behind_the_door_go_out_without_places(provider, caplog):
    for kind in (errors.Unavailable, errors.DeadlineExceeded, errors.FingerprintMismatch, errors.Overloaded):
        err = kind("the worker at 10.0.0.7:7003 with /var/lib/antefix failed")
        _, body = error_body(err, provider)
        assert "10.0.0.7" not in str(body)
        assert "/var/lib" not in str(body)
    assert "10.0.0.7:7003" in caplog.text
    # A client's own text may come back unchanged.
    _, body = error_body(errors.InvalidRequest("no image at http://example.com/a.png is read"), provider)
    assert "http://example.com/a.png" in str(body)
    _, body = error_body(NotFound("there is no POST /v1/embeddings"), provider)
    assert "there is no POST /v1/embeddings" in str(body)


def test_a_request_that_ran_out_of_time_learns_which_limit_it_was():
    status, body = error_body(errors.DeadlineExceeded("the time was over"), Provider.OPENAI)
    assert status == 504 and "(--http-timeout-s): ask for fewer output tokens" in body["error"]["message"]


def test_the_same_over_grpc(caplog):
    with pytest.raises(errors.Overloaded) as caught, outward():
        raise errors.Overloaded("10.0.0.7:7003 is full", retry_after_s=3.0)
    assert (str(caught.value), caught.value.retry_after_s) == ("(a service) is full", 3.0)
    assert "10.0.0.7:7003" in caplog.text
    with pytest.raises(KeyError), outward():
        raise KeyError("10.0.0.7:7003")


@pytest.mark.parametrize(
    "name", ["Canary7Prompt says that", "a" * 200, "sk-canary!", "é", "", "messages[0].content is Canary7", "1canary"]
)
def test_a_field_that_is_called_like_a_text_is_counted_without_its_name(name, caplog):
    caplog.set_level(logging.INFO)
    ignored = IgnoredFields()
    notes = Notes(ignored)
    notes.ignore(name)
    notes.ignore("logit_bias")
    notes.ignore("messages[3].content[0].cache-hint")
    notes.close()
    assert set(ignored.counts) == {IgnoredFields.OTHERS, "logit_bias", "messages[].content[].cache-hint"}
    assert not name or name[:20] not in caplog.text


@pytest.mark.parametrize(
    ("role", "flag"),
    [("router", "--traces"), ("kvstore", "--events-redis"), ("prefill", "--window-pool"), ("router", "--keys-redis")],
)
def test_a_password_on_a_command_line_is_refused_and_not_told(role, flag, capsys, monkeypatch):
    url = "https://user:canary-password@collector.example:4317"
    assert main(["serve", role, flag, url, "--print-config"]) == 2
    refused = capsys.readouterr()
    assert "password" in refused.err
    # The password may come from the environment, but the output does not show it.
    monkeypatch.setenv("ANTEFIX_KVSTORE_TRACES", url)
    assert main(["serve", "kvstore", "--print-config"]) == 0
    shown = capsys.readouterr()
    assert "https://user:***@collector.example" in shown.out
    assert "canary" not in refused.out + refused.err + shown.out + shown.err


# The output of a bug in the program.


# A traceback shows lines of the program, so the value must not be in such a line.
VALUE = "-".join(("canary", "value"))


def raise_all():
    try:
        {}[VALUE]
    except KeyError:
        try:
            int(VALUE)
        except ValueError as err:
            raise errors.InternalError("what we say ourselves") from err


@pytest.mark.parametrize("form", FORMATS)
def test_a_trace_has_places_and_kinds_and_no_values(form):
    out = io.StringIO()
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    try:
        set_up_logs("debug", form, out)
        try:
            raise_all()
        except errors.InternalError:
            logging.getLogger("antefix.router").exception("internal error 12")
        group = ExceptionGroup(VALUE, [ValueError(VALUE), errors.InvalidRequest(VALUE)])
        logging.getLogger("antefix.router").error("again", exc_info=group)
        # asyncio logs this if nothing waited for a task.
        loop = asyncio.new_event_loop()
        loop.call_exception_handler({"message": "never retrieved", "exception": KeyError(VALUE), "future": VALUE})
        loop.close()
        tell_of_crashes()
        thread = threading.Thread(target=lambda: {}[VALUE])
        thread.start()
        thread.join()
    finally:
        root.handlers[:], root.level = before, level
    written = out.getvalue()
    assert "canary" not in written
    for expected in ("internal error 12", "what we say ourselves", "builtins.KeyError", "raise_all", "never retrieved"):
        assert expected in written
    assert "ended by a bug" in written


def test_what_the_system_says_of_a_file_is_told():
    try:
        Path("/nonexistent/file").read_text()
    except OSError as err:
        assert "/nonexistent/file" in trace_of(err)
