"""Least work wins, and never by the first block alone. Every policy uses only available workers."""

import hashlib

import numpy as np
import pytest

from antefix.errors import InvalidRequest
from antefix_router.placement.policy import LeastWork
from antefix_router.placement.work import Loads, Work, seeds_of
from antefix_router.placement.work import own_work as work_parts
from antefix_simulate.baselines import ALL_POLICIES, make_policy

ADDRESSES = [f"127.0.0.1:{port}" for port in range(7001, 7009)]


def key(text):
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def work(num_tokens=1000, stored=0, prefix="p", head="h"):
    return Work(num_tokens=num_tokens, stored_tokens=stored, affinity=key(prefix), head=key(head))


def loads(addresses=ADDRESSES, **columns):
    zeros = np.zeros(len(addresses))
    return Loads(
        seeds=seeds_of(addresses),
        pending_tokens=np.array(columns.get("pending", zeros), np.float64),
        active_tokens=np.array(columns.get("active", zeros), np.float64),
        num_requests=np.array(columns.get("requests", zeros), np.int64),
        resident_tokens=np.array(columns.get("resident", zeros), np.int64),
        num_served=np.array(columns.get("served", zeros), np.int64),
        shunned=np.array(columns.get("shunned", zeros), np.bool_),
    )


def own_work(work, loads):
    return sum(work_parts(work, loads))


def test_a_prefix_in_memory_beats_one_on_disk_beats_none():
    in_memory = own_work(work(1000, 900), loads(["a"], resident=[900]))[0]
    on_disk = own_work(work(1000, 900), loads(["a"]))[0]
    nowhere = own_work(work(1000, 0), loads(["a"]))[0]
    assert in_memory < on_disk < nowhere == 1000


def test_what_the_store_does_not_have_is_not_promised():
    assert own_work(work(1000, 0), loads(["a"], resident=[900]))[0] == 1000


def test_without_the_stores_word_memory_counts():
    assert own_work(work(1000, None), loads(["a"], resident=[900]))[0] == 100


def test_a_prefix_that_is_being_computed_there_counts_as_there():
    behind = loads(["a", "leader"])
    behind.leading, behind.soon_tokens = 1, 900
    assert own_work(work(1000, 0), behind).tolist() == [1000, 100]
    assert own_work(work(1000, 950), behind).tolist() == [50 + 0.02 * 950] * 2
    assert LeastWork().choose(work(1000, None), behind) == 1


def test_where_a_store_is_shared_the_weight_of_computing_makes_no_difference():
    heavy, light = LeastWork(), LeastWork(compute_weight=0.0)
    rng = np.random.default_rng(0)
    for _ in range(200):
        busy = loads(pending=rng.integers(0, 9000, 8), requests=rng.integers(0, 9, 8), resident=rng.integers(0, 900, 8))
        assert heavy.choose(work(1000, 900), busy) == light.choose(work(1000, 900), busy)


def test_a_copy_is_made_only_where_waiting_costs_more_than_computing_it_many_times():
    def chosen(pending, **weights):
        return LeastWork(**weights).choose(
            work(1000, None), loads(["busy", "free"], pending=pending, resident=[900, 0])
        )

    # 900 more tokens to compute count once for the request itself and eight times for all other requests.
    assert chosen([7_500, 0]) == 0
    assert chosen([9 * 900 + 300, 0]) == 1
    assert chosen([2_200, 0], compute_weight=1.0) == 1


def test_the_weight_of_computing_is_a_setting_of_least_work_alone():
    near = loads(["busy", "free"], pending=[2_200, 0], resident=[900, 0])
    assert make_policy("least_work", compute_weight=1.0).choose(work(1000, None), near) == 1
    assert make_policy("least_work").choose(work(1000, None), near) == 0
    assert make_policy("lmetric", compute_weight=1.0).choose(work(1000, None), near) == 1


def test_window_state_that_has_to_be_rebuilt_makes_a_prefix_in_memory_worth_less():
    replaying = Work(num_tokens=10_000, stored_tokens=None, affinity=1, replay_tokens=4_000)
    # A long prefix saves all its tokens except half of the replay. A prefix as long as the replay saves half of its
    # tokens, and a prefix half as long saves an eighth of the replay.
    assert own_work(replaying, loads(["a", "b", "c", "d"], resident=[9_000, 4_000, 2_000, 0])).tolist() == [
        3_000,
        8_000,
        9_500,
        10_000,
    ]


def test_with_the_stores_word_nothing_is_replayed():
    stored = Work(num_tokens=10_000, stored_tokens=9_000, affinity=1, replay_tokens=4_000)
    assert own_work(stored, loads(["a"], resident=[9_000])).tolist() == [1_000]


def test_a_prefix_too_short_to_save_anything_keeps_no_request_from_an_idle_worker():
    short = Work(num_tokens=10_000, stored_tokens=None, affinity=1, replay_tokens=5_504)
    assert LeastWork().choose(short, loads(["busy", "free"], pending=[1_500, 0], resident=[1_000, 0])) == 1
    long = Work(num_tokens=10_000, stored_tokens=None, affinity=1, replay_tokens=5_504)
    assert LeastWork().choose(long, loads(["busy", "free"], pending=[1_500, 0], resident=[8_000, 0])) == 0


def test_a_prefix_in_memory_is_gone_to_when_the_store_does_not_answer():
    assert LeastWork().choose(work(5000, None), loads(["a", "b", "c"], resident=[0, 4000, 0], served=[0, 9, 0])) == 1


def test_twins_that_nobody_has_seen_meet_whatever_the_order_of_workers():
    first = ADDRESSES[LeastWork().choose(work(prefix="twin"), loads())]
    turned = ADDRESSES[::-1]
    assert turned[LeastWork(9).choose(work(prefix="twin"), loads(turned))] == first


def test_prompts_with_a_common_beginning_spread_over_workers():
    policy = LeastWork()
    assert len({policy.choose(work(prefix=f"system prompt, user {i}"), loads()) for i in range(100)}) == 8


def test_losing_a_worker_moves_only_its_own_prefixes():
    policy, works = LeastWork(), [work(prefix=str(i)) for i in range(200)]
    before = [ADDRESSES[policy.choose(w, loads())] for w in works]
    after = [ADDRESSES[1:][policy.choose(w, loads(ADDRESSES[1:]))] for w in works]
    assert all(b == a for b, a in zip(before, after, strict=True) if b != ADDRESSES[0])


def test_ties_go_by_requests_then_history_then_chance():
    policy = LeastWork()
    assert policy.choose(work(), loads(["a", "b"], pending=[100, 0], requests=[0, 1])) == 0
    assert policy.choose(work(1000, 900), loads(["a", "b"], resident=[512, 512], served=[3, 2])) == 1
    tied = loads(["a", "b"], resident=[512, 512])
    assert {policy.choose(work(1000, 900), tied) for _ in range(50)} == {0, 1}


@pytest.mark.parametrize("name", ALL_POLICIES)
def test_every_policy_leaves_workers_that_failed_alone(name):
    policy = make_policy(name)
    shunned = loads(shunned=[True] * 7 + [False], pending=[0] * 7 + [1e6], requests=[0] * 7 + [99])
    assert {policy.choose(work(prefix=str(i), head=str(i)), shunned) for i in range(30)} == {7}


@pytest.mark.parametrize("name", ALL_POLICIES)
def test_every_policy_uses_all_idle_workers(name):
    policy = make_policy(name)
    chosen = {policy.choose(work(prefix=str(i), head=str(i)), loads()) for i in range(300)}
    assert chosen == set(range(8))


def test_dynamo_weighs_tiers_by_its_credits():
    policy = make_policy("dynamo_linear")
    near = loads(["memory", "disk"], resident=[800, 0], active=[500, 0])
    # memory: 1000 - 800 + 500 + 1000 = 1700; disk: 1000 - 0.25 * 800 + 1000 = 1800.
    assert policy.choose(work(1000, 800), near) == 0
    far = loads(["memory", "disk"], resident=[800, 0], active=[700, 0])
    assert policy.choose(work(1000, 800), far) == 1


def test_lmetric_multiplies_new_tokens_by_batch():
    assert make_policy("lmetric").choose(work(1000), loads(["a", "b"], pending=[0, 900], requests=[1, 0])) == 1
    assert make_policy("lmetric").choose(work(1000), loads(["a", "b"], pending=[0, 1100], requests=[1, 0])) == 0


def test_sglang_follows_the_match_until_it_is_out_of_balance():
    policy = make_policy("sglang_threshold")
    assert policy.choose(work(1000), loads(["a", "b"], resident=[400, 0], requests=[60, 0])) == 0
    assert policy.choose(work(1000), loads(["a", "b"], resident=[400, 0], requests=[70, 0])) == 1
    assert policy.choose(work(1000), loads(["a", "b"], resident=[200, 0], requests=[60, 0])) == 1


def test_rendezvous_goes_by_the_head_alone():
    policy = make_policy("rendezvous")
    same = {policy.choose(work(prefix=str(i), head="h"), loads(pending=[i] * 8)) for i in range(20)}
    assert len(same) == 1


def test_an_unknown_policy_is_refused_by_name():
    with pytest.raises(InvalidRequest, match="least_work"):
        make_policy("best")
