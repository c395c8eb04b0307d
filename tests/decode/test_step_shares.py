"""Which sequences a step takes: no tenant is slower than with its share of the worker, and no share is left idle."""

import itertools
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from antefix_decode.step_shares import Place, StepShares, step_sizes

EACH_S = 0.001


def law(fixed):
    return lambda n: EACH_S * (fixed + n)


@dataclass(eq=False)
class Sequence:
    place: Place = field(default_factory=Place)
    last_step: int = 0


def sequences(shares, tenant, number, share=1):
    places = [Place(tenant=tenant, share=share, is_loading=False) for _ in range(number)]
    for place in places:
        shares.enter(place)
    return [Sequence(place) for place in places]


def learned(fixed):
    """Shares that have learned a worker's step times.  fixed: a step's fixed part, as a number of sequences."""
    shares, step_s = StepShares(), law(fixed)
    for number in itertools.islice(itertools.cycle((1, 8, 32)), 60):
        shares.observe(number, step_s(number))
    return shares


@given(
    counts=st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 40), min_size=1),
    fixed=st.integers(0, 60),
)
def test_every_tenant_gets_what_it_would_have_alone_on_its_share(counts, fixed):
    step_s, shares = law(fixed), dict.fromkeys(counts, 1)
    sizes = step_sizes(counts, shares, step_s)
    took = step_s(sum(sizes.values()))
    for tenant, count in counts.items():
        assert 1 <= sizes[tenant] <= count
        alone = count / (step_s(count) * len(counts))
        assert sizes[tenant] / took >= alone * (1 - 1e-9)


def test_a_step_is_as_long_as_shares_allow_and_no_shorter():
    sizes = step_sizes({"greedy": 32, "modest": 1}, {"greedy": 1, "modest": 1}, law(16))
    # A step of 18 sequences takes twice as long as a step of the modest tenant alone.
    assert sizes == {"greedy": 17, "modest": 1}
    assert step_sizes({"greedy": 32}, {"greedy": 1}, law(16)) == {"greedy": 32}


def test_shares_are_kept_by_weight():
    sizes = step_sizes({"large": 32, "small": 32}, {"large": 3, "small": 1}, law(4))
    assert sizes["large"] == 32
    # A step of 44 sequences takes 4/3 as long as a step of the large tenant alone.
    assert sizes["small"] == 12
    both = step_sizes({"large": 64, "small": 64, "one": 1}, {"large": 3, "small": 1, "one": 1}, law(16))
    assert both["large"] == 3 * both["small"]


def test_alone_all_of_a_tenants_sequences_take_part():
    shares = learned(fixed=1)
    greedy = sequences(shares, "greedy", 32)
    assert set(map(id, shares.choose(greedy))) == set(map(id, greedy))
    assert shares.num_held_back == 0


def test_who_is_left_out_comes_first_in_the_next_step():
    shares = learned(fixed=4)
    greedy, modest = sequences(shares, "greedy", 30), sequences(shares, "modest", 1)
    taken = [shares.choose(greedy + modest) for _ in range(60)]
    assert all(modest[0] in step for step in taken)
    counts = [sum(each in step for step in taken) for each in greedy]
    assert min(counts) > 0 and max(counts) - min(counts) <= 1
    assert shares.num_held_back == sum(31 - len(step) for step in taken) > 0


def test_a_request_that_is_loading_waits_for_a_short_step_and_one_that_left_for_none():
    shares = learned(fixed=4)
    greedy = sequences(shares, "greedy", 32)
    shares.enter(place := Place(tenant="modest"))
    assert len(shares.choose(greedy)) == 6  # a step of 6 sequences takes as long as two steps of one sequence
    shares.leave(place)
    assert len(shares.choose(greedy)) == 32


def test_a_reader_that_sleeps_wants_nothing():
    """The sequences of a sleeping reader cannot run, so the others have the whole worker."""
    shares = learned(fixed=4)
    sequences(shares, "sleeps", 32)
    greedy = sequences(shares, "greedy", 32)
    assert len(shares.choose(greedy)) == 32


def outputs_s(shares, step_s, others, num_outputs=20, chunk_s=0.0):
    """Seconds on a simulated worker's clock of each output of five tokens that a modest tenant asks for in turn.

    chunk_s: seconds of a prefill chunk of the greedy tenant, which always has one waiting; 0: it has none.
    """
    clock, took, computing, owed_s = 0.0, [], {"greedy"} if chunk_s else set(), 0.0
    for _ in range(num_outputs):
        (mine,) = sequences(shares, "modest", 1)
        begun, left = clock, 5
        while left:
            if chunk_s and owed_s <= 0:
                clock += chunk_s
                owed_s = chunk_s
            step = shares.choose([*others, mine], computing)
            owed_s -= shares.repaid_s(step, computing) or 0.0
            clock += step_s(len(step))
            shares.observe(len(step), step_s(len(step)))
            left -= mine in step
        shares.leave(mine.place)
        took.append(clock - begun)
    return took


def test_next_to_long_streams_short_outputs_take_at_most_twice_as_long():
    for fixed in (0, 4, 16, 64):
        step_s = law(fixed)
        alone = outputs_s(learned(fixed), step_s, [])
        shares = learned(fixed)
        next_to = outputs_s(shares, step_s, sequences(shares, "greedy", 64))
        assert max(next_to) <= 2.02 * max(alone), fixed


def test_next_to_a_tenant_with_streams_and_prompts_outputs_take_about_twice_as_long():
    """This holds for the sum of many outputs, because one chunk more or less may fall into each output."""
    for fixed, chunk_s in itertools.product((4, 16, 64), (0.02, 0.2)):
        step_s = law(fixed)
        alone = sum(outputs_s(learned(fixed), step_s, [], 200))
        shares = learned(fixed)
        next_to = sum(outputs_s(shares, step_s, sequences(shares, "greedy", 64), 200, chunk_s))
        assert 1.7 * alone <= next_to <= 2.3 * alone, (fixed, chunk_s)


def test_steps_give_back_some_of_the_time_whatever_they_take():
    """Otherwise chunks would wait for ever if a step's time were proportional to its sequences."""
    shares = learned(fixed=0)
    greedy, modest = sequences(shares, "greedy", 1), sequences(shares, "modest", 1)
    assert shares.repaid_s(greedy + modest, {"greedy"}) > 0.4 * EACH_S
    assert shares.repaid_s(greedy, {"greedy"}) is None
    assert shares.repaid_s(greedy + modest, ()) is None


def test_a_share_of_three_is_worth_three_tenants():
    step_s = law(4)
    shares = learned(4)
    greedy = sequences(shares, "greedy", 64)
    (mine,) = sequences(shares, "modest", 1, share=3)
    step = shares.choose([*greedy, mine])
    # A step takes at most 4/3 as long as a step of its own, instead of twice as long.
    assert step_s(len(step)) <= step_s(1) * 4 / 3 + 1e-9
