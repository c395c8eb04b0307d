"""After a crash the index is examined, many pages at a time. A sound index passes, and a damaged one does not."""

from __future__ import annotations

import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import lmdb.verify
import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from antefix.record import RecordKind
from antefix_kvstore.index_check import index_fault
from antefix_kvstore.index_structure import structure_fault
from antefix_kvstore.index_sums import xxh32_of_rows
from antefix_kvstore.index_writer import IndexTxn
from antefix_kvstore.storage_engine import StorageEngine
from tests.kvstore.small_store import BLOCK, Prompt

OpenEngine = Callable[..., StorageEngine]


@pytest.fixture
def index(open_engine: OpenEngine, tmp_path: Path) -> Path:
    """Of three levels: chains, checkpoints, pins, a quarantined record, long entries, free pages, a large statement."""
    engine = open_engine(budget_bytes=8 << 20)
    prompts = [Prompt([number] * BLOCK * 40, payload_bytes=64) for number in range(12)]
    for prompt in prompts:
        engine.put([*prompt.blocks(), prompt.checkpoint(39)])
    engine.pin([(RecordKind.BLOCK, prompt.hashes[-1]) for prompt in prompts[:3]], 60)
    engine.evict([(RecordKind.BLOCK, prompts[9].hashes[20])])
    with IndexTxn(engine.index) as txn:
        txn.set_meta(b"said" + bytes(32), b"x" * 9000)
    engine.quarantine((RecordKind.BLOCK, prompts[3].hashes[7]), judge=False)
    engine.abandon()
    return tmp_path / "store" / "index"


def test_a_sound_index_has_no_fault(index: Path) -> None:
    assert lmdb.verify.verify(str(index), subdir=True) == []
    assert index_fault(index) is None


def test_a_sound_index_has_no_fault_where_reads_are_short(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, parts, offset: read(fd, [parts[0][:5000]], offset))
    assert index_fault(index) is None


def test_what_another_walk_of_the_file_refuses_is_refused(index: Path, tmp_path: Path) -> None:
    data = (index / "data.mdb").read_bytes()
    rng = random.Random(5)
    num_refused = 0
    for _ in range(40):
        # Offsets of a page's structure: headers, pointers, and the nodes next to them.
        page = rng.randrange(len(data) // 4096)
        at = page * 4096 + rng.choice((rng.randrange(64), rng.randrange(4096)))
        harmed = tmp_path / "harmed"
        shutil.rmtree(harmed, ignore_errors=True)
        harmed.mkdir()
        (harmed / "data.mdb").write_bytes(data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :])
        try:
            refused = bool(lmdb.verify.verify(str(harmed), subdir=True))
        except lmdb.verify.VerifyError:
            refused = True
        num_refused += refused
        if refused:
            assert index_fault(harmed), f"byte {at}"
    assert num_refused > 2


def test_a_branch_whose_key_is_one_off_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a tree of several branches and batches. A branch's key is the first key of the pages to its right."""
    monkeypatch.setattr("antefix_kvstore.index_structure._BATCH_PAGES", 20)
    monkeypatch.setattr("antefix_kvstore.index_structure._BATCH_BRANCHES", 3)
    path = tmp_path / "data.mdb"
    with lmdb.open(str(tmp_path), max_dbs=1, map_size=16 << 20, sync=False) as env:
        table = env.open_db(b"blocks")
        with env.begin(write=True, db=table) as txn:
            for number in range(300):
                txn.put(number.to_bytes(2, "big").ljust(300, b"k"), bytes(900))
    assert structure_fault(path, ("blocks",), lambda *_: None) is None
    data = path.read_bytes()
    branches = [at for at in range(0, len(data), 4096) if data[at + 10 : at + 12] == b"\1\0"]
    assert len(branches) > 3
    for number, begin in enumerate(branches):
        (lower,) = struct.unpack_from("<H", data, begin + 12)
        nodes = struct.unpack_from(f"<{(lower - 16) // 2}H", data, begin + 16)
        # The first node's key is not used.
        at = begin + nodes[1 + number % (len(nodes) - 1)] + 8
        for change in (-1, 1):
            key = int.from_bytes(data[at : at + 2], "big") + change
            path.write_bytes(data[:at] + key.to_bytes(2, "big") + data[at + 2 :])
            assert structure_fault(path, ("blocks",), lambda *_: None) == "keys are not in order"


def test_every_bit_of_an_entry_counts(index: Path, tmp_path: Path) -> None:
    data = (index / "data.mdb").read_bytes()
    block_hash = Prompt([7] * BLOCK * 40, payload_bytes=64).hashes[11]
    begin = data.find(block_hash)
    # Change the value in every page that has it. The newest page is in use, and older ones are free.
    places = [at for at in range(begin, len(data) - 32) if data[at : at + 32] == block_hash]
    for bit in range(0, 8 * (32 + 84), 41):
        harmed = bytearray(data)
        for place in places:
            harmed[place + bit // 8] ^= 1 << bit % 8
        (index / "data.mdb").write_bytes(harmed)
        assert index_fault(index), f"bit {bit}"


@pytest.mark.parametrize("table", ["leaves", "expiry", "totals", "segments"])
def test_a_table_that_does_not_follow_is_refused(open_engine: OpenEngine, tmp_path: Path, table: str) -> None:
    engine = open_engine()
    engine.put(Prompt(list(range(BLOCK * 3)), payload_bytes=64).blocks())
    with engine.index.env.begin(write=True) as txn:
        key = next(iter(txn.cursor(db=engine.index.db[table])))[0]
        txn.delete(bytes(key), db=engine.index.db[table])
    engine.abandon()
    assert lmdb.verify.verify(str(tmp_path / "store" / "index"), subdir=True) == []
    assert index_fault(tmp_path / "store" / "index")


@pytest.mark.parametrize("root_at", [112, 64], ids=["main", "free"])
def test_a_root_far_beyond_any_file_is_a_fault(index: Path, root_at: int) -> None:
    """Its offset in bytes is no number that the system takes."""
    harmed = bytearray((index / "data.mdb").read_bytes())
    for slot in range(2):
        # Header of the page 16, magic, version, address and map size 24, then the tables of free pages and of tables.
        at = slot * 4096 + 16 + root_at
        assert int.from_bytes(harmed[at : at + 8], "little") < len(harmed) // 4096
        harmed[at + 7] ^= 0x40
    (index / "data.mdb").write_bytes(harmed)
    assert index_fault(index)


def test_an_index_that_was_cut_is_refused(index: Path) -> None:
    data = (index / "data.mdb").read_bytes()
    for nbytes in (0, 100, 4096, 9000, len(data) // 2, len(data) - 4096):
        (index / "data.mdb").write_bytes(data[:nbytes])
        assert index_fault(index)


@given(rows=st.lists(st.binary(min_size=112, max_size=112), min_size=1, max_size=3))
@settings(max_examples=20)
def test_sums_of_many_rows_are_those_of_each(rows: list[bytes]) -> None:
    found = xxh32_of_rows(np.frombuffer(b"".join(rows), np.uint8).reshape(len(rows), 112), 112)
    assert found.tolist() == [xxhash.xxh32_intdigest(row) for row in rows]


def test_a_crash_is_opened_without_a_rebuild(open_engine: OpenEngine, caplog: pytest.LogCaptureFixture) -> None:
    prompt = Prompt(list(range(BLOCK * 5)), payload_bytes=64)
    engine = open_engine()
    engine.put(prompt.blocks())
    engine.abandon()
    assert prompt.check(open_engine()) == 5
    assert "rebuilding" not in caplog.text
