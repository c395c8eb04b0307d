"""Other things have a store's file names: a FIFO, a directory, a link to itself, an endless device. The owner moves
them away and continues. A reader treats them as missing files. Neither waits."""

import os
import shutil
from pathlib import Path

import pytest

from antefix.errors import ConfigError, Unavailable
from antefix.own_files import open_to_read, put_aside, read_small
from antefix.store_files.segment_reader import StoreReader
from antefix_kvstore.check_store import fsck
from tests.kvstore.small_store import BLOCK, FINGERPRINT, Prompt

KINDS = {
    "fifo": os.mkfifo,
    "directory": Path.mkdir,
    "circle": lambda path: path.symlink_to(path.name),
    "link to nothing": lambda path: path.symlink_to("nowhere/at/all"),
    "device": lambda path: path.symlink_to("/dev/zero"),
}
# Replacing these files loses no record. The last two tests replace segments.
NAMES = ("STORE", "LOCK", "CLEAN", "RESERVE", "GONE", "USAGE_LOG", "index", "index.new", "index.old")


def replace(path, make):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    make(path)


@pytest.mark.parametrize("kind", KINDS)
def test_an_opening_puts_aside_what_is_none_of_ours(open_engine, kind):
    engine, prompt = open_engine(), Prompt([1] * BLOCK * 3)
    engine.put(prompt.blocks())
    engine.close()
    directory = Path(engine.config.dir)
    for name in NAMES:
        if (name, kind) != ("index", "directory"):
            replace(directory / name, KINDS[kind])
    again = open_engine()
    assert prompt.check(again) == 3
    again.put((more := Prompt([2] * BLOCK * 2)).blocks())
    again.close()
    last = open_engine()
    assert [each.check(last) for each in (prompt, more)] == [3, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_a_running_owner_puts_it_aside(open_engine, kind):
    engine, prompt = open_engine(), Prompt([1] * BLOCK * 3)
    engine.put(prompt.blocks())
    directory = Path(engine.config.dir)
    for name in NAMES:
        replace(directory / name, KINDS[kind])
    engine.maintain()
    engine.maintain()
    assert prompt.check(engine) == 3
    engine.put((more := Prompt([2] * BLOCK * 2)).blocks())
    assert more.check(engine) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_reader_in_another_process_does_not_wait(open_engine, kind):
    engine, prompt = open_engine(), Prompt([1] * BLOCK * 3)
    engine.put(prompt.blocks())
    directory = Path(engine.config.dir)
    reader = StoreReader(directory)
    try:
        replace(directory / "segments" / "000000000001.seg", KINDS[kind])
        outcome = reader.read_blocks(prompt.hashes, prompt.buffers(), fingerprint=FINGERPRINT)
        assert outcome.num_good == 0
    finally:
        reader.close()
    replace(directory / "STORE", KINDS[kind])
    with pytest.raises(Unavailable):
        StoreReader(directory)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_no_segment_loses_only_its_own_records(open_engine, kind):
    engine, lost = open_engine(), Prompt([1] * BLOCK * 3)
    engine.put(lost.blocks())
    engine.close()
    replace(Path(engine.config.dir) / "segments" / "000000000001.seg", KINDS[kind])
    again = open_engine()
    assert lost.check(again) == 0
    again.put(lost.blocks())
    assert lost.check(again) == 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["index/data.mdb", "segments/000000000001.seg", "STORE"])
def test_a_check_names_it_and_a_repair_puts_it_aside(open_engine, kind, name):
    engine = open_engine()
    engine.put(Prompt([1] * BLOCK * 3).blocks())
    engine.close()
    directory = Path(engine.config.dir)
    replace(directory / name, KINDS[kind])
    assert not fsck(directory).sound
    assert fsck(directory, repair=True).repaired
    assert fsck(directory).sound


def test_a_link_whose_disk_is_not_mounted_is_no_empty_store(open_engine, tmp_path):
    engine = open_engine()
    engine.put(Prompt([1] * BLOCK).blocks())
    engine.close()
    segments, elsewhere = Path(engine.config.dir) / "segments", tmp_path / "disk"
    segments.rename(elsewhere)
    segments.symlink_to(elsewhere)
    open_engine().close()
    elsewhere.rename(tmp_path / "unmounted")
    with pytest.raises(ConfigError, match="link to a path that does not exist"):
        open_engine()


def test_a_mark_of_any_size_is_read_in_no_time(open_engine):
    engine, prompt = open_engine(), Prompt([1] * BLOCK * 3)
    engine.put(prompt.blocks())
    engine.close()
    directory = Path(engine.config.dir)
    for name in ("STORE", "CLEAN", "RESERVE", "index/data.mdb", "segments/000000000001.seg"):
        os.truncate(directory / name, 1 << 42)
    assert prompt.check(open_engine()) == 3


def test_regular_files_are_read_and_left_alone(tmp_path):
    (path := tmp_path / "a").write_bytes(b"12345")
    assert read_small(path, 5) == b"12345" and read_small(path, 3) == b"1234"
    assert not put_aside(path) and not put_aside(tmp_path / "none")
    with pytest.raises(FileNotFoundError):
        open_to_read(tmp_path / "none")
