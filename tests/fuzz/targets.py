"""The readers of outside bytes, one function each. A reader may refuse bytes with an error of ours, and nothing else.

If a checksum guards a format, the target corrects it, because an attacker with the file can do what a fuzzer cannot.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import shutil
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from antefix.byte_size import parse_byte_size
from antefix.checked_files import parse_json, read_toml
from antefix.errors import AntefixError, InternalError
from antefix.events.event_seal import EventCheck, EventKeys
from antefix.events.kv_events import decode_batch
from antefix.events.redis_stream import _unpack
from antefix.request_limits import Unreadable, reading
from antefix.secret import read_generations
from antefix.security.grants import GrantCheck, public_keys, secret_keys
from antefix.security.identity_file import load_identities
from antefix.security.listening import parse_address
from antefix.store.payload_wire import unpack_get_response, unpack_put_request
from antefix.store.pieces import RecordAssembler
from antefix.store_files import codec, hit_log
from antefix.store_files.record_format import sign, unpack_entry, unpack_identity, unpack_segment_header
from antefix.store_files.record_header import RECORD_HEADER_BYTES, unpack_record_header
from antefix.v1 import kvstore_pb2, prefill_pb2, router_pb2, usage_pb2, window_pb2
from antefix.window_pool import pool_format
from antefix_billing import ledger_format
from antefix_billing.api_keys import from_json
from antefix_billing.ratecard import load_cards
from antefix_billing.tenants import load_tenants
from antefix_billing.usage_record import OpenEntry, UsageRecord
from antefix_prefill.handoff import Handoff
from antefix_router.chat.dsml import DeepSeekV4Parser
from antefix_router.chat.moved_lines import load_rules
from antefix_router.gateway.model_names import load_aliases
from antefix_router.gateway.user_names import split_user
from antefix_simulate import trace
from antefix_simulate.logs.import_log import LOG_FORMATS, ImportSetup, import_log
from antefix_simulate.trace_file import write_trace

Target = Callable[[bytes], None]
TARGETS: dict[str, Target] = {}
MESSAGES = [
    kvstore_pb2.LookupRequest,
    kvstore_pb2.TouchRequest,
    kvstore_pb2.PinRequest,
    kvstore_pb2.RegisterRequest,
    prefill_pb2.PrefillRequest,
    router_pb2.GenerateRequest,
    router_pb2.RegisterWorkerRequest,
    usage_pb2.ExportRequest,
    window_pb2.SetStrategyRequest,
]


def target(read: Target) -> Target:
    """Registers a reader under its name. The reader may raise our errors, but an InternalError is a bug."""

    @functools.wraps(read)
    def guarded(data: bytes) -> None:
        try:
            read(data)
        except InternalError:
            raise
        except AntefixError as err:
            assert len(str(err)) < 5000, "an error repeats what it was given"

    TARGETS[read.__name__] = guarded
    return guarded


@functools.cache
def scratch() -> Path:
    directory = Path(tempfile.mkdtemp(prefix="antefix-fuzz-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


def as_file(data: bytes, name: str = "input") -> Path:
    path = scratch() / name
    path.write_bytes(data)
    path.chmod(0o600)
    return path


# --- over the network ------------------------------------------------------------------------------------------------


@target
def grpc_requests(data: bytes) -> None:
    kind, raw = MESSAGES[data[0] % len(MESSAGES)] if data else MESSAGES[0], data[1:]
    reading(kind.FromString)(raw)


@target
def put_pieces(data: bytes) -> None:
    assembler = RecordAssembler(1 << 20)
    size = 1 + (data[0] if data else 0)
    for at in range(1, len(data), size * 8):
        piece = reading(unpack_put_request)(data[at : at + size * 8])
        if not isinstance(piece, Unreadable):
            assembler.add(piece)
    assembler.end()


@target
def get_responses(data: bytes) -> None:
    unpack_get_response(data)


@target
def grants(data: bytes) -> None:
    keys = secret_keys(_keyring())
    GrantCheck(lambda: keys).check(data)


@target
def kv_events(data: bytes) -> None:
    decode_batch(data)


@target
def redis_events(data: bytes) -> None:
    names = (b"k", b"b", b"f", b"g", b"m", b"a", b"s", b"e")
    fields = dict(zip(names, data.split(b"\xff"), strict=False))
    EventCheck(EventKeys({1: bytes(16)}, generation=1)).lets_in("s", fields)
    try:
        _unpack(fields)
    except (KeyError, ValueError):
        return  # the caller treats this as an entry that is not one of our events


@target
def addresses(data: bytes) -> None:
    parse_address(data.decode(errors="surrogateescape"))


@target
def sizes(data: bytes) -> None:
    parse_byte_size(data.decode(errors="surrogateescape"))


@target
def user_names(data: bytes) -> None:
    split_user(data.decode(errors="replace"))


# --- HTTP ------------------------------------------------------------------------------------------------------------

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens")


@functools.cache
def _door() -> tuple[asyncio.AbstractEventLoop, Any, Any]:
    import httpx2

    from antefix_router.gateway.access import HttpMeasures
    from antefix_router.gateway.app import build_app
    from antefix_router.gateway.gateway import Gateway
    from antefix_router.gateway.gateway_config import GatewayConfig
    from tests.gateway.scripted import Script, make_front

    loop = asyncio.new_event_loop()
    front = make_front(Script(), ledger=None)
    config = GatewayConfig(chat_format="deepseek-v4")

    async def open_door() -> Any:
        app = build_app(Gateway(front, config), config, HttpMeasures(list(PATHS)))
        return httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://fuzz")

    return loop, front, loop.run_until_complete(open_door())


@target
def http_bodies(data: bytes) -> None:
    loop, front, client = _door()
    path, body = PATHS[data[0] % len(PATHS)] if data else PATHS[0], data[1:]
    answer = loop.run_until_complete(client.post(path, content=body))
    assert answer.status_code < 500, (answer.status_code, answer.text[:500])
    assert not front.accounts._running, "a request was left running"


@target
def written_calls(data: bytes) -> None:
    parser = DeepSeekV4Parser(in_reasoning=bool(data[:1]) and data[0] & 1 == 1, has_tools=True)
    text = data[1:].decode(errors="replace")
    whole = [*parser.push(text), *parser.finish()]
    parser = DeepSeekV4Parser(in_reasoning=bool(data[:1]) and data[0] & 1 == 1, has_tools=True)
    for letter in text:
        parser.push(letter)
    parser.finish()
    assert whole is not None


# --- files of ours ---------------------------------------------------------------------------------------------------


def _keyring() -> Any:
    from antefix.secret import Keyring

    return Keyring(bytes(32))


@target
def store_files(data: bytes) -> None:
    unpack_entry(data, b"k")
    for read in (unpack_identity, unpack_segment_header):
        try:
            read(sign(data, 0))
        except AntefixError:
            continue
    unpack_record_header(sign(data.ljust(RECORD_HEADER_BYTES, b"\0")[:RECORD_HEADER_BYTES], 7), 7)


@target
def coded_payloads(data: bytes) -> None:
    codec.decode(data, memoryview(bytearray(4096)))


@target
def pooled_values(data: bytes) -> None:
    names = {"name": bytes(32), "fingerprint": bytes(32)}
    try:
        pool_format.unpack(data, **names)
    except AntefixError:
        head = sign(data.ljust(RECORD_HEADER_BYTES, b"\0")[:RECORD_HEADER_BYTES], 0)
        pool_format.unpack(head + data[RECORD_HEADER_BYTES:], **names)


@target
def handoffs(data: bytes) -> None:
    Handoff.from_bytes(data)


@target
def ledger_entries(data: bytes) -> None:
    for entry in ledger_format.entries_of(data, 0):
        assert entry.payload is not None
    head = data[:60]
    ledger_format.unpack_segment_header(head + zlib.crc32(head).to_bytes(4, "little"))


@target
def usage_records(data: bytes) -> None:
    for read in (OpenEntry.from_payload, UsageRecord.from_payload):
        try:
            read(data)
        except AntefixError:
            continue


@target
def store_logs(data: bytes) -> None:
    path = as_file(data, "store-1.log")
    for event in hit_log.read_store_log(path.parent):
        assert event.time_us >= 0
    path.unlink()


# --- files that operators write --------------------------------------------------------------------------------------


@target
def toml_files(data: bytes) -> None:
    readers = (load_tenants, lambda path: load_cards([path]), load_identities, load_rules, load_aliases)
    read = readers[data[0] % len(readers)] if data else load_tenants
    path = as_file(data[1:])
    read(str(path) if read in (load_rules, load_aliases) else path)  # type: ignore[operator]


@target
def settings_files(data: bytes) -> None:
    import argparse

    from antefix.config import add_file_flags, add_flags, resolve
    from antefix_console.catalog import ROLES

    config_type = ROLES["kvstore"].load()[0]
    parser = argparse.ArgumentParser()
    add_flags(parser, config_type)
    add_file_flags(parser)
    path = as_file(data)
    resolve(config_type, parser.parse_args(["--config", str(path)]), {}, section="kvstore")
    read_toml(path, "settings")


@target
def key_books(data: bytes) -> None:
    from_json(data)


@target
def secrets_files(data: bytes) -> None:
    path = as_file(data)
    try:
        public_keys(data)
    except AntefixError:
        read_generations(path)


@target
def model_configs(data: bytes) -> None:
    from antefix.layout import KVGeometry
    from antefix.model.model_config import ModelConfig
    from antefix.model_dir import read_config

    path = as_file(data, "config.json")
    config = read_config(path.parent)
    with contextlib.suppress(AntefixError):
        KVGeometry.from_config(config)
    ModelConfig.from_dict(config)


@target
def tokenizer_files(data: bytes) -> None:
    from antefix.tokenizer import load_tokenizer

    for name in ("tokenizer.json", "antefix_tokenizer.json"):
        path = as_file(data, name)
        try:
            tokenizer = load_tokenizer(path.parent)
            tokenizer.decode(tokenizer.encode("The fox, 东 \x00 é")[:20])
        except InternalError:
            raise
        except AntefixError:
            continue
        finally:
            path.unlink()


@target
def safetensors_headers(data: bytes) -> None:
    from antefix.model.checkpoint import read_header

    read_header(as_file(len(data).to_bytes(8, "little") + data + bytes(64), "model.safetensors"))


@target
def chat_templates(data: bytes) -> None:
    from antefix_router.chat.messages import ChatRole, Conversation, Message
    from antefix_router.chat.template import TemplateFormat

    model = scratch() / "none"
    messages = (Message(role=ChatRole.SYSTEM, content="s"), Message(role=ChatRole.USER, content="u"))
    made = TemplateFormat(data.decode(errors="replace")[:300], model)
    made.render(Conversation(messages=messages))


@target
def traces(data: bytes) -> None:
    name = ("mooncake", "claude-code", "antefix")[data[0] % 3 if data else 0]
    trace.load(as_file(data[1:], "trace.jsonl"), name, block_size=512)


@target
def request_logs(data: bytes) -> None:
    log_format = list(LOG_FORMATS)[data[0] % len(LOG_FORMATS) if data else 0]
    suffix = "csv" if data[:1] > b"\x80" else "jsonl"
    setup = ImportSetup(key=bytes(32), unit_tokens=4)
    log = as_file(data[1:], f"requests.{suffix}")
    imported = import_log([log], log_format, setup, progress=lambda number: None)
    out = scratch() / "imported.jsonl"
    write_trace(out, imported.requests, unit_tokens=4, about={})
    trace.load(out, "antefix", block_size=4)


@target
def json_texts(data: bytes) -> None:
    parse_json(data, "text")
