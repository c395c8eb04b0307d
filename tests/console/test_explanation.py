"""`antefix explain` reads only files and says of every block what happened to it, and why later blocks miss."""

import asyncio
import contextlib
import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from antefix import rpc
from antefix.block import chain_of
from antefix.layout import KVFormat
from antefix.model_dir import identify
from antefix.record import Record, RecordKind
from antefix.secret import Keyring
from antefix.store.remote_store import RemoteStore
from antefix.store_files.hit_log import StoreLog
from antefix.store_files.page_cache import PageCache
from antefix.v1 import kvstore_pb2, prefill_pb2, prefill_pb2_grpc
from antefix.window_pool import StoreMemoryPool
from antefix_console.cli import main
from antefix_kvstore.kvstore_config import KvStoreConfig
from antefix_kvstore.server import KvStoreServicer, register
from antefix_kvstore.storage_engine import StorageEngine

MODEL = Path(__file__).parents[2] / "models" / "antefix-tiny"
SIZE = 64
TOKENS = np.random.default_rng(41).integers(0, 256, 10 * SIZE + 7).astype(np.uint32)


class Deployed:
    """The directory that `antefix up` leaves: a secret, a store with a part of the prompt, and the store's log."""

    def __init__(self, directory):
        self.directory = directory
        self.identity = identify(MODEL)
        # The secret is fixed, so that block names are the same in each run. Two names may share a slot of the store's
        # memory.
        (directory / "secret").write_text("5a" * 32 + "\n")
        self.keyring = Keyring.from_file(directory / "secret")
        self.now_ms = [time.time_ns() // 1_000_000]
        config = KvStoreConfig(dir=str(directory / "store"), budget_bytes=64 << 20, compression="off")
        self.store = StorageEngine(config, clock_ms=lambda: self.now_ms[0])
        (directory / "tokens.json").write_text(json.dumps([int(token) for token in TOKENS]))

    def names(self, tokens=TOKENS, tenant="", kv_format=KVFormat.FP8, exactness="exact", namespace="default"):
        digest = self.identity.fingerprint(kv_format, namespace=namespace, exactness=exactness).digest
        return digest, chain_of(tokens, fingerprint_digest=digest, key=self.keyring.key(tenant), block_size=SIZE)

    def put(self, num_blocks, checkpoints=(), ttl_s=None, checkpoint_ttl_s=None, **kwargs):
        digest, chain = self.names(**kwargs)
        layout = self.identity.layout(kwargs.get("kv_format", KVFormat.FP8))
        records = []
        for index in range(num_blocks):
            shared = {
                "hash": chain.hashes[index], "parent": chain.parent(index), "fingerprint": digest,
                "position": (index + 1) * SIZE, "ttl_s": ttl_s,
            }  # fmt: skip
            payload = bytes([index + 1]) * layout.block_bytes
            records.append(Record(kind=RecordKind.BLOCK, payload=payload, **shared))
            if index + 1 in checkpoints:
                shared["ttl_s"] = checkpoint_ttl_s or ttl_s
                records.append(Record(kind=RecordKind.CHECKPOINT, payload=bytes(layout.checkpoint_bytes), **shared))
        assert not self.store.put(records).refused

    def explain(self, capsys, *flags, as_json=True):
        argv = ["explain", "--data-dir", str(self.directory), "--tokens-file", str(self.directory / "tokens.json")]
        assert main([*argv, *flags, *(["--json"] if as_json else [])]) == 0
        out = capsys.readouterr().out
        return json.loads(out) if as_json else out

    def states(self, answer):
        return [block["state"] for block in answer["blocks"]]


@pytest.fixture
def deployed(tmp_path):
    made = Deployed(tmp_path)
    yield made
    if made.store.is_open:
        made.store.close()


def test_an_empty_store_misses_from_the_first_block(deployed, capsys):
    answer = deployed.explain(capsys)
    assert deployed.states(answer) == ["first_seen"] * 10
    assert (answer["hit_tokens"], answer["miss_reason"], answer["plan"]["kind"]) == (0, "first_seen", "cold")


def test_a_stored_prefix_with_its_checkpoint_is_resumed(deployed, capsys):
    deployed.put(8, checkpoints=(3, 8))
    answer = deployed.explain(capsys, "--prefill-rate", "200")
    assert deployed.states(answer) == ["stored"] * 8 + ["first_seen"] * 2
    assert answer["checkpoints"] == [3 * SIZE, 8 * SIZE]
    assert (answer["plan"]["kind"], answer["hit_tokens"], answer["miss_tokens"]) == ("checkpoint", 512, 135)
    assert answer["miss_reason"] == "first_seen"
    assert {plan["kind"] for plan in answer["plans"]} == {"checkpoint", "replay", "cold"}
    place = answer["blocks"][7]["place"]
    assert place["payload_bytes"] == deployed.identity.layout(KVFormat.FP8).block_bytes
    assert place["expires_s"] > 3600
    assert answer["blocks"][7]["checkpoint"] and not answer["blocks"][6]["checkpoint"]


def test_it_tells_what_the_page_cache_has(deployed, capsys, monkeypatch):
    def resident(self, entries):
        return {(entry.segment, entry.offset): entry.position <= 3 * SIZE for entry in entries}

    monkeypatch.setattr(PageCache, "_resident", resident)
    deployed.put(8)
    answer = deployed.explain(capsys)
    assert [block["cached"] for block in answer["blocks"]] == [True] * 3 + [False] * 5 + [None] * 2
    assert "3 of 8 in this host's page cache now" in deployed.explain(capsys, as_json=False)


def test_without_a_checkpoint_near_the_end_window_state_is_what_is_missing(deployed, capsys):
    deployed.put(10, checkpoints=(9,))
    answer = deployed.explain(capsys, "--prefill-rate", "200")
    assert (answer["stored_blocks"], answer["hit_tokens"], answer["miss_reason"]) == (10, 9 * SIZE, "window_missing")


def test_the_whole_prompt_stored_leaves_nothing_to_explain(deployed, capsys):
    deployed.put(10, checkpoints=(10,))
    answer = deployed.explain(capsys, "--prefill-rate", "200")
    assert (answer["hit_tokens"], answer["miss_reason"]) == (10 * SIZE, "")


def test_expired_blocks_say_so(deployed, capsys):
    deployed.now_ms[0] -= 60_000
    deployed.put(4, ttl_s=5.0)
    answer = deployed.explain(capsys)
    assert deployed.states(answer)[:4] == ["stored"] * 3 + [
        "expired"
    ]  # a parent lives as long as its children are kept
    assert answer["miss_reason"] in ("expired", "window_missing")


def test_a_corrupt_block_is_found_by_reading_and_hides_what_follows(deployed, capsys, tmp_path):
    deployed.put(6, checkpoints=(6,))
    segment = next((tmp_path / "store").rglob("*.seg*"))
    data = bytearray(segment.read_bytes())
    at = data.find(b"\x03" * 1000)
    data[at + 10] ^= 1
    segment.write_bytes(bytes(data))
    assert deployed.states(deployed.explain(capsys))[:6] == ["stored"] * 6
    answer = deployed.explain(capsys, "--check", "--prefill-rate", "200")
    assert deployed.states(answer)[:6] == ["stored"] * 2 + ["corrupt"] + ["unreachable"] * 3
    assert answer["stored_blocks"] == 2 and answer["checkpoints"] == []


def test_the_same_tokens_under_another_format_or_exactness_are_told(deployed, capsys):
    deployed.put(5, kv_format=KVFormat.FLOAT32)
    deployed.put(2, exactness="bounded-1")
    answer = deployed.explain(capsys)
    assert deployed.states(answer) == ["fingerprint_differs"] * 5 + ["first_seen"] * 5
    assert answer["miss_reason"] == "fingerprint_differs" and answer["hit_tokens"] == 0
    assert "float32" in answer["blocks"][4]["detail"]
    assert deployed.explain(capsys, "--bounded-windows", "1")["stored_blocks"] == 2


def test_the_stores_log_tells_evicted_from_never_seen(deployed, capsys):
    _, chain = deployed.names()
    log = StoreLog(deployed.directory / "usage-log")
    log.stored(chain.hashes[:6])
    log.close()
    deployed.put(4)
    answer = deployed.explain(capsys)
    assert deployed.states(answer) == ["stored"] * 4 + ["evicted"] * 2 + ["first_seen"] * 4


def test_the_store_itself_remembers_what_it_let_go(deployed, capsys):
    deployed.put(4)
    _, chain = deployed.names()
    deployed.store.evict([(RecordKind.BLOCK, chain.hashes[2])])
    answer = deployed.explain(capsys)
    assert deployed.states(answer) == ["stored"] * 2 + ["evicted"] * 2 + ["first_seen"] * 6
    deployed.store.evict([(RecordKind.BLOCK, chain.hashes[0])])
    assert deployed.explain(capsys)["miss_reason"] == "evicted"


def test_another_tenants_and_users_blocks_are_never_seen(deployed, capsys):
    deployed.put(3, tenant="acme")
    deployed.put(4, tenant="acme\x1fann")
    assert deployed.explain(capsys)["stored_blocks"] == 0
    assert deployed.explain(capsys, "--tenant", "acme")["stored_blocks"] == 3
    assert deployed.explain(capsys, "--tenant", "acme", "--user", "ann")["stored_blocks"] == 4


def test_a_prompt_below_one_block_is_below_minimum(deployed, capsys):
    (deployed.directory / "tokens.json").write_text("[1, 2, 3]")
    answer = deployed.explain(capsys)
    assert (answer["miss_reason"], answer["num_blocks"]) == ("below_minimum", 0)
    assert "below_minimum" in deployed.explain(capsys, as_json=False)


def test_the_text_says_what_is_there_what_is_done_and_why_the_rest_misses(deployed, capsys):
    deployed.put(8, checkpoints=(8,))
    text = deployed.explain(capsys, "--prefill-rate", "200", as_json=False)
    for expected in (
        "512 of 647 prompt tokens would be hits (79%), by resuming from a checkpoint",
        "8 of 10 blocks can be used",
        "tokens 0 to 511: stored",
        "tokens 512 to 639: first_seen",
        "a worker with empty memory that prefills 200 tokens/s:",
        "-> checkpoint",
        "Why the rest misses: first_seen",
        "What to do:",
    ):
        assert expected in text, text


def test_a_store_that_is_in_use_and_one_that_is_not_read_alike(deployed, capsys):
    deployed.put(8, checkpoints=(8,))
    while_open = deployed.explain(capsys)
    deployed.store.close()
    closed = deployed.explain(capsys)
    assert deployed.states(while_open) == deployed.states(closed)


def test_a_prompt_that_several_stores_share_is_explained_from_all_of_them(deployed, capsys):
    digest, chain = deployed.names()
    deployed.put(6)
    config = KvStoreConfig(dir=str(deployed.directory / "store-2"), budget_bytes=64 << 20, compression="off")
    with contextlib.closing(StorageEngine(config)) as other:
        payload = bytes(deployed.identity.layout(KVFormat.FP8).block_bytes)
        shared = {"fingerprint": digest, "payload": payload, "parent_elsewhere": True}
        for index in range(6, 9):
            block = {"hash": chain.hashes[index], "parent": chain.parent(index), "position": (index + 1) * SIZE}
            other.put([Record(kind=RecordKind.BLOCK, **block, **shared)])
    answer = deployed.explain(capsys)
    assert deployed.states(answer)[:9] == ["stored"] * 9
    stores = [Path(block["store"]).name for block in answer["blocks"][:9]]
    assert stores == ["store"] * 6 + ["store-2"] * 3


def test_an_empty_store_and_one_that_has_only_others_kv_are_told_apart(deployed, capsys):
    assert deployed.explain(capsys)["miss_detail"] == "the store is empty"
    deployed.put(5, namespace="agents")
    answer = deployed.explain(capsys)
    assert (answer["miss_reason"], answer["hit_tokens"]) == ("fingerprint_differs", 0)
    assert "another one is there" in answer["miss_detail"]


def test_it_looks_under_other_namespaces_tenants_and_models_when_asked(deployed, capsys, tmp_path):
    deployed.put(5, namespace="agents")
    deployed.put(3, tenant="acme")
    text = deployed.explain(capsys, "--also-namespace", "agents", as_json=False)
    assert "these tokens are stored, but under namespace agents" in text
    text = deployed.explain(capsys, "--also-tenant", "acme", as_json=False)
    assert "these tokens are stored, but under tenant acme" in text
    assert "Nor are these tokens" not in text
    text = deployed.explain(capsys, "--also-tenant", "acm", "--also-namespace", "batch", as_json=False)
    assert "Nor are these tokens stored under namespace batch, tenant acm." in text
    text = deployed.explain(capsys, "--tenant", "acme", "--namespace", "agents", "--also-tenant", "", as_json=False)
    assert "these tokens are stored, but under no tenant" in text
    other = tmp_path / "other"
    shutil.copytree(MODEL, other, ignore=shutil.ignore_patterns("figures"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    answer = deployed.explain(capsys, "--model", str(other), "--namespace", "agents", "--also-model", str(MODEL))
    assert f"under model {MODEL}" in answer["blocks"][0]["detail"]


def test_a_checkpoint_that_expired_is_told_with_its_age(deployed, capsys):
    deployed.now_ms[0] -= 3_600_000
    deployed.put(8, checkpoints=(8,), checkpoint_ttl_s=600.0)
    text = deployed.explain(capsys, "--prefill-rate", "2000", as_json=False)
    assert "after 512 tokens one expired 50 min ago" in text
    assert "Checkpoints of window state on disk, after so many tokens: none" in text


def test_a_replay_says_what_it_runs(deployed, capsys):
    deployed.put(10)
    text = deployed.explain(capsys, "--prefill-rate", "200", as_json=False)
    assert (
        "448 tokens are run again to rebuild window state to the bit, for 190 tokens' time; nothing is written" in text
    )


def test_a_window_pool_that_is_down_is_told_and_the_rest_explained(deployed, capsys):
    deployed.put(10)
    text = deployed.explain(capsys, "--window-pool", "redis://127.0.0.1:1/0", "--prefill-rate", "200", as_json=False)
    assert "the window pool does not answer, so workers do without it" in text
    assert "by exact replay" in text
    assert "a window pool was not asked" in deployed.explain(capsys, as_json=False)


async def test_a_checkpoint_in_the_store_services_memory_is_found(deployed, capsys):
    digest, chain = deployed.names()
    deployed.put(10)
    record = Record(
        kind=RecordKind.CHECKPOINT, hash=chain.hashes[9], parent=chain.parent(9), fingerprint=digest,
        position=10 * SIZE, payload=bytes(deployed.identity.layout(KVFormat.FP8).checkpoint_bytes), ttl_s=60.0,
    )  # fmt: skip
    servicer = KvStoreServicer(deployed.store)
    started = await rpc.start_server("127.0.0.1:0", lambda target: register(servicer, target), [kvstore_pb2.DESCRIPTOR])
    store = RemoteStore(started.address)
    try:
        assert await StoreMemoryPool(store).put(record)
        flags = ("--window-pool", "memory", "--store-address", started.address, "--prefill-rate", "200")
        answer = await asyncio.to_thread(deployed.explain, capsys, *flags)
    finally:
        await store.close()
        await started.drain(0.2)
        await servicer.close()
    assert (answer["plan"]["kind"], answer["plan"]["checkpoint_tier"]) == ("checkpoint", "pool")
    assert answer["checkpoints_in_pool"] == [10 * SIZE] and answer["checkpoints"] == []


async def test_a_running_workers_speed_is_asked_for(deployed, capsys):
    class Worker(prefill_pb2_grpc.PrefillServiceServicer):
        async def PrefillStatus(self, request, context):
            return prefill_pb2.PrefillStatusResponse(prefill_tokens_per_s=5.0)

    def register(server):
        prefill_pb2_grpc.add_PrefillServiceServicer_to_server(Worker(), server)

    started = await rpc.start_server("127.0.0.1:0", register, [prefill_pb2.DESCRIPTOR])
    try:
        slow = await asyncio.to_thread(deployed.explain, capsys, "--worker", started.address)
    finally:
        await started.drain(0.2)
    usual = await asyncio.to_thread(deployed.explain, capsys)
    assert slow["plan"]["predicted_s"] > 10 * usual["plan"]["predicted_s"]


def test_a_worker_that_does_not_answer_is_told(deployed, capsys):
    argv = ["explain", "--data-dir", str(deployed.directory), "--tokens-file", str(deployed.directory / "tokens.json")]
    assert main([*argv, "--worker", "127.0.0.1:1"]) == 3
    assert "the service cannot be reached" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["[1, 2", "", '{"a": 1}', '["x"]', "[-1]"])
def test_an_invalid_tokens_file_is_refused(deployed, capsys, text):
    (deployed.directory / "tokens.json").write_text(text)
    argv = ["explain", "--data-dir", str(deployed.directory), "--tokens-file", str(deployed.directory / "tokens.json")]
    assert main(argv) == 2
    told = capsys.readouterr().err
    assert "is not JSON" in told or "a JSON list of token ids" in told


@pytest.mark.parametrize(
    ("flags", "code", "told"),
    [
        ((), 2, "--data-dir"),
        (("--data-dir", "/nowhere"), 2, "secret"),
        (("--data-dir", "DATA", "--prefill-rate", "0"), 2, "--prefill-rate must be above 0"),
        (("--data-dir", "DATA", "--arithmetic", "abacus"), 2, "device and a dtype"),
        (("--store-dir", "/nowhere", "--secret-file", "SECRET"), 3, "no readable store"),
    ],
)
def test_a_wrong_call_says_what_is_missing(deployed, capsys, flags, code, told):
    places = {"SECRET": str(deployed.directory / "secret"), "DATA": str(deployed.directory)}
    flags = [places.get(flag, flag) for flag in flags]
    assert main(["explain", "--prompt", "x" * 200, *flags]) == code
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(("windows", "why"), [("99", "every hit is exact"), ("-1", "must not be negative")])
def test_bounded_windows_that_workers_refuse_are_refused(deployed, capsys, windows, why):
    argv = ["explain", "--data-dir", str(deployed.directory), "--prompt", "x" * 200, "--bounded-windows", windows]
    assert main(argv) == 2
    assert why in capsys.readouterr().err


def test_what_a_machine_with_other_arithmetic_stored_is_told_as_a_worker_does(deployed, capsys):
    other = deployed.identity.fingerprint(KVFormat.FP8, arithmetic="cpu-float32-0123abcd")
    deployed.store.register(other.digest, SIZE, {}, statement=other.statement)
    chain = chain_of(TOKENS, fingerprint_digest=other.digest, key=deployed.keyring.key(""), block_size=SIZE)
    payload = bytes(deployed.identity.layout(KVFormat.FP8).block_bytes)
    deployed.store.put(
        [
            Record(
                kind=RecordKind.BLOCK, hash=chain.hashes[i], parent=chain.parent(i), fingerprint=other.digest,
                position=(i + 1) * SIZE, payload=payload,
            )
            for i in range(3)
        ]
    )  # fmt: skip
    answer = deployed.explain(capsys)
    assert deployed.states(answer) == ["arithmetic_differs"] * 3 + ["first_seen"] * 7
    assert (answer["miss_reason"], answer["hit_tokens"]) == ("arithmetic_differs", 0)
    assert "under arithmetic cpu-float32-0123abcd" in deployed.explain(capsys, as_json=False)
