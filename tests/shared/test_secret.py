"""Secrets by generation, and tenants' digests, which have one length and differ from each other."""

import errno
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from antefix.errors import ConfigError, InvalidRequest
from antefix.private_file import open_private, write_private
from antefix.registration import Registration
from antefix.secret import OWNER_BYTES, Keyring, create_secret_file

OLD, NEW = b"o" * 32, b"n" * 32
names = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=512)


def from_text(tmp_path, text):
    path = tmp_path / "secret"
    path.write_text(text)
    return Keyring.from_file(path)


def test_a_file_of_one_secret_is_its_first_generation(tmp_path):
    keyring = from_text(tmp_path, OLD.hex() + "\n")
    assert (keyring.generation, keyring.generations) == (1, (1,))
    assert keyring.key("a") == Keyring(OLD).key("a")


def test_the_first_line_writes_and_the_others_are_read(tmp_path):
    keyring = from_text(tmp_path, f"2 {NEW.hex()}\n\n{OLD.hex()}\n")
    assert (keyring.generation, keyring.generations) == (2, (2, 1))
    assert keyring.key("a") == Keyring(NEW).key("a")
    assert keyring.key("a", 1) == Keyring(OLD).key("a")
    assert keyring.owner("a", 1) == Keyring(OLD).owner("a") != keyring.owner("a")
    assert keyring.seal_key(bytes(OWNER_BYTES), 3) is None


@pytest.mark.parametrize(
    "text",
    ["", "zz", "00ff", f"1 {OLD.hex()}\n{NEW.hex()}", f"0 {OLD.hex()}", f"65536 {OLD.hex()}", f"1 2 {OLD.hex()}"],
)
def test_a_secret_file_that_makes_no_sense_is_refused(tmp_path, text):
    with pytest.raises(ConfigError, match="secret file"):
        from_text(tmp_path, text)


def test_a_bad_generation_is_refused():
    with pytest.raises(InvalidRequest, match="generation"):
        Keyring(OLD, generation=0)
    with pytest.raises(InvalidRequest, match="two secrets"):
        Keyring(NEW, generation=1, older={1: OLD})


def test_a_worker_registers_with_either_secret_while_they_rotate():
    said = Registration(role="decode", address="h:1", fingerprint=b"f", instance=b"i", ttl_s=0, said_at_ms=0)
    both = Keyring(NEW, generation=2, older={1: OLD})
    for one in (Keyring(OLD), Keyring(NEW, generation=2)):
        assert both.proves(said.proof(one), *said._parts())
    assert not Keyring(OLD).proves(said.proof(both), *said._parts())


@settings(max_examples=200)
@given(first=st.tuples(names, names), second=st.tuples(names, names))
def test_owners_have_one_length_and_are_equal_for_equal_names_only(first, second):
    keyring = Keyring(OLD)
    owners = [keyring.owner(f"{tenant}\x1f{user}" if user else tenant) for tenant, user in (first, second)]
    assert [len(owner) for owner in owners] == [OWNER_BYTES] * 2
    assert (owners[0] == owners[1]) == (first == second)
    # All users of a tenant share the tenant's part, and no other users do.
    assert (owners[0][:16] == owners[1][:16]) == (first[0] == second[0])


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_disk_that_is_full_leaves_no_secret_and_is_named(tmp_path, monkeypatch, call):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    if call == "write":
        monkeypatch.setattr(os, "open", full)
    with pytest.raises(OSError, match="secret") as caught:
        create_secret_file(tmp_path / "secret")
    assert caught.value.filename == str(tmp_path / "secret") and list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert Keyring.from_file(create_secret_file(tmp_path / "secret")).generation == 1


def test_of_two_who_make_a_secret_at_once_one_is_taken(tmp_path, monkeypatch):
    path, link = tmp_path / "secret", os.link

    def second(draft, target):
        path.write_text(OLD.hex())
        path.chmod(0o600)
        link(draft, target)

    monkeypatch.setattr(os, "link", second)
    create_secret_file(path)
    assert path.read_text() == OLD.hex() and list(tmp_path.iterdir()) == [path]


def test_an_empty_secret_says_what_to_do(tmp_path):
    with pytest.raises(ConfigError, match=r"is empty: restore it from a backup"):
        from_text(tmp_path, "\n")


def test_a_log_that_is_cut_while_it_is_open_has_no_hole(tmp_path):
    """logrotate's copytruncate cuts a role's log. Without O_APPEND, NUL bytes would fill the log up to the old end."""
    with open_private(tmp_path / "log", "a") as file:
        file.write("before\n")
        os.truncate(tmp_path / "log", 0)
        file.write("after\n")
    assert (tmp_path / "log").read_bytes() == b"after\n"


def test_texts_that_name_directories_of_any_bytes_are_kept_as_they_are(tmp_path):
    name = os.fsdecode(b"\xff\xfe/\n x ")
    with open_private(tmp_path / "a", "w") as file:
        file.write(name)
    write_private(tmp_path / "b", name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == b"\xff\xfe/\n x "
