"""Stored KV with NaN and a right checksum is a miss. It is reported to the store, computed again and replaced."""

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from antefix.errors import NotFinite, StepFailed
from antefix.model.finite import unusable_rows
from antefix.model.window_state import DraftState
from antefix.record import RecordKind
from antefix_decode.adopt import adopt, take_handoff
from antefix_prefill.leave_handoff import leave_handoff
from antefix_prefill.run_prompt import run_prompt

TOKENS = np.random.default_rng(11).integers(0, 256, 340)

pytestmark = pytest.mark.slow


async def logits_of(engine, prompt):
    computed = await run_prompt(engine, prompt)
    engine.blocks.release(computed.sequence.block_table)
    return computed


def poison(store, kind, number):
    """Set a field to all ones, which is NaN in every format that has NaN."""
    names = sorted(name for name in store.records if name[0] is kind)
    name = names[number % len(names)]
    store.records[name] = b"\xff" * len(store.records[name])
    return name


@pytest.mark.parametrize("kv_format", ["fp8", "float32"])
@pytest.mark.parametrize("kind", [RecordKind.BLOCK, RecordKind.CHECKPOINT])
async def test_one_request_computes_again_and_puts_right_bytes_in_their_place(
    make_engine, make_prompt, store, kind, kv_format
):
    writer = make_engine(kv_format=kv_format)
    cold = await logits_of(writer, make_prompt(writer, TOKENS))
    right = dict(store.records)
    for number in range(2):
        name = poison(store, kind, number)
        reader = make_engine(kv_format=kv_format)
        again = await logits_of(reader, make_prompt(reader, TOKENS))
        # 1. The answer equals a cold run to the bit, and the bad record was reported to the store once.
        assert_array_equal(again.logits, cold.logits)
        if store.rejected:
            assert store.rejected == [name] and reader.counters.by_kind == {"BlockUnusable": 1}
        # 2. The right record is stored again, so the next request hits the whole prefix.
        assert kind is RecordKind.CHECKPOINT or store.rejected
        store.records.update({name: right[name]} if name not in store.records else {})
        assert store.records[name] == right[name]
        store.rejected.clear()


async def test_unusable_blocks_never_stand_under_a_name_in_memory(make_engine, make_prompt, store):
    writer = make_engine()
    cold = await logits_of(writer, make_prompt(writer, TOKENS))
    poison(store, RecordKind.BLOCK, 0)
    reader = make_engine()
    for _ in range(2):
        again = await logits_of(reader, make_prompt(reader, TOKENS))
        assert_array_equal(again.logits, cold.logits)
    assert len(store.rejected) == 1


async def test_what_a_model_computes_that_is_no_number_is_not_stored(make_engine, make_prompt, store):
    engine = make_engine()
    embedding = engine.model.model.embed_tokens.weight.data
    before = embedding[int(TOKENS[100])].clone()
    embedding[int(TOKENS[100])] = float("nan")
    try:
        # With NaN scores torch may fail first. The log has torch's error, and the caller gets ours.
        with pytest.raises(
            (NotFinite, StepFailed), match=r"NaN or infinity|a step of the model failed; the worker's log"
        ):
            await logits_of(engine, make_prompt(engine, TOKENS))
    finally:
        embedding[int(TOKENS[100])] = before
    for (kind, _), payload in store.records.items():
        assert kind is RecordKind.BLOCK
        assert not unusable_rows(np.frombuffer(payload, np.uint8)[None], engine.layout).any()
    assert engine.blocks.num_available == engine.pool.num_blocks
    # With the weight restored, the same worker computes the whole prompt.
    await logits_of(engine, make_prompt(engine, TOKENS))


async def test_a_checkpoint_with_a_draft_state_of_another_model_is_a_miss(make_engine, make_prompt, store):
    writer = make_engine()
    cold = await logits_of(writer, make_prompt(writer, TOKENS))
    names = [name for name in store.records if name[0] is RecordKind.CHECKPOINT]
    for name in names:
        # The draft state has one value, but this model's step needs M * D values.
        store.records[name] += bytes(DraftState.fixed_bytes(writer.layout) + 4)
    reader = make_engine()
    again = await logits_of(reader, make_prompt(reader, TOKENS))
    np.testing.assert_array_equal(again.logits, cold.logits)
    assert names and reader.counters.by_kind == {"BlockCorrupt": len(store.rejected)} and store.rejected


async def test_a_handoff_is_not_believed_either(make_engine, make_prompt, store):
    engine = make_engine()
    prompt = make_prompt(engine, TOKENS)
    computed = await run_prompt(engine, prompt)
    name = await leave_handoff(engine, computed)
    right = store.records[RecordKind.HANDOFF, name]
    nan = np.full(64, np.nan, "<f4").tobytes()
    for at in (len(right) - len(nan), 64 + 7 * 64):
        store.records[RecordKind.HANDOFF, name] = right[:at] + nan + right[at + len(nan) :]
        handoff = await take_handoff(engine, prompt, name)
        assert handoff is None or await adopt(engine, prompt, handoff) is None
    engine.blocks.release(computed.sequence.block_table)
