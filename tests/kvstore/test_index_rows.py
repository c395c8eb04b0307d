"""A rebuild computes the same for many records at once as for each record alone."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest

from antefix.record import RecordKind
from antefix.store_files.record_format import Codec, IndexEntry, RecordFlag, pack_entry
from antefix.store_files.record_header import RecordHeader, owner_row, pack_record_header
from antefix_kvstore.eviction import EvictionPolicy
from antefix_kvstore.forest_rows import hang_together, parent_names, sums_to_root
from antefix_kvstore.header_rows import extents_of, numbers_of, owner_key, rows_of, short_entries
from antefix_kvstore.index_rebuild import _last_copies
from antefix_kvstore.seen_names import SeenNames

SEED = 7


def header_of(rng: random.Random, *, version: int = 2, **changes: object) -> RecordHeader:
    fields: dict[str, object] = {
        "payload_checksum": rng.randbytes(16),
        "hash": rng.randbytes(32),
        "parent": rng.randbytes(32),
        "fingerprint": rng.randbytes(32),
        "segment": rng.randrange(1 << 20),
        "offset": 8 * rng.randrange(1 << 30),
        "stored_bytes": rng.randrange(1 << 30),
        "payload_bytes": rng.randrange(1 << 20),
        "position": rng.randrange(1 << 28),
        "created_ms": rng.randrange(1 << 41),
        "expires_ms": rng.choice([0, rng.randrange(1 << 41)]),
        "cost_us": rng.randrange(1 << 32),
        "kind": rng.choice([RecordKind.BLOCK, RecordKind.CHECKPOINT]),
        "codec": rng.choice(list(Codec)),
        "flags": RecordFlag(rng.randrange(8)),
        "tenant": rng.randbytes(24) if version == 2 else rng.randbytes(rng.randrange(45)),
        "generation": rng.randrange(1 << 16) if version == 2 else 0,
        "version": version,
    }
    return RecordHeader(**{**fields, **changes})  # type: ignore[arg-type]


def test_rows_are_what_the_headers_say() -> None:
    rng = random.Random(1)
    headers = [header_of(rng, version=rng.choice([1, 2])) for _ in range(60)]
    rows = rows_of([pack_record_header(header, SEED) for header in headers], SEED)
    assert extents_of(rows).tolist() == [header.extent_bytes for header in headers]
    for row, header in zip(rows, headers, strict=True):
        assert owner_key(row["owner"].tobytes()) == owner_row(header.version, header.tenant)
        for name in ("hash", "parent", "fingerprint"):
            assert row[name].tobytes() == getattr(header, name)
        for name in ("segment", "offset", "stored_bytes", "payload_bytes", "position", "created_ms", "expires_ms"):
            assert int(row[name]) == getattr(header, name), name
        for name in ("cost_us", "generation", "version", "kind", "codec", "flags"):
            assert int(row[name]) == int(getattr(header, name)), name


@pytest.mark.parametrize("wide", [False, True])
def test_short_entries_are_those_of_one_entry_alone(wide: bool) -> None:
    rng = random.Random(2)
    bits = {"segment": 24, "offset": 35, "stored_bytes": 30, "payload_bytes": 30, "position": 28, "fingerprint_id": 20}
    bits |= {"tenant_id": 20, "children": 16, "rank_ms": 44, "expires_ms": 42, "prefix_bytes": 44, "cost_ms": 20}
    bits |= {"ttl_s": 22, "codec": 4, "flags": 8}
    entries = []
    for _ in range(80):
        fields = {name: rng.randrange(1 << width) for name, width in bits.items()}
        # In half of the entries one field is too large for the short form.
        if wide and rng.random() < 0.5:
            name = rng.choice([name for name in bits if name not in ("codec", "flags")])
            fields[name] = 1 << bits[name]
        fields["offset"] &= ~7
        entries.append(IndexEntry(**fields, pinned_ms=0, parent=rng.randbytes(32)))
    hashes = [rng.randbytes(32) for _ in entries]
    of = {name: np.array([getattr(entry, name) for entry in entries]) for name in bits}
    of["place"] = of["offset"] >> 3
    as_void = [np.frombuffer(b"".join(values), "V32") for values in (hashes, [entry.parent for entry in entries])]
    values, fits = short_entries(of, *as_void)
    alone = [pack_entry(entry, name) for entry, name in zip(entries, hashes, strict=True)]
    assert fits.tolist() == [len(value) == 84 for value in alone]
    assert fits.all() != wide
    assert [value for value, fit in zip(values.tolist(), fits, strict=True) if fit] == [
        v for v in alone if len(v) == 84
    ]


def test_ranks_are_those_of_one_record_alone() -> None:
    rng, policy = random.Random(3), EvictionPolicy()
    cases = [(rng.randrange(1 << 41), rng.choice([0.0, 10 ** rng.uniform(-6, 4)]), 1 + rng.randrange(1 << 30))] * 2
    cases += [
        (rng.randrange(1 << 41), rng.choice([0.0, 10 ** rng.uniform(-6, 4)]), rng.randrange(9)) for _ in range(99)
    ]
    used, cost, nbytes = (np.array(column) for column in zip(*cases, strict=True))
    many = policy.ranks_ms(used_ms=used, cost_s=cost, nbytes=nbytes)
    alone = [policy.rank_ms(used_ms=case[0], cost_s=case[1], nbytes=case[2]) for case in cases]
    # The two logarithms may differ in their last bit.
    assert np.abs(many - np.array(alone)).max() <= 1


def one_by_one(headers: list[RecordHeader], known: dict[bytes, int], takes_apart: bool) -> dict[int, tuple[bool, int]]:
    """The reference, which follows each parent: valid rows to (whether it stands apart, prefix bytes)."""
    row_of = {h.hash: number for number, h in enumerate(headers) if h.kind is RecordKind.BLOCK}
    found: dict[int, tuple[bool, int]] = {}
    for apart in (False, True) if takes_apart else (False,):
        while True:
            before = len(found)
            for number, header in enumerate(headers):
                if number in found:
                    continue
                is_block = header.kind is RecordKind.BLOCK
                parent = header.parent if is_block else header.hash
                above = known.get(parent) if parent not in row_of else found.get(row_of[parent], (False, None))[1]
                if header.flags & RecordFlag.FIRST:
                    above = 0
                if above is not None:
                    found[number] = (False, (above if is_block else 0) + header.payload_bytes)
                elif apart and header.flags & RecordFlag.ELSEWHERE and _is_topmost(headers, row_of, found, number):
                    found[number] = (True, header.payload_bytes)
            if len(found) == before:
                break
    return found


def _is_topmost(headers: list[RecordHeader], row_of: dict[bytes, int], found: object, number: int) -> bool:
    """Whether no record above this one may stand apart."""
    while True:
        header = headers[number]
        parent = header.parent if header.kind is RecordKind.BLOCK else header.hash
        above = row_of.get(parent)
        if above is None:
            return True
        if headers[above].flags & RecordFlag.ELSEWHERE:
            return False
        number = above


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("takes_apart", [False, True])
def test_a_forest_is_what_following_each_parent_gives(seed: int, takes_apart: bool) -> None:
    rng = random.Random(seed)
    known = {rng.randbytes(32): rng.randrange(1000) for _ in range(4)}
    headers: list[RecordHeader] = []
    for _ in range(120):
        blocks = [header.hash for header in headers if header.kind is RecordKind.BLOCK]
        above = rng.choice([rng.randbytes(32), rng.choice(list(known)), *(blocks[-3:] * 4), *blocks[:4]])
        flags = RecordFlag.FIRST if rng.random() < 0.05 else RecordFlag.NONE
        flags |= RecordFlag.ELSEWHERE if rng.random() < 0.2 else RecordFlag.NONE
        kind = RecordKind.CHECKPOINT if rng.random() < 0.2 else RecordKind.BLOCK
        place = {"hash": above} if kind is RecordKind.CHECKPOINT else {}
        headers.append(header_of(rng, kind=kind, parent=above, flags=flags, **place))
    rng.shuffle(headers)
    rows = rows_of([pack_record_header(header, SEED) for header in headers], SEED)
    forest = hang_together(rows, parent_names(rows), known, takes_apart=takes_apart)
    expected = one_by_one(headers, known, takes_apart)
    assert np.flatnonzero(forest.stands).tolist() == sorted(expected)
    assert {n: (bool(forest.apart[n]), int(forest.prefix_bytes[n])) for n in expected} == expected
    # A parent counts all records that depend on it, except those that stand apart.
    children = [0] * len(headers)
    row_of = {h.hash: number for number, h in enumerate(headers) if h.kind is RecordKind.BLOCK}
    for number, (apart, _) in expected.items():
        header = headers[number]
        parent = row_of.get(header.parent if header.kind is RecordKind.BLOCK else header.hash)
        if parent is not None and not apart and not header.flags & RecordFlag.FIRST:
            children[parent] += 1
    assert forest.children().tolist() == children


def test_names_that_begin_alike_are_told_apart() -> None:
    rng = random.Random(3)
    names = [b"8 bytes." + bytes([number] * 24) for number in range(4)]
    hashes = np.frombuffer(b"".join([*names[:3], names[1]]), "V32")
    assert numbers_of(hashes, names[2:]) == {names[2]: 2}
    assert numbers_of(hashes, names[:2]) == {names[0]: 0, names[1]: 3}
    places = [(2, 0), (1, 1), (1, 2), (1, 1)]
    headers = [
        header_of(rng, kind=RecordKind.BLOCK, hash=names[number], segment=segment, offset=8 * at)
        for at, (segment, number) in enumerate(places)
    ]
    kept = _last_copies(rows_of([pack_record_header(header, SEED) for header in headers], SEED))
    assert list(zip(kept["hash"].tolist(), kept["offset"].tolist(), strict=True)) == [
        (names[2], 16),
        (names[1], 24),
        (names[0], 0),
    ]


def test_records_that_hang_on_one_another_in_a_circle_never_stand() -> None:
    parent = np.array([1, 2, 0, 2, -1, 4, 6])
    sums, goes_round = sums_to_root(parent, np.arange(7))
    assert goes_round.tolist() == [True, True, True, True, False, False, True]
    assert sums[[4, 5]].tolist() == [4, 9]


@pytest.mark.parametrize("num_names_max", [3_000, 10**9])
def test_what_was_seen_is_found_again(num_names_max: int) -> None:
    rng = random.Random(5)
    headers = [header_of(rng) for _ in range(300)]
    rows = rows_of([pack_record_header(header, SEED) for header in headers], SEED)
    seen = SeenNames(num_names_max)
    assert not seen.have(rows).any()
    seen.add(rows[:200])
    assert seen.have(rows[:200]).all()
    assert not seen.have(rows[200:]).any()
    crowded = SeenNames(0)
    crowded.add(rows[:200])
    assert crowded.have(rows[:200]).all()
    # A block's checkpoint is another record.
    others = [dataclasses.replace(h, kind=RecordKind(3 - h.kind)) for h in headers[:200]]
    assert not seen.have(rows_of([pack_record_header(header, SEED) for header in others], SEED)).any()
