"""Old segments of a ledger move to an archive, and a signed summary replaces them, while the router runs."""

import json
from argparse import ArgumentParser
from decimal import Decimal

import pytest

from antefix.errors import ConfigError
from antefix_billing import archive as archives
from antefix_billing.anchor import make_anchor
from antefix_billing.archive import archive, check_archive, prune, restore
from antefix_billing.ledger import Ledger
from antefix_billing.ledger_files import read_entries, read_settled, segments_of
from antefix_billing.ledger_format import LedgerCorrupt
from antefix_billing.pruned import pruned_of
from antefix_billing.receipt import Signer
from antefix_billing.reconcile import verify_all
from antefix_console.commands import usage as cli
from tests.billing.usage_records import NOW_US, opened, record

SECOND_US = 1_000_000
BEFORE_US = NOW_US + 100 * SECOND_US


@pytest.fixture
def signer(tmp_path):
    return Signer.create(tmp_path / "receipts.key")


def settle(ledger, name, at_s=0):
    at_us = NOW_US + at_s * SECOND_US
    ledger.append([opened(name)])
    ledger.append([record(name, hit=0, miss=9, price=Decimal("0.25"), started_us=at_us, finished_us=at_us + 1000)])


@pytest.fixture
def ledger(tmp_path):
    """Twelve old records and two new ones, in segments of two records."""
    ledger = Ledger(tmp_path / "ledger", segment_bytes=1500)
    for number in range(14):
        settle(ledger, f"r{number}", 0 if number < 12 else 1000)
    yield ledger
    ledger.close()


def prune_it(ledger, tmp_path, signer, **more):
    place = str(tmp_path / "archive")
    return prune(ledger.directory, before_us=BEFORE_US, place=place, signer=signer, now_us=NOW_US, **more)


def test_a_signed_summary_stands_for_what_was_pruned(ledger, tmp_path, signer):
    head = ledger.head
    summary = prune_it(ledger, tmp_path, signer)
    (total,) = summary.totals
    assert (summary.first, total.records) == (1, summary.last // 2) and total.requests == total.records > 5
    assert total.price == Decimal("0.25") * total.records and total.cache_miss_tokens == 9 * total.records
    assert summary.is_signed_by([signer.public_key])
    assert [entry.sequence for _, entry in read_entries(ledger.directory)] == list(range(summary.last + 1, head[0] + 1))
    verdict = verify_all(
        [ledger.directory],
        store_log=None,
        anchors={},
        public_keys=[signer.public_key],
        archive=str(tmp_path / "archive"),
    )
    assert verdict.ok
    ((_, each),) = verdict.ledgers
    assert (each.pruned.to, each.pruned.records, each.pruned.unsigned, each.pruned.archive) == (
        summary.last, total.records, 0, True,
    )  # fmt: skip


def test_the_writer_goes_on_and_opens_again(ledger, tmp_path, signer):
    summary = prune_it(ledger, tmp_path, signer)
    settle(ledger, "new", 2000)
    assert ledger.find(record("new").key) is not None
    assert ledger.find(record("r0").key) is None and ledger.find(record("r13").key) is not None
    ledger.close()
    again = Ledger(ledger.directory, segment_bytes=1500)
    settle(again, "newer", 3000)
    again.close()
    assert next(read_entries(ledger.directory))[1].sequence == summary.last + 1


def test_a_lost_index_is_made_again_of_what_is_left(ledger, tmp_path, signer):
    prune_it(ledger, tmp_path, signer)
    ledger.close()
    (ledger.directory / "index" / "data.mdb").unlink()
    again = Ledger(ledger.directory, segment_bytes=1500)
    assert again.find(record("r12").key) is not None
    again.close()


def test_pruning_twice_goes_on_from_the_first_summary(ledger, tmp_path, signer):
    first = prune_it(ledger, tmp_path, signer)
    assert prune_it(ledger, tmp_path, signer) is None
    for number in range(6):
        settle(ledger, f"late{number}", 1000)
    second = prune(
        ledger.directory, before_us=NOW_US + 5000 * SECOND_US, place=str(tmp_path / "archive"), signer=signer, now_us=1
    )
    assert (second.first, second.previous_hash) == (first.last + 1, first.hash)
    assert [each.last for each in pruned_of(ledger.directory)] == [first.last, second.last]
    assert check_archive(ledger.directory, str(tmp_path / "archive")) == []


@pytest.mark.parametrize("left", ["nothing is old", "open", "not sent"])
def test_what_must_stay_is_not_pruned(ledger, tmp_path, signer, left):
    if left == "nothing is old":
        assert prune(ledger.directory, before_us=NOW_US, place="", signer=signer, now_us=NOW_US) is None
    if left == "open":
        other = Ledger(tmp_path / "other", segment_bytes=1500)
        other.append([opened("running")])
        for number in range(6):
            settle(other, f"r{number}")
        assert prune(other.directory, before_us=BEFORE_US, place="", signer=signer, now_us=NOW_US) is None
        other.append([record("running")])
        assert prune(other.directory, before_us=BEFORE_US, place="", signer=signer, now_us=NOW_US) is not None
        other.close()
    if left == "not sent":
        assert prune_it(ledger, tmp_path, signer, sent_to=3) is None
        assert prune_it(ledger, tmp_path, signer, sent_to=9).last <= 9


def test_a_crash_before_the_files_are_gone_is_finished_by_the_next_call(ledger, tmp_path, signer, monkeypatch):
    def die(ledger):
        raise KeyboardInterrupt

    real = archives._remove_pruned
    calls = iter([real, die])
    monkeypatch.setattr(archives, "_remove_pruned", lambda path: next(calls)(path))
    with pytest.raises(KeyboardInterrupt):
        prune_it(ledger, tmp_path, signer)
    monkeypatch.setattr(archives, "_remove_pruned", real)
    assert len(list(read_settled(ledger.directory))) < 14 and len(segments_of(ledger.directory)) > 5
    assert prune_it(ledger, tmp_path, signer) is None
    assert verify_all([ledger.directory], store_log=None, anchors={}).ok


def test_the_whole_ledger_comes_back_for_readers(ledger, tmp_path, signer):
    before = [(entry.sequence, entry.hash) for _, entry in read_entries(ledger.directory)]
    prune_it(ledger, tmp_path, signer)
    restore(str(tmp_path / "archive"), ledger.source, tmp_path / "whole", ledger=ledger.directory)
    assert [(entry.sequence, entry.hash) for _, entry in read_entries(tmp_path / "whole")] == before
    with pytest.raises(ConfigError, match="is not empty"):
        restore(str(tmp_path / "archive"), ledger.source, tmp_path / "whole")


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_harm_to_summary_and_archive_is_told(ledger, tmp_path, signer):
    place = tmp_path / "archive"
    summary = prune_it(ledger, tmp_path, signer)
    path = ledger.directory / f"pruned-{summary.last:012d}.json"
    kept = path.read_text()

    def verdict():
        return verify_all(
            [ledger.directory], store_log=None, anchors={}, public_keys=[signer.public_key], archive=str(place)
        )

    # 1. Edited sums: the signature reveals them, and so does the archive.
    edited = json.loads(kept)
    edited["totals"][0]["price"] = "0.01"
    path.write_text(json.dumps(edited))
    ((_, each),) = verdict().ledgers
    assert each.pruned.unsigned == 1 and "other sums" in each.pruned.faults[0] and not verdict().ok
    # 2. A missing summary.
    path.unlink()
    assert not verdict().ok
    path.write_text(kept)
    assert verdict().ok
    # 3. A damaged file of the archive, and a missing one.
    first = next(place.rglob("usage-*.ledger"))
    flip(first)
    assert "is not the file" in verdict().ledgers[0][1].pruned.faults[0]
    first.unlink()
    assert "is not in" in verdict().ledgers[0][1].pruned.faults[0]


def test_an_archive_that_gives_other_bytes_back_stops_the_pruning(ledger, tmp_path, signer):
    archive(ledger.directory, str(tmp_path / "archive"))
    flip(next((tmp_path / "archive").rglob("usage-*.ledger")))
    with pytest.raises(ConfigError, match="not what was written"):
        prune_it(ledger, tmp_path, signer)
    assert next(read_entries(ledger.directory))[1].sequence == 1


def test_a_harmed_ledger_is_not_pruned(ledger, tmp_path, signer):
    flip(segments_of(ledger.directory)[1])
    with pytest.raises(LedgerCorrupt):
        prune_it(ledger, tmp_path, signer)
    assert not (tmp_path / "archive").exists()


def test_an_anchor_of_a_pruned_end_still_holds(ledger, tmp_path, signer):
    summary = prune_it(ledger, tmp_path, signer)

    def anchored(hash):
        anchor = make_anchor(signer, source=ledger.source, sequence=summary.last, hash=hash, time_us=NOW_US)
        return verify_all([ledger.directory], store_log=None, anchors={}, signed=[anchor]).ok

    assert anchored(summary.hash) and not anchored(bytes(32))


def test_a_report_by_month_counts_what_was_pruned(ledger, tmp_path, signer, capsys):
    words = ("report", "--ledger", ledger.directory, "--json", "--by")
    before = run(capsys, *words, "tenant,month")[1]
    prune_it(ledger, tmp_path, signer)
    status, out, err = run(capsys, *words, "tenant,month")
    assert (status, out, err) == (0, before, "") and json.loads(out)[0]["requests"] == 14
    _, out, err = run(capsys, *words, "hour")
    assert "were pruned, and are not in this report" in err and json.loads(out)[0]["requests"] < 14


def run(capsys, *words):
    parser = ArgumentParser()
    cli.add_parser(parser.add_subparsers())
    status = cli.run(parser.parse_args(["usage", *map(str, words)]))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_commands(ledger, tmp_path, signer, capsys):
    path, place, key = ledger.directory, tmp_path / "archive", tmp_path / "receipts.key"
    assert run(capsys, "archive", "--ledger", path, "--to", place)[0] == 0
    words = ("prune", "--ledger", path, "--before", "2100-01-01", "--archive", place, "--key-file", key, "--json")
    status, out, _ = run(capsys, *words, "--dry-run")
    assert status == 0 and json.loads(out)[str(path)]["first"] == 1 and not pruned_of(path)
    assert run(capsys, *words)[0] == 0 and pruned_of(path)
    status, _, err = run(capsys, "export", "--ledger", path, "--after", 1)
    assert status == 2 and "were pruned" in err
    assert run(capsys, "restore", "--ledger", path, "--from", place, "--to", tmp_path / "whole")[0] == 0
    status, out, _ = run(capsys, "export", "--ledger", tmp_path / "whole", "--format", "jsonl")
    assert status == 0 and len(out.splitlines()) == 14
    status, out, _ = run(
        capsys, "verify", "--ledger", path, "--archive", place, "--public-key", signer.public_key.hex()
    )
    assert status == 0 and json.loads(out)["pruned"]["archive"]
