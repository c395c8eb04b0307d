"""Strategies decide writes from lengths alone. These tests say which checkpoints each must leave and must not leave."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from antefix.errors import ConfigError, InternalError
from antefix.window import (
    BudgetState,
    Mark,
    OutputFacts,
    PromptFacts,
    Reason,
    Sizes,
    Strategies,
    Strategy,
    Tier,
    in_force,
    parse,
)

SIZES = Sizes(
    block_size=128,
    block_bytes=449_824,
    checkpoint_bytes=3_645_568,
    window_tokens=128,
    replay_reach=tuple(layers * 127 + 1 for layers in range(43, 0, -1)),
)
FIXED = ("full", "periodic(8192)", "periodic(1000)", "boundary", "zero")
ALL = (*FIXED, "auto", "auto(budget=9)", "auto(ends=pool)", "auto(ends=disk)")


def _blocks(marks: tuple[Mark, ...]) -> list[int]:
    return [mark.block for mark in marks]


def _reasons(marks: tuple[Mark, ...]) -> dict[int, Reason]:
    return {mark.block: mark.reason for mark in marks}


@st.composite
def _facts(draw: st.DrawFn) -> PromptFacts:
    num_tokens = draw(st.integers(0, 200_000))
    stored = draw(st.integers(0, num_tokens // 128 + 3))
    resume = draw(st.integers(0, stored))
    checkpoints = draw(st.sets(st.integers(1, max(stored, 1)), max_size=5))
    return PromptFacts(
        num_tokens=num_tokens,
        num_stored_blocks=stored,
        resume_block=resume,
        checkpoints=tuple(sorted(checkpoints)),
        align_blocks=draw(st.sampled_from([1, 4, 16])),
        budget=BudgetState(used_bytes=draw(st.integers(0, 10**10)), limit_bytes=draw(st.sampled_from([None, 10**9]))),
    )


@given(facts=_facts(), text=st.sampled_from(ALL))
def test_marks_are_new_ascending_aligned_and_where_state_passes(facts: PromptFacts, text: str) -> None:
    blocks = _blocks(parse(text).at_prompt(facts, SIZES))
    assert blocks == sorted(set(blocks))
    for block in blocks:
        assert facts.resume_block <= block <= facts.num_tokens // SIZES.block_size
        assert block > 0
        assert block not in facts.checkpoints
        assert block % facts.align_blocks == 0


@given(prompt=st.integers(0, 50_000), output=st.integers(0, 5_000), text=st.sampled_from(ALL))
def test_output_marks_lie_after_the_prompts_own_blocks(prompt: int, output: int, text: str) -> None:
    facts = OutputFacts(num_tokens=prompt + output, prompt_tokens=prompt)
    for block in _blocks(parse(text).at_output(facts, SIZES)):
        assert prompt // 128 < block <= (prompt + output) // 128


@pytest.mark.parametrize("text", ALL)
def test_a_strategy_prints_as_what_parses_to_it(text: str) -> None:
    assert parse(str(parse(text))) == parse(text)


@pytest.mark.parametrize(
    ("text", "budget"),
    [("auto(budget=20GiB)", 20 * 2**30), ("auto(budget=1.5gb)", 1_500_000_000), ("auto( budget=7 )", 7)],
)
def test_budgets_read_decimal_and_binary_units(text: str, budget: int) -> None:
    assert str(parse(text)) == f"auto(budget={budget})"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ful",
        "periodic",
        "periodic()",
        "periodic(0)",
        "periodic(-1)",
        "auto(8)",
        "auto(budget=x)",
        "zero(1)",
        "full()()",
    ],
)
def test_what_is_no_strategy_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError):
        parse(text)


def test_full_leaves_every_boundary_after_the_resume_point() -> None:
    facts = PromptFacts(num_tokens=1000, num_stored_blocks=3, resume_block=3, checkpoints=(3,))
    assert _blocks(parse("full").at_prompt(facts, SIZES)) == [4, 5, 6, 7]


def test_periodic_counts_from_token_zero_so_that_prefixes_share_checkpoints() -> None:
    strategy = parse("periodic(1024)")
    facts = PromptFacts(num_tokens=4000, num_stored_blocks=9, resume_block=8, checkpoints=(8,))
    assert _blocks(strategy.at_prompt(facts, SIZES)) == [16, 24]
    assert _blocks(strategy.at_output(OutputFacts(num_tokens=5200, prompt_tokens=4000), SIZES)) == [32, 40]


def test_boundary_leaves_the_end_of_prompt_and_of_output() -> None:
    strategy = parse("boundary")
    facts = PromptFacts(num_tokens=1000, num_stored_blocks=0, resume_block=0)
    assert _reasons(strategy.at_prompt(facts, SIZES)) == {7: Reason.PROMPT_END}
    assert _blocks(strategy.at_output(OutputFacts(num_tokens=1300, prompt_tokens=1000), SIZES)) == [10]
    assert strategy.at_output(OutputFacts(num_tokens=1020, prompt_tokens=1000), SIZES) == ()


def test_zero_never_leaves_any() -> None:
    facts = PromptFacts(num_tokens=100_000, num_stored_blocks=0, resume_block=0)
    assert parse("zero").at_prompt(facts, SIZES) == ()
    assert parse("zero").at_output(OutputFacts(num_tokens=1300, prompt_tokens=10), SIZES) == ()


def test_auto_marks_the_fork_where_a_second_request_leaves_a_stored_prefix() -> None:
    facts = PromptFacts(num_tokens=3000, num_stored_blocks=10, resume_block=4, checkpoints=(4,))
    assert _reasons(parse("auto").at_prompt(facts, SIZES))[10] is Reason.FORK


def test_auto_marks_a_replayed_fork_at_the_resume_point_itself() -> None:
    facts = PromptFacts(num_tokens=130_000, num_stored_blocks=1000, resume_block=1000)
    assert _reasons(parse("auto").at_prompt(facts, SIZES))[1000] is Reason.FORK


def test_auto_leaves_no_second_checkpoint_at_a_known_fork() -> None:
    facts = PromptFacts(num_tokens=3000, num_stored_blocks=10, resume_block=10, checkpoints=(10,))
    assert 10 not in _blocks(parse("auto").at_prompt(facts, SIZES))


def test_auto_keeps_the_end_clear_of_the_templates_cue() -> None:
    facts = PromptFacts(num_tokens=1281, num_stored_blocks=0, resume_block=0)
    assert _blocks(parse("auto").at_prompt(facts, SIZES))[-1] == 9
    facts = PromptFacts(num_tokens=1283, num_stored_blocks=0, resume_block=0)
    assert _blocks(parse("auto").at_prompt(facts, SIZES))[-1] == 10


def _under(used_bytes: int) -> PromptFacts:
    budget = BudgetState(used_bytes=used_bytes, limit_bytes=10 * SIZES.checkpoint_bytes)
    return PromptFacts(num_tokens=100_000, num_stored_blocks=50, resume_block=0, budget=budget)


def test_auto_drops_sparse_marks_from_half_of_its_budget_on() -> None:
    free = parse("auto").at_prompt(_under(5 * SIZES.checkpoint_bytes), SIZES)
    tight = parse("auto").at_prompt(_under(6 * SIZES.checkpoint_bytes), SIZES)
    assert Reason.SPARSE in _reasons(free).values()
    assert set(_reasons(tight).values()) == {Reason.FORK, Reason.PROMPT_END}


def test_auto_with_room_for_one_keeps_the_end_and_with_none_nothing() -> None:
    one = parse("auto").at_prompt(_under(9 * SIZES.checkpoint_bytes), SIZES)
    assert list(_reasons(one).values()) == [Reason.PROMPT_END]
    assert parse("auto").at_prompt(_under(9 * SIZES.checkpoint_bytes + 1), SIZES) == ()
    none = BudgetState(used_bytes=5, limit_bytes=4)
    assert parse("auto").at_output(OutputFacts(num_tokens=900, prompt_tokens=10, budget=none), SIZES) == ()


def test_the_fuller_the_budget_the_shorter_the_time_of_a_new_checkpoint() -> None:
    ttls = [parse("auto").at_prompt(_under(n * SIZES.checkpoint_bytes), SIZES)[-1].ttl_s for n in (0, 5, 7, 9)]
    assert ttls[0] == ttls[1] > ttls[2] > ttls[3] >= 60.0


@given(facts=_facts(), limit=st.integers(0, 10**9))
def test_auto_never_asks_for_more_than_its_budget_has_left(facts: PromptFacts, limit: int) -> None:
    marks = parse(f"auto(budget={limit})").at_prompt(facts, SIZES)
    assert not marks or facts.budget.used_bytes + len(marks) * SIZES.checkpoint_bytes <= limit


def test_namespaces_switch_while_running_and_the_rest_keep_the_default() -> None:
    book = Strategies(parse("boundary"))
    book.set("agents", parse("zero"))
    assert str(book.of("agents")) == "zero"
    assert str(book.of("chat")) == "boundary"
    book.set("agents", parse("periodic(4096)"))
    assert (str(book.of("agents")), str(book.of("chat"))) == ("periodic(4096)", "boundary")


def test_contradictory_facts_are_refused() -> None:
    with pytest.raises(InternalError):
        PromptFacts(num_tokens=100, num_stored_blocks=1, resume_block=2)
    with pytest.raises(InternalError):
        OutputFacts(num_tokens=5, prompt_tokens=6)


def test_strategies_share_one_protocol() -> None:
    strategies: list[Strategy] = [parse(text) for text in ALL]
    assert len({str(strategy) for strategy in strategies}) == len(ALL)


def test_auto_sends_ends_to_the_pool_on_request_and_what_lasts_to_disk() -> None:
    facts = PromptFacts(num_tokens=100_000, num_stored_blocks=50, resume_block=0)
    for mark in parse("auto(budget=9GB, ends=pool)").at_prompt(facts, SIZES):
        assert (mark.tier is Tier.POOL) == (mark.reason is Reason.PROMPT_END)


def _on_new_ground(num_tokens: int) -> list[int]:
    return _blocks(
        parse("auto").at_prompt(PromptFacts(num_tokens=num_tokens, num_stored_blocks=0, resume_block=0), SIZES)
    )


def test_auto_marks_a_new_stretch_near_its_start_its_middle_and_its_end_the_more_the_longer() -> None:
    assert _on_new_ground(7_000) == [54]
    assert _on_new_ground(8_194) == [9, 56, 64]
    assert _on_new_ground(12_802) == [15, 92, 100]
    assert _on_new_ground(25_602) == [30, 80, 136, 192, 200]
    assert _on_new_ground(128_002) == [400, 936, 992, 1000]


def test_auto_marks_the_place_a_little_after_an_unforeseen_fork() -> None:
    turn = PromptFacts(num_tokens=20_000, num_stored_blocks=100, resume_block=90, checkpoints=(90,))
    assert _reasons(parse("auto").at_prompt(turn, SIZES)) == {
        100: Reason.FORK,
        104: Reason.SPARSE,
        156: Reason.PROMPT_END,
    }
    # At a checkpoint, or one block after an end that was left early for the cue, nothing was left inside.
    for end in (100, 99):
        known = PromptFacts(num_tokens=20_000, num_stored_blocks=100, resume_block=end, checkpoints=(end,))
        assert 104 not in _blocks(parse("auto").at_prompt(known, SIZES))
    short = PromptFacts(num_tokens=16_000, num_stored_blocks=100, resume_block=90, checkpoints=(90,))
    assert _blocks(parse("auto").at_prompt(short, SIZES)) == [100, 124]
    assert 4 not in _on_new_ground(20_000)


def test_auto_leaves_no_sparse_marks_in_the_steps_of_a_running_conversation() -> None:
    step = PromptFacts(num_tokens=40_000, num_stored_blocks=200, resume_block=200, checkpoints=(200,))
    assert _blocks(parse("auto").at_prompt(step, SIZES)) == [312]
    leap = PromptFacts(num_tokens=100_000, num_stored_blocks=200, resume_block=200, checkpoints=(200,))
    assert Reason.SPARSE in _reasons(parse("auto").at_prompt(leap, SIZES)).values()


def test_a_mark_is_worth_at_most_a_replay_and_a_sparse_one_a_fraction() -> None:
    facts = PromptFacts(num_tokens=128_002, num_stored_blocks=20, resume_block=10, checkpoints=(10,))
    saved = {mark.block: mark.saved_tokens for mark in parse("auto").at_prompt(facts, SIZES)}
    assert saved[20] == 20 * 128
    assert saved[1000] == SIZES.exact_replay_work_tokens == 2_668
    assert max(value for block, value in saved.items() if block not in (20, 1000)) == round(2_668 / 8)
    full = {mark.saved_tokens for mark in parse("full").at_prompt(facts, SIZES)}
    assert full == {128}


def test_strategies_of_namespaces_are_read_from_one_text() -> None:
    book = Strategies.parse("agents=periodic(8192); batch = zero; auto(budget=9, ends=disk)")
    found = {name: str(book.of(name)) for name in ("chat", "agents", "batch")}
    assert found == {"chat": "auto(budget=9, ends=disk)", "agents": "periodic(8192)", "batch": "zero"}
    assert str(Strategies.parse("full").of("anyone")) == "full"
    assert str(Strategies.parse("agents=full").of("others")) == str(Strategies.parse("").of("others")) == "auto"


@pytest.mark.parametrize("text", ["agents=often", "a=full; a=zero", "full; zero", "=full", "auto; ;zero"])
def test_a_text_that_names_no_strategy_or_one_twice_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        Strategies.parse(text)


def test_autos_ends_go_to_the_window_pool_where_there_is_one_unless_told_otherwise() -> None:
    assert str(in_force(parse("auto"), has_pool=True)) == "auto(ends=pool)"
    assert str(in_force(parse("auto(budget=9)"), has_pool=True)) == "auto(budget=9, ends=pool)"
    assert str(in_force(parse("auto(ends=disk)"), has_pool=True)) == "auto(ends=disk)"
    assert str(in_force(parse("auto"), has_pool=False)) == "auto"
    assert str(in_force(parse("full"), has_pool=True)) == "full"
    with pytest.raises(ConfigError, match="needs a window pool"):
        in_force(parse("auto(ends=pool)"), has_pool=False)
