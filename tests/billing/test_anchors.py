"""Anchors reveal what a hash chain alone cannot: a cut end, an older copy, a rewritten ledger, a different ledger."""

import json
import shutil

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from antefix.errors import ConfigError
from antefix_billing.anchor import check_place, make_anchor, read_anchors, write_anchor
from antefix_billing.ledger import Ledger
from antefix_billing.ledger_files import read_settled, source_of
from antefix_billing.receipt import Signer, check_receipt
from antefix_billing.reconcile import verify_all
from antefix_router.anchoring import Anchoring
from tests.billing.usage_records import NOW_US, opened, record

SIGNER = Signer(Ed25519PrivateKey.generate())


def write(directory, numbers, *, segment_bytes=2000, **changes):
    ledger = Ledger(directory, segment_bytes=segment_bytes)
    for number in numbers:
        ledger.append([opened(f"r{number}")])
        ledger.append([record(f"r{number}", source=ledger.source_name, **changes)])
    ledger.close()


def anchor(directory, place):
    ledger = Ledger(directory, segment_bytes=2000)
    sequence, hash = ledger.head
    write_anchor(make_anchor(SIGNER, source=ledger.source, sequence=sequence, hash=hash, time_us=NOW_US), str(place))
    ledger.close()


@pytest.fixture
def anchored(tmp_path):
    """A ledger of 24 entries with anchors at entries 8, 16 and 24."""
    for first in (0, 4, 8):
        write(tmp_path / "ledger", range(first, first + 4))
        anchor(tmp_path / "ledger", tmp_path / "anchors")
    return tmp_path / "ledger"


def faults(directory, keys=(SIGNER.public_key,), **settings):
    places = [str(directory.parent / "anchors")]
    verdict = verify_all(
        [directory], store_log=None, anchors={}, signed=read_anchors(places), public_keys=keys, **settings
    )
    return verdict, " ".join(verdict.ledgers[0][1].anchors.faults) + verdict.ledgers[0][1].chain_error


def test_a_whole_ledger_is_confirmed_up_to_its_last_anchor(anchored):
    write(anchored, [100])
    verdict, _ = faults(anchored)
    assert verdict.ok and verdict.ledgers[0][1].anchors.anchored_to == 24


def test_an_older_copy_with_its_mark_shows_with_what_is_gone(anchored, tmp_path):
    copy = tmp_path / "copy" / "ledger"
    write(copy, range(1))
    shutil.rmtree(copy)
    shutil.copytree(anchored, copy)
    write(anchored, range(20, 24))
    anchor(anchored, tmp_path / "anchors")
    shutil.copy(tmp_path / "anchors", copy.parent / "anchors")
    verdict, said = faults(copy)
    assert not verdict.ok and "entries 25 to 32 are gone" in said


def test_a_cut_end_shows_though_the_mark_was_taken_away_too(anchored):
    segments = sorted(anchored.glob("usage-*"))
    segments[-1].unlink()
    (anchored / "acknowledged").unlink()
    verdict, said = faults(anchored)
    assert not verdict.ok and "to 24 are gone" in said


def test_a_removed_segment_and_one_of_another_ledger_are_named(anchored, tmp_path):
    other = tmp_path / "other"
    write(other, range(12))
    segments, theirs = sorted(anchored.glob("usage-*")), sorted(other.glob("usage-*"))
    kept = segments[1].read_bytes()
    shutil.copy(theirs[1], segments[1])
    verdict, said = faults(anchored)
    assert not verdict.ok and source_of(other).hex() in said and segments[1].name in said
    segments[1].write_bytes(kept)
    segments[0].unlink()
    assert not faults(anchored)[0].ok


def test_a_ledger_that_was_written_again_shows_between_which_entries(anchored, tmp_path):
    source = (anchored / "source").read_text()
    shutil.rmtree(anchored)
    anchored.mkdir()
    (anchored / "source").write_text(source)
    write(anchored, range(4))
    again = faults(anchored)[1]
    write(anchored, range(4, 12), output_tokens=1)
    verdict, said = faults(anchored)
    assert not verdict.ok and "between entries 9 and 16" in said and "entries 9 to 16 are gone" in again


def test_a_ledger_that_is_gone_altogether_is_missed(anchored, tmp_path):
    write(tmp_path / "ledger-2", range(2))
    anchor(tmp_path / "ledger-2", tmp_path / "anchors")
    assert faults(anchored)[0].ok
    verdict, _ = faults(anchored, are_all=True)
    assert not verdict.ok and verdict.missing_ledgers == (source_of(tmp_path / "ledger-2").hex(),)
    assert not json.loads(verdict.to_json())["ok"]


def test_a_customers_receipt_is_an_anchor_and_a_forged_one_is_none(anchored, tmp_path):
    last = list(read_settled(anchored))[-1]
    receipt = SIGNER.receipt(last, source_of(anchored))
    (tmp_path / "anchors").write_text(json.dumps(receipt))
    verdict, _ = faults(anchored)
    assert verdict.ok and verdict.ledgers[0][1].anchors.anchored_to == last.sequence
    (tmp_path / "anchors").write_text(json.dumps({**receipt, "hash": "00" * 32}))
    verdict, _ = faults(anchored)
    assert not verdict.ok and verdict.ledgers[0][1].anchors.unsigned == 1


def test_a_directory_as_an_object_store_has_one_object_for_each(tmp_path):
    place = f"file://{tmp_path}/bucket"
    for numbers in (range(2), range(2, 4)):
        write(tmp_path / "ledger", numbers)
        anchor(tmp_path / "ledger", place)
    assert [each.sequence for each in read_anchors([place])] == [4, 8]
    with pytest.raises(ConfigError, match="file://"):
        check_place("ftp://bucket/x")


def test_a_torn_last_line_is_passed_over(anchored, tmp_path):
    with (tmp_path / "anchors").open("a") as file:
        file.write('{"source":"00')
    assert faults(anchored)[0].ok


async def test_the_head_is_anchored_while_it_runs_and_at_the_end(tmp_path):
    ledger = Ledger(tmp_path / "ledger")
    anchoring = Anchoring(ledger, SIGNER, [str(tmp_path / "anchors"), "/proc/none/anchors"], 3600.0)
    anchoring.start()
    ledger.append([opened("r")])
    await anchoring.close()
    assert read_anchors([str(tmp_path / "anchors")])[-1].sequence == 1
    assert anchoring.num_failed and anchoring.anchored_to == 0
    ledger.close()


def test_a_rotated_key_keeps_earlier_receipts_good(tmp_path):
    old = Signer.create(tmp_path / "key")
    write(tmp_path / "ledger", range(1))
    (item,) = read_settled(tmp_path / "ledger")
    receipt = old.receipt(item, source_of(tmp_path / "ledger"))
    new = Signer.rotate(tmp_path / "key")
    assert new.public_key != old.public_key and new.public_keys[1:] == (old.public_key,)
    assert check_receipt(receipt, new.older[0]).signature_ok and not check_receipt(receipt, new.public_key).signature_ok
    assert Signer.rotate(tmp_path / "key").public_keys[1:] == new.public_keys
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
