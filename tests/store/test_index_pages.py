"""Reading LMDB's file without LMDB gives the same rows, while the file is written, and whatever happens to it."""

import os
import random
import shutil
import threading
from pathlib import Path

import lmdb
import pytest

from antefix.errors import Unavailable
from antefix.store_files.index_pages import PageFile, PageTxn

TABLES = ("blocks", "names")


@pytest.fixture
def env(tmp_path):
    with lmdb.open(str(tmp_path / "index"), map_size=1 << 28, max_dbs=4, sync=False) as env:
        yield env


def path_of(env):
    return Path(env.path()) / "data.mdb"


def rows_of(rng, count):
    """Rows whose keys are like hashes or short, and whose values have an entry's size, are empty, or exceed a page."""
    rows = {}
    for number in range(count):
        key = rng.randbytes(32) if number % 3 else b"k%d" % rng.randrange(10_000)
        rows[key] = rng.randbytes(rng.choice((0, 1, 116, 116, 116, 2000, 9000)))
    return rows


def put(env, table, rows):
    db = env.open_db(table.encode())
    with env.begin(write=True) as txn:
        for key, value in rows.items():
            txn.put(key, value, db=db)


def read_all(file, table):
    return dict(PageTxn(file).cursor(db=table))


@pytest.mark.parametrize("count", [0, 1, 30, 3000])
def test_every_row_is_found_and_no_other(env, count):
    rng = random.Random(count)
    rows = rows_of(rng, count)
    put(env, "names", {b"x": b"y"})
    put(env, "blocks", rows)
    # A value that equals another row's key must not be taken for that row.
    put(env, "blocks", {b"names it": b"k-not-there" * 9})
    rows[b"names it"] = b"k-not-there" * 9
    file = PageFile(path_of(env))
    txn = PageTxn(file)
    assert read_all(file, "blocks") == rows and list(txn.cursor(db="blocks").iternext(values=False)) == sorted(rows)
    assert all(txn.get(key, db="blocks") == value for key, value in rows.items())
    absent = [b"k", b"k-not-there", b"names", rng.randbytes(32), b"\xff" * 32]
    assert txn.read(absent, db="blocks") == [None] * len(absent)
    assert txn.stat("blocks") == {"entries": len(rows)}
    assert read_all(file, "names") == {b"x": b"y"}


def test_a_reader_follows_deletions_and_takes_no_place_among_lmdbs_readers(env):
    rng = random.Random(1)
    rows = rows_of(rng, 500)
    put(env, "blocks", rows)
    file = PageFile(path_of(env))
    for _ in range(20):
        gone = rng.sample(sorted(rows), 20)
        db = env.open_db(b"blocks")
        with env.begin(write=True) as txn:
            for key in gone:
                txn.delete(key, db=db)
                del rows[key]
        put(env, "blocks", more := rows_of(rng, 20))
        rows |= more
        assert read_all(file, "blocks") == rows
        assert not any(PageTxn(file).read(sorted(set(gone) - rows.keys()), db="blocks"))
    assert env.info()["num_readers"] <= 1


def test_a_reader_never_sees_what_was_not_committed(env):
    """A writer moves an amount between many rows. Each call's result must come from one committed state."""
    keys = [b"%032d" % number for number in range(200)]
    put(env, "blocks", dict.fromkeys(keys, (100).to_bytes(4, "little") * 30))
    file, stop, failed = PageFile(path_of(env)), threading.Event(), []

    def read():
        while not stop.is_set():
            try:
                values = PageTxn(file).read(keys, db="blocks")
            except Unavailable as err:
                failed.append(err)
                return
            total = sum(int.from_bytes(value[:4], "little") for value in values)
            if total != 100 * len(keys) or any(value != value[:4] * 30 for value in values):
                failed.append(total)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    rng, db = random.Random(2), env.open_db(b"blocks")
    for _ in range(400):
        a, b = rng.sample(keys, 2)
        with env.begin(write=True) as txn:
            for key, step in ((a, 1), (b, -1)):
                amount = int.from_bytes(txn.get(key, db=db)[:4], "little") + step
                txn.put(key, amount.to_bytes(4, "little") * 30, db=db)
    stop.set()
    for reader in readers:
        reader.join()
    assert not failed


def test_a_transaction_that_two_commits_have_passed_reads_the_newest_state(env):
    put(env, "blocks", {b"a": b"0"})
    txn = PageTxn(PageFile(path_of(env)))
    assert txn.get(b"a", db="blocks") == b"0"
    for number in range(1, 6):
        put(env, "blocks", {b"a": b"%d" % number, b"b": b"x" * number})
    assert txn.get(b"a", db="blocks") == b"5"


def cut(path, rng):
    os.truncate(path, rng.choice((0, 1, 16, 4096, 8192, 3 * 4096 + 5, path.stat().st_size // 2)))


def zero(path, rng):
    size = path.stat().st_size
    path.write_bytes(bytes(rng.choice((0, size))))


def scribble(path, rng):
    with path.open("r+b") as file:
        size = path.stat().st_size
        for _ in range(rng.choice((1, 20))):
            file.seek(rng.randrange(size))
            file.write(rng.randbytes(rng.choice((1, 8, 4096))))


def delete(path, rng):
    shutil.rmtree(path.parent)


@pytest.mark.parametrize("harm", [cut, zero, scribble, delete])
def test_a_harmed_file_gives_rows_or_unavailable_and_nothing_else(tmp_path, harm):
    rng = random.Random(harm.__name__)
    original = tmp_path / "original"
    with lmdb.open(str(original), map_size=1 << 26, max_dbs=4, sync=False) as env:
        put(env, "blocks", rows := rows_of(rng, 800))
    num_refused = 0
    for number in range(25):
        directory = tmp_path / str(number)
        shutil.copytree(original, directory)
        open_before = PageFile(directory / "data.mdb")
        PageTxn(open_before).get(next(iter(rows)), db="blocks")
        harm(directory / "data.mdb", rng)
        for open_file in (lambda file=open_before: file, lambda path=directory / "data.mdb": PageFile(path)):
            try:
                txn = PageTxn(open_file())
                found = txn.read(sorted(rows), db="blocks")
                dict(txn.cursor(db="blocks"))
            except Unavailable:
                num_refused += 1
                continue
            assert len(found) <= len(rows)
        open_before.close()
    assert num_refused > 0, "harm that nothing notices is none"
