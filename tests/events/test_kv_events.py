"""KV events in the format of vLLM and SGLang: the events that we write, and those of theirs that we read."""

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from antefix.errors import InvalidRequest
from antefix.events.kv_events import (
    CPU,
    GPU,
    STORAGE,
    KvCleared,
    KvRemoved,
    KvStored,
    decode_batch,
    encode_batch,
    medium_of,
)

PACK, UNPACK = msgspec.msgpack.encode, msgspec.msgpack.decode


def stored(**fields):
    values = {"block_hashes": [b"h" * 32], "parent_block_hash": None, "token_ids": [7, 8], "block_size": 2}
    return {"type": "BlockStored", **values, **fields}


def one(event):
    batch = decode_batch(PACK([1.0, [event]]))
    return batch.events[0] if batch.events else None


def test_what_is_written_has_the_documented_form():
    event = KvStored(
        block_hashes=[b"b" * 32, b"c" * 32],
        parent_block_hash=b"a" * 32,
        token_ids=[1, 2, 3, 4],
        block_size=2,
        lora_id=None,
        medium=GPU,
        lora_name=None,
        locality="LOCAL",
    )
    payload = encode_batch([event, KvRemoved(block_hashes=[5], medium=GPU), KvCleared()], ts=2.5, rank=3)
    assert UNPACK(payload) == [
        2.5,
        [
            {
                "type": "BlockStored",
                "block_hashes": [b"b" * 32, b"c" * 32],
                "parent_block_hash": b"a" * 32,
                "token_ids": [1, 2, 3, 4],
                "block_size": 2,
                # Readers of the format expect these three fields even if they are empty.
                "lora_id": None,
                "medium": "GPU",
                "lora_name": None,
                "locality": "LOCAL",
            },
            {"type": "BlockRemoved", "block_hashes": [5], "medium": "GPU"},
            {"type": "AllBlocksCleared"},
        ],
        3,
    ]


def test_what_was_written_is_read_again():
    event = KvStored(
        block_hashes=[1, 2],
        parent_block_hash=None,
        token_ids=[1, 2],
        block_size=1,
        lora_id=None,
        medium=CPU,
        lora_name="x",
        extra_keys=[["salt"], None],
        group_idx=2,
    )
    batch = decode_batch(encode_batch([event], ts=1.0, rank=1))
    (found,) = batch.events
    assert all(getattr(found, name) == getattr(event, name) for name in event.__struct_fields__)
    assert (batch.ts, batch.rank, batch.num_unread) == (1.0, 1, 0)


def test_sglangs_events_are_read():
    found = one(stored(block_hashes=[-5], parent_block_hash=-9, medium="CPU_PINNED", cache_salt="s", lora_id=None))
    assert (found.block_hashes, found.parent_block_hash, found.cache_salt) == ([-5], -9, "s")
    assert medium_of(found) == CPU
    assert one({"type": "BlockRemoved", "block_hashes": [-5]}).medium is None


def test_older_vllms_arrays_are_read():
    found = one(["BlockStored", [b"h"], None, [7, 8], 2, None, "GPU"])
    assert (found.block_hashes, found.token_ids, found.block_size) == ([b"h"], [7, 8], 2)
    assert isinstance(one(["BlockRemoved", [b"h"], "GPU"]), KvRemoved)
    assert isinstance(one(["AllBlocksCleared"]), KvCleared)


def test_fields_of_later_versions_are_passed_over():
    assert one(stored(ownership="tier-2", session_id="s", something_new=[1])).token_ids == [7, 8]
    assert len(decode_batch(PACK([1.0, [], 0, "a later field"])).events) == 0


@pytest.mark.parametrize(
    "event",
    [
        {"type": "SomethingNew"},
        ["SomethingNew", 1],
        ["BlockStored"],
        [],
        5,
        None,
        stored(token_ids=[[1, 2], [2, 3]]),  # SGLang's pairs
        stored(token_ids=[-1, 2]),
        stored(token_ids=[1, 1 << 32]),
        stored(token_ids=[1]),  # fewer tokens than its block has
        stored(block_size=0),
        stored(block_size=-4),
        stored(group_idx=-1),
        stored(group_idx=1 << 40),
        stored(block_hashes="h"),
        {"type": "BlockRemoved"},
    ],
)
def test_what_cannot_be_used_is_counted_and_spoils_nothing_else(event):
    batch = decode_batch(PACK([1.0, [event, stored()]]))
    assert (len(batch.events), batch.num_unread) == (1, 1)


@pytest.mark.parametrize(
    "payload", [b"", b"\xc1", PACK(5), PACK([]), PACK([1.0]), PACK(["a", []]), PACK([1.0, [], "x"])]
)
def test_no_batch_is_refused(payload):
    with pytest.raises(InvalidRequest):
        decode_batch(payload)


@given(st.binary(max_size=200))
@example(b"\xa3\x00\x00\x80")  # a text that is not UTF-8
def test_no_bytes_break_the_reader(payload):
    for each in (payload, b"\x92\xcb" + bytes(8) + b"\x91" + payload):
        try:
            batch = decode_batch(each)
        except InvalidRequest:
            continue
        assert all(isinstance(event, (KvStored, KvRemoved, KvCleared)) for event in batch.events)


@given(
    st.recursive(st.none() | st.integers(-(2**63), 2**64 - 1) | st.binary(max_size=8) | st.text(max_size=8), st.lists)
)
def test_no_value_in_place_of_a_field_breaks_the_reader(value):
    for name in ("block_hashes", "parent_block_hash", "token_ids", "block_size", "extra_keys", "group_idx"):
        batch = decode_batch(PACK([1.0, [stored(**{name: value}), stored()]]))
        # The event is either read or counted, and the event after it is read.
        assert 1 <= len(batch.events) == 2 - batch.num_unread


@pytest.mark.parametrize(
    ("word", "medium"),
    [
        (None, GPU),
        ("GPU", GPU),
        ("CPU", CPU),
        ("CPU_PINNED", CPU),
        ("DISK", STORAGE),
        ("EXTERNAL", STORAGE),
        ("new", STORAGE),
    ],
)
def test_media_have_one_name_each(word, medium):
    assert medium_of(one(stored(medium=word))) == medium
