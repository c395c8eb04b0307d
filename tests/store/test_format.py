"""docs/FORMAT.md agrees with the constants. Headers are packed and unpacked unchanged, and damage is detected."""

from __future__ import annotations

import dataclasses
import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from antefix.block import Family, Fingerprint
from antefix.errors import BlockCorrupt
from antefix.layout import KVGeometry
from antefix.record import RecordKind
from antefix.store_files import record_format as fmt
from antefix.store_files import record_header as head

DOCUMENT = (Path(__file__).parents[2] / "docs" / "FORMAT.md").read_text()
STRUCTS = (
    "STORE_HEADER",
    "SEGMENT_HEADER",
    "RECORD_HEADER",
    "RECORD_HEADER_V1",
    "INDEX_ENTRY",
    "INDEX_ENTRY_SHORT",
    "SEGMENT_ENTRY",
)
hashes = st.binary(min_size=32, max_size=32)


def documented_fields(name: str) -> list[tuple[int, int]]:
    table = DOCUMENT.split(f"<!-- table: {name} -->")[1].split("\n\n")[0]
    return [(int(row[1]), int(row[2])) for row in re.finditer(r"^\| (\d+) \| (\d+) \|", table, re.MULTILINE)]


def packed_fields(layout: struct.Struct) -> list[tuple[int, int]]:
    offset, fields = 0, []
    for count, code in re.findall(r"(\d*)([a-zA-Z])", layout.format):
        nbytes = struct.calcsize(f"<{count}{code}")
        step = nbytes if code == "s" else struct.calcsize(f"<{code}")
        fields += [(offset + i * step, step) for i in range(nbytes // step)]
        offset += nbytes
    return fields


@pytest.mark.parametrize("name", STRUCTS)
def test_tables_match_the_structs(name: str) -> None:
    assert documented_fields(name) == packed_fields(getattr(fmt, name))


def test_constants_in_the_text_match() -> None:
    prose = " ".join(DOCUMENT.split())
    for magic in (fmt.STORE_MAGIC, fmt.SEGMENT_MAGIC, fmt.RECORD_MAGIC, fmt.RECORD_MAGIC_V1):
        assert f"`{magic.decode()}`" in DOCUMENT
    assert f"The store on disk, version {fmt.FORMAT_VERSION}" in DOCUMENT
    assert f"starts at a multiple of {fmt.BATCH_ALIGN:,}" in prose
    assert f"records start at multiples of {fmt.RECORD_ALIGN}" in prose
    assert f"at most {fmt.TENANT_BYTES_MAX_V1}" in prose
    signed, sealed = head.SIGNED_PART, head.SEALED_PART
    assert f"Bytes {signed.start} to {signed.stop} are the *signed part*" in prose
    assert f"Bytes {sealed.start} to {sealed.stop}, with salt and MAC, are the *sealed part*" in prose
    for family in Family:
        assert re.search(rf"\b{family.code} (V4|V4\.1|GQA|MLA|opaque)", DOCUMENT) and f"`{family.value}`" in DOCUMENT
    for kind in RecordKind:
        name = "pooled checkpoint" if kind is RecordKind.POOLED else kind.name.lower()
        assert f"| {kind.value} | {name} |" in DOCUMENT


def test_every_field_of_a_statement_is_documented() -> None:
    section = DOCUMENT.split("| field | what it says | example |")[1].split("2. **Tenant key**")[0]
    geometry = KVGeometry.from_config({"num_hidden_layers": 2})
    fingerprint = Fingerprint(weights_revision="w", geometry=geometry, kv_format="fp8", tokenizer="t")
    assert set(json.loads(fingerprint.statement)) == set(re.findall(r"^ +\| (\w+) \|", section, re.MULTILINE))


SHARED: dict[str, Any] = {
    "payload_checksum": st.binary(min_size=16, max_size=16),
    "hash": hashes,
    "parent": hashes,
    "fingerprint": hashes,
    "segment": st.integers(1, 1 << 31),
    "offset": st.integers(0, 1 << 40),
    "stored_bytes": st.integers(1, fmt.PAYLOAD_BYTES_MAX),
    "payload_bytes": st.integers(1, fmt.PAYLOAD_BYTES_MAX),
    "position": st.integers(0, 1 << 31),
    "created_ms": st.integers(0, 1 << 42),
    "expires_ms": st.integers(0, 1 << 42),
    "kind": st.sampled_from([RecordKind.BLOCK, RecordKind.CHECKPOINT]),
    "codec": st.sampled_from(list(fmt.Codec)),
    "flags": st.sampled_from([fmt.RecordFlag.NONE, fmt.RecordFlag.FIRST, fmt.RecordFlag.ENCRYPTED]),
    "nonce": st.binary(min_size=12, max_size=12),
}
headers = st.one_of(
    st.builds(
        head.RecordHeader,
        **SHARED,
        cost_us=st.integers(0, (1 << 32) - 1),
        tenant=st.binary(min_size=24, max_size=24),
        generation=st.integers(0, 0xFFFF),
        num_cards=st.integers(1, 0xFFFF),
        family=st.integers(0, 255),
        salt=st.binary(min_size=16, max_size=16),
        mac=st.binary(min_size=16, max_size=16),
    ),
    st.builds(
        head.RecordHeader,
        **SHARED,
        cost_us=st.integers(0, 1 << 50),
        tenant=st.text(max_size=11).map(str.encode),
        version=st.just(1),
    ),
)


@given(header=headers, seed=st.integers(0, (1 << 64) - 1))
def test_record_headers_round_trip(header: head.RecordHeader, seed: int) -> None:
    assert head.unpack_record_header(head.pack_record_header(header, seed), seed) == header


@given(header=headers, seed=st.integers(0, (1 << 64) - 1))
def test_what_a_reader_looks_at_is_what_stands_in_the_header(header: head.RecordHeader, seed: int) -> None:
    header = dataclasses.replace(
        header, codec=fmt.Codec.RAW, flags=fmt.RecordFlag.NONE, payload_bytes=header.stored_bytes
    )
    raw = head.pack_record_header(header, seed)
    name = {"kind": header.kind, "block_hash": header.hash, "fingerprint": header.fingerprint}
    entry = fmt.IndexEntry(
        header.segment, header.offset, header.stored_bytes, header.payload_bytes, *range(10), 0, 0, header.parent
    )
    entry.codec = fmt.Codec.RAW
    place = {"segment": header.segment, "offset": header.offset}
    assert head.expected_checksum(raw, seed, **name, entry=entry) == header.payload_checksum
    assert head.plain_record(raw, seed, **name, **place) == (header.payload_bytes, header.payload_checksum)
    for changed in ({"kind": 3 - header.kind}, {"block_hash": header.parent[::-1]}, {"fingerprint": bytes(32)}):
        if {**name, **changed} != name:
            assert head.expected_checksum(raw, seed, **{**name, **changed}, entry=entry) is None
    for field in ("segment", "offset", "stored_bytes", "payload_bytes", "codec"):
        other = dataclasses.replace(entry, **{field: getattr(entry, field) + 1})
        assert head.expected_checksum(raw, seed, **name, entry=other) is None
    assert head.plain_record(raw, seed, **name, segment=header.segment + 1, offset=header.offset) is None
    assert head.plain_record(raw, seed ^ 1, **name, **place) is None
    assert len(head.sealed_part(raw)) == head.SEALED_BYTES


@given(header=headers, seed=st.integers(0, (1 << 64) - 1), bit=st.integers(0, 256 * 8 - 1))
def test_a_flipped_bit_in_a_record_header_is_found(header: head.RecordHeader, seed: int, bit: int) -> None:
    raw = bytearray(head.pack_record_header(header, seed))
    raw[bit // 8] ^= 1 << bit % 8
    with pytest.raises(BlockCorrupt):
        head.unpack_record_header(raw, seed)


def test_a_header_of_another_store_is_not_accepted() -> None:
    identity = fmt.StoreIdentity(store_id=bytes(range(16)), created_ms=5)
    other = fmt.StoreIdentity(store_id=bytes(16), created_ms=5)
    header = head.RecordHeader(
        payload_checksum=bytes(16),
        hash=bytes(32),
        parent=bytes(32),
        fingerprint=bytes(32),
        segment=1,
        offset=4096,
        stored_bytes=1,
        payload_bytes=1,
        position=1,
        created_ms=1,
        expires_ms=0,
        cost_us=0,
        kind=RecordKind.BLOCK,
        codec=fmt.Codec.RAW,
        flags=fmt.RecordFlag.NONE,
    )
    with pytest.raises(BlockCorrupt):
        head.unpack_record_header(head.pack_record_header(header, identity.seed), other.seed)


# By field: the smallest number that does not fit into the short form.
TOO_LARGE = {
    "segment": 1 << 24,
    "offset": 1 << 35,
    "stored_bytes": 1 << 30,
    "payload_bytes": 1 << 30,
    "position": 1 << 28,
    "fingerprint_id": 1 << 20,
    "tenant_id": 1 << 20,
    "children": 1 << 16,
    "rank_ms": 1 << 44,
    "expires_ms": 1 << 42,
    "pinned_ms": 1,
    "prefix_bytes": 1 << 44,
    "cost_ms": 1 << 20,
    "ttl_s": 1 << 22,
    "codec": 1 << 4,
    "flags": 1 << 8,
}


@st.composite
def entries(draw: st.DrawFn) -> fmt.IndexEntry:
    fields = {name: draw(st.integers(0, limit - 1)) for name, limit in TOO_LARGE.items()}
    return fmt.IndexEntry(**{**fields, "offset": fields["offset"] // 8 * 8}, parent=draw(hashes))


@given(entry=entries(), key=hashes, bit=st.integers(0), field=st.sampled_from([*TOO_LARGE, ""]))
def test_index_entries_round_trip_and_notice_damage(entry: fmt.IndexEntry, key: bytes, bit: int, field: str) -> None:
    if field and field != "flags":
        setattr(entry, field, TOO_LARGE[field])
    raw = fmt.pack_entry(entry, key)
    assert len(raw) == (fmt.INDEX_ENTRY if field and field != "flags" else fmt.INDEX_ENTRY_SHORT).size
    assert fmt.unpack_entry(raw, key) == entry
    damaged = bytearray(raw)
    damaged[bit // 8 % len(raw)] ^= 1 << bit % 8
    assert fmt.unpack_entry(bytes(damaged), key) is None
    assert fmt.unpack_entry(raw[:-1], key) is None
    assert fmt.unpack_entry(raw, key[::-1] if key != key[::-1] else bytes([key[0] ^ 1]) + key[1:]) is None


def test_an_odd_place_takes_the_long_form() -> None:
    entry = fmt.IndexEntry(1, 4097, *range(14), bytes(32))
    assert fmt.unpack_entry(fmt.pack_entry(entry, b"k"), b"k") == entry


def test_segment_names_are_numbers() -> None:
    assert fmt.segment_number(fmt.segment_name(17)) == 17
    for name in (
        "17.seg",
        "000000000017.tmp",
        "00000000001x.seg",
        "00000000000\u00b2.seg",
        "999999999999.seg",
        "STORE",
    ):
        assert fmt.segment_number(name) is None
