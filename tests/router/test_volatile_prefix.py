"""A client whose prompts begin with a changing text is warned. A client whose prompts merely differ is not."""

import httpx2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from antefix_billing.ledger_files import read_settled
from antefix_router.volatile_prefix import HEAD_TOKENS, PrefixWatch
from tests.gateway.scripted import Script, make_front, serving
from tests.waiting import AT_MOST_S

TEXTS = np.random.default_rng(17)


def text(num_tokens, seed):
    return np.random.default_rng(seed).integers(0, 50_000, num_tokens).astype(np.uint32)


def joined(*parts):
    return np.concatenate(parts)


SYSTEM = text(900, 1)


def flags(prompts, watch=None):
    watch = watch or PrefixWatch()
    return [watch.note("client", prompt) for prompt in prompts]


def test_a_line_that_changes_at_the_head_is_seen_from_the_second_prompt_on():
    # The changing text has another length each time, as with times and counters.
    prompts = [joined(text(20 + number, 100 + number), SYSTEM, text(300, number)) for number in range(6)]
    assert flags(prompts) == [False, True, True, True, True, True]
    assert flags([prompts[0], prompts[1], prompts[1]]) == [False, True, True]  # a repeated attempt


def test_a_growing_conversation_is_not():
    conversation = joined(SYSTEM, text(5000, 2))
    assert not any(flags([conversation[: 950 + 200 * number] for number in range(8)]))


def test_other_questions_behind_a_short_system_text_are_not():
    assert not any(flags([joined(SYSTEM[:40], text(1500, number)) for number in range(8)]))


def test_kinds_of_prompts_that_take_turns_are_not():
    kinds = [text(1200, 10), text(1200, 11), text(1200, 12)]
    assert not any(flags([joined(kinds[number % 3], text(100, number)) for number in range(9)]))


def test_a_volatile_kind_is_seen_between_others():
    other = text(1200, 20)
    found = flags([joined(text(20, number), SYSTEM) if number % 2 else other for number in range(6)])
    assert found == [False, False, False, True, False, True]


def test_what_differs_only_late_or_is_short_is_not():
    assert not any(flags([joined(SYSTEM[:300], text(20, number), SYSTEM[300:]) for number in range(4)]))
    assert not any(flags([joined(text(20, number), SYSTEM[:100]) for number in range(4)]))


def test_clients_are_apart_and_bounded():
    watch = PrefixWatch(num_clients_max=10)
    first, second = (joined(text(20, number), SYSTEM) for number in range(2))
    assert not watch.note("a", first) and not watch.note("b", second)
    for number in range(30):
        watch.note(f"c{number}", first)
    assert len(watch) == 10 and not watch.note("a", second)
    prompt = text(100_000, 3)
    watch.note("d", prompt)
    assert all(head.tokens.nbytes <= 4 * HEAD_TOKENS for heads in watch._heads.values() for head in heads)
    # not a view of the whole prompt
    assert all(head.tokens.base is None for heads in watch._heads.values() for head in heads)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 200), st.integers(1, 200), st.integers(400, 2000), st.integers(0, 1 << 20))
def test_any_volatile_beginning_before_enough_equal_text(first, second, later, seed):
    same = text(later, seed)
    prompts = [joined(text(size, seed + 1 + number), same) for number, size in enumerate((first, second))]
    assert flags(prompts) == [False, True]
    assert flags([joined(same, prompt) for prompt in prompts]) == [False, False]


@pytest.mark.parametrize("rules", ["", "off"])
async def test_the_record_says_so_and_moving_the_line_mends_it(tmp_path, rules):
    script = Script()
    system = "You are an agent in a terminal, and you are careful with files that are not yours. " * 12
    async with (
        serving(make_front(script, ledger=tmp_path), prefix_rules=rules) as url,
        httpx2.AsyncClient(base_url=url, timeout=AT_MOST_S) as client,
    ):
        for number in range(3):
            line = f"x-anthropic-billing-header: cc_version=2.1.197.{number}{number}1; cch={number}ab;\n"
            body = {"model": "m", "max_tokens": 9, "system": line + system}
            said = [{"role": "user", "content": f"{number} questions"}]
            assert (await client.post("/v1/messages", json={**body, "messages": said})).status_code == 200
    found = [item.record.prefix_volatile for item in read_settled(tmp_path)]
    assert found == ([False, True, True] if rules else [False] * 3)
