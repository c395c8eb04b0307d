"""Fleets: every request ends once, load is even, and a worker's death loses only its memory."""

import argparse
import json
from dataclasses import replace

import numpy as np
import pytest

from antefix.errors import InvalidRequest
from antefix.window import parse
from antefix_console.commands.simulate import add_parser, run
from antefix_console.commands.simulate_cluster import copies
from antefix_simulate.baselines import ALL_POLICIES
from antefix_simulate.cluster import EngineHits, Fleet, _Run, simulate_cluster
from antefix_simulate.cluster_result import RECOVERY_S
from antefix_simulate.cluster_worker import Job, Memory
from antefix_simulate.generated_traces import generate
from antefix_simulate.machine import Machine, model_sizes
from antefix_simulate.simulated_objects import ObjectPrices
from antefix_simulate.simulated_store import StoreLimits
from antefix_simulate.trace import Trace, TraceRequest

pytestmark = pytest.mark.slow

SIZES = model_sizes("v4-flash")
STRATEGY = parse("auto")


def fleet(**changes):
    return Fleet(**{"num_prefill": 4, "num_decode": 2, "machine": Machine(jitter=0), **changes})


def simulate(trace, policy="least_work", speedup=1.0, num_copies=1, **changes):
    return simulate_cluster(
        copies(trace, num_copies, speedup),
        total=len(trace.requests) * num_copies,
        unit_tokens=trace.unit_tokens,
        policy=policy,
        strategy=STRATEGY,
        sizes=SIZES,
        fleet=fleet(**changes),
    )


@pytest.fixture(scope="module")
def chat():
    return generate("chat", num_requests=400, unit_tokens=512, seed=3)


def started(trace, **changes):
    one = _Run(trace.unit_tokens, "least_work", STRATEGY, SIZES, fleet(**changes))
    for request in trace.requests:
        one.until(request.at_s)
        one.arrive(Job(request=request, arrived_s=request.at_s, names=request.names.tolist()))
    return one


def twins(count, num_tokens=20_480, gap_s=0.01):
    names = np.arange(num_tokens // 512)
    requests = tuple(
        TraceRequest(at_s=i * gap_s, num_tokens=num_tokens + 1, output_tokens=5, names=names) for i in range(count)
    )
    return Trace(name="twins", unit_tokens=512, requests=requests)


@pytest.mark.parametrize("policy", ALL_POLICIES)
@pytest.mark.parametrize("shared_store", [True, False])
def test_every_request_ends_once_and_load_returns_to_zero(chat, policy, shared_store):
    one = _Run(512, policy, STRATEGY, SIZES, fleet(shared_store=shared_store, kills=((30.0, 60.0), (45.0, 0.0))))
    for request, _ in copies(chat, 1, 4.0):
        one.until(request.at_s)
        one.arrive(Job(request=request, arrived_s=request.at_s, names=request.names.tolist()))
    one.until(float("inf"))
    assert len(one.outcomes.finished_s) == len(chat.requests)
    assert min(one.outcomes.ttft_s) > 0
    assert not one.loads.num_requests.any() and not one.loads.active_tokens.any() and not one.total.any()
    assert not one.decode.num_requests.any() and len(one.in_flight) == 0


def test_runs_are_the_same_twice(chat):
    assert simulate(chat, speedup=4) == simulate(chat, speedup=4)


@pytest.mark.slow
def test_with_a_store_the_hit_rate_does_not_depend_on_the_policy(chat):
    rates = [simulate(chat, policy).token_hit_rate for policy in ALL_POLICIES]
    assert max(rates) - min(rates) < 0.01 and min(rates) > 0.3


def test_without_a_store_round_robin_hits_less_than_going_to_who_has_it(chat):
    ours = simulate(chat, shared_store=False, speedup=4).token_hit_rate
    assert ours > simulate(chat, "round_robin", shared_store=False, speedup=4).token_hit_rate + 0.05


def test_twins_are_computed_once():
    together = simulate(twins(4))
    apart = simulate(twins(4), coalesce=False)
    assert together.coalesced_share == 0.75 and apart.coalesced_share == 0
    assert together.token_hit_rate > 0.7 > 0.1 > apart.token_hit_rate


def test_followers_outlive_their_leaders_worker():
    one = started(twins(4), kills=((0.5, 0.0),), num_prefill=2)
    leader = next(row for row, worker in enumerate(one.workers) if worker.running)
    if leader != 0:
        one._kill(leader)
    one.until(float("inf"))
    assert len(one.outcomes.finished_s) == 4 and one.outcomes.num_moved >= 1


@pytest.mark.slow
def test_a_killed_worker_costs_its_memory_only_where_there_is_no_store(chat):
    kills = ((100.0, 0.0),)
    before = simulate(chat)
    with_store, without = simulate(chat, kills=kills), simulate(chat, shared_store=False, kills=kills)
    assert abs(with_store.token_hit_rate - before.token_hit_rate) < 0.01
    assert without.token_hit_rate < simulate(chat, shared_store=False).token_hit_rate
    assert with_store.after_hit_rate is not None and with_store.before_ttft_p90_s is not None


@pytest.mark.slow
def test_the_minutes_in_which_nobody_died_can_be_looked_at_as_well(chat):
    assert simulate(chat).after_hit_rate is None
    looked_at, killed = simulate(chat, look_s=100.0), simulate(chat, kills=((100.0, 0.0),))
    # Until that time the runs are equal.
    assert looked_at.before_ttft_p90_s == killed.before_ttft_p90_s is not None
    assert looked_at.after_hit_rate is not None
    assert looked_at.after_ttft_p90_s != killed.after_ttft_p90_s


@pytest.mark.slow
def test_a_minute_after_one_of_eight_workers_died_hits_and_waits_are_what_they_were():
    """Compares with the same minutes of a run without a death, because a trace's load changes over time."""
    trace = generate("chat", num_requests=6000, unit_tokens=512, seed=4)
    killed_s, speedup, windows = 60.0, 8.0, []
    start_s = killed_s + RECOVERY_S
    end_s = start_s + 60
    for kills in ((), ((killed_s, 0.0),)):
        one = _Run(512, "least_work", STRATEGY, SIZES, fleet(num_prefill=8, num_decode=8, kills=kills))
        # Requests that arrive after the window only delay its last ones a little.
        for request in [each for each, _ in copies(trace, 1, speedup) if each.at_s < end_s + 10]:
            one.until(request.at_s)
            one.arrive(Job(request=request, arrived_s=request.at_s, names=request.names.tolist()))
        one.until(float("inf"))
        windows.append(one.outcomes.window(start_s, end_s))
    (hit, p90_s), (hit_after, p90_after_s) = windows
    assert hit > 0.4
    assert abs(hit_after - hit) < 0.01 * hit
    assert p90_after_s < 1.2 * p90_s


def test_a_worker_that_joins_takes_work():
    trace = generate("documents", num_requests=200, unit_tokens=512, seed=1)
    one = started(trace, num_prefill=1, joins=(5.0,))
    one.until(float("inf"))
    assert one.workers[1].busy_s > 0 and one.loads.num_served.sum() == 200


def test_more_workers_wait_less(chat):
    few, many = simulate(chat, speedup=8, num_prefill=1), simulate(chat, speedup=8, num_prefill=8)
    assert many.ttft_p90_s < few.ttft_p90_s


@pytest.mark.slow
def test_copies_share_nothing_and_keep_the_order_of_time(chat):
    pairs = list(copies(chat, 3, 2.0))
    assert len(pairs) == 1200 and len({offset for _, offset in pairs}) == 3
    times = [request.at_s for request, _ in pairs]
    assert times == sorted(times)
    assert simulate(chat, num_copies=3).token_hit_rate == pytest.approx(simulate(chat).token_hit_rate, abs=0.02)


def test_memory_is_bounded_and_loses_ends_first():
    memory = Memory(10)
    assert memory.use(list(range(8)), [8]) == []
    assert memory.last_checkpoint(list(range(8)), 8) == 8
    gone = memory.use([100 + i for i in range(6)], [])
    assert sorted(gone) == [4, 5, 6, 7] and memory.num_leading(list(range(8))) == 4
    assert memory.last_checkpoint(list(range(8)), 4) == 0


def _cli(*argv):
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    return run(parser.parse_args(["simulate", "--generate", "chat", "--requests", "60", *argv]))


def test_json_has_every_policy_with_every_figure(capsys):
    assert _cli("--workers", "3:2", "--policy", "all", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert list(shown["policies"]) == list(ALL_POLICIES) and shown["num_prefill"] == 3
    wanted = "token_hit_rate fetched_share ttft_p50_s ttft_p90_s ttft_p99_s load_max_over_mean goodput"
    assert all(set(wanted.split()) <= set(figures) for figures in shown["policies"].values())


@pytest.mark.slow
@pytest.mark.usefixtures("plots")
def test_the_table_and_the_plot_show_the_same_policies(capsys, tmp_path):
    target = tmp_path / "fleet.svg"
    assert _cli("--workers", "2:1", "--policy", "lmetric", "--policy", "least_work", "--plot", str(target)) == 0
    text = capsys.readouterr().out
    assert "lmetric" in text and "least_work" in text and "round_robin" not in text
    assert target.stat().st_size > 1000


@pytest.mark.parametrize(
    "argv",
    [
        ("--workers", "8"),
        ("--workers", "0:1"),
        ("--workers", "1001:1"),
        ("--workers", "1:1", "--policy", "best"),
        ("--workers", "1:1", "--kill", "soon"),
        ("--workers", "2:1", "--kill", "9:3"),
        ("--workers", "1:1", "--kill", "5"),
        ("--workers", "1:1", "--unit-tokens", "100"),
        ("--workers", "1:1", "--speedup", "0"),
        ("--workers", "1:1", "--strategy", "full", "--strategy", "zero"),
    ],
)
def test_calls_that_make_no_sense_are_refused(argv):
    with pytest.raises(InvalidRequest):
        _cli(*argv)


def test_engines_hit_no_more_than_their_own_memory_has(chat):
    small = {"speedup": 4, "memory_bytes": 2 * 10**8}
    ours = simulate(chat, **small)
    full = simulate(chat, **small, shared_store=False, engines=EngineHits.FULL)
    window = simulate(chat, **small, shared_store=False, engines=EngineHits.WINDOW)
    assert ours.token_hit_rate > full.token_hit_rate > window.token_hit_rate > 0
    assert full.fetched_share == 0


def test_an_engine_hits_to_the_block_what_it_has_in_memory():
    trace = twins(3, gap_s=100.0)
    found = simulate(trace, num_prefill=1, shared_store=False, engines=EngineHits.FULL, coalesce=False)
    assert found.token_hit_rate == pytest.approx(2 * 20_480 / (3 * 20_481))
    # The last token is computed, and its block with it.
    requests = [replace(request, num_tokens=20_480) for request in trace.requests]
    found = simulate(
        replace(trace, requests=tuple(requests)), num_prefill=1, shared_store=False, engines=EngineHits.FULL
    )
    assert found.token_hit_rate == pytest.approx(2 * (20_480 - 512) / (3 * 20_480))


def test_an_engine_that_died_has_nothing_left():
    trace = twins(4, gap_s=100.0)
    kept = simulate(trace, num_prefill=2, shared_store=False, engines=EngineHits.FULL)
    lost = simulate(
        trace, num_prefill=2, shared_store=False, engines=EngineHits.FULL, kills=((150.0, 160.0), (150.0, 160.0))
    )
    assert kept.token_hit_rate > lost.token_hit_rate


@pytest.mark.parametrize("policy", ALL_POLICIES)
def test_every_request_to_engines_ends_once(chat, policy):
    found = simulate(chat, policy, speedup=4, shared_store=False, engines=EngineHits.FULL, kills=((10.0, 60.0),))
    assert found.goodput > 0


def test_the_command_takes_engines(capsys):
    _cli("--workers", "4", "--engines", "full", "--policy", "least_work")
    out = capsys.readouterr().out
    assert "4 workers of other engines" in out


@pytest.mark.parametrize(
    "arguments", [["--workers", "4:2"], ["--workers", "0"], ["--workers", "4", "--store-bytes", "1G"]]
)
def test_engines_with_what_they_have_not_are_refused(arguments):
    with pytest.raises(InvalidRequest):
        _cli("--engines", "full", "--policy", "least_work", *arguments)


def one_result(trace, **changes):
    return simulate(trace, **changes)


def test_several_stores_that_hold_all_hit_as_much_as_one(chat):
    one = one_result(chat, memory_bytes=0)
    many = one_result(chat, memory_bytes=0, num_stores=4, num_prefill=4)
    assert many.token_hit_rate == pytest.approx(one.token_hit_rate, abs=0.01)
    assert many.bytes_by_tier["peer"] > 0
    assert many.bytes_by_tier["disk"] + many.bytes_by_tier["peer"] == pytest.approx(one.bytes_by_tier["disk"], rel=0.05)


def test_copies_turn_other_hosts_bytes_into_own_ones_within_their_budget(chat):
    without = one_result(chat, memory_bytes=0, num_stores=4)
    with_copies = one_result(chat, memory_bytes=0, num_stores=4, copies_bytes=10**9)
    assert without.bytes_by_tier["copied"] == 0
    assert 0 < with_copies.bytes_by_tier["copied"] <= 4 * 10**9
    assert with_copies.bytes_by_tier["peer"] < without.bytes_by_tier["peer"]


def test_an_object_tier_gives_back_what_small_stores_lose(chat):
    small = StoreLimits(store_bytes=40 * 10**6)
    without = one_result(chat, memory_bytes=0, num_stores=2, store=small)
    behind = one_result(chat, memory_bytes=0, num_stores=2, store=small, object_bytes=10**12)
    assert without.bytes_by_tier["object"] == without.bytes_by_tier["uploaded"] == 0
    assert behind.bytes_by_tier["object"] > 0
    assert behind.bytes_by_tier["uploaded"] > 0
    assert behind.token_hit_rate > without.token_hit_rate + 0.01


def test_one_store_may_have_an_object_tier_and_a_slow_one_is_left_alone(chat):
    small = StoreLimits(store_bytes=40 * 10**6)
    fast = one_result(chat, memory_bytes=0, store=small, object_bytes=10**12)
    slow = one_result(chat, memory_bytes=0, store=small, object_bytes=10**12, machine=Machine(object_bytes_per_s=1e6))
    assert fast.bytes_by_tier["object"] > 10 * slow.bytes_by_tier["object"]


def test_dollars_are_those_of_the_tokens_that_hit_and_missed(chat):
    result = one_result(chat, num_stores=2)
    tokens = chat.num_tokens
    hit = result.token_hit_rate * tokens
    assert result.dollars == pytest.approx((hit * 0.003 + (tokens - hit) * 0.15) / 1e6)


def test_requests_go_where_their_blocks_are_loaded_fastest(chat):
    """Over slow links, less than half as much is loaded from other hosts as with equally fast stores."""
    changes = {"memory_bytes": 0, "num_stores": 4, "num_prefill": 4}
    alike = Machine(jitter=0, peer_bytes_per_s=6e9, peer_fixed_s=0.001)
    slow = Machine(jitter=0, peer_bytes_per_s=0.1e9, peer_fixed_s=0.001)
    from_others = []
    for machine in (alike, slow):
        loaded = one_result(chat, machine=machine, **changes).bytes_by_tier
        from_others.append(loaded["peer"] / (loaded["disk"] + loaded["peer"]))
    assert 0 < from_others[1] < from_others[0] / 2


def test_the_object_store_s_bill_follows_from_requests_bytes_and_time(chat):
    small = StoreLimits(store_bytes=40 * 10**6)
    prices = ObjectPrices(put=5.0, get=7.0, month=11.0, read=13.0)
    run = {"memory_bytes": 0, "num_stores": 2, "store": small, "object_bytes": 10**12}
    result = one_result(chat, object_prices=prices, **run)
    bill = result.object_bill
    assert bill.num_puts == -(-result.bytes_by_tier["uploaded"] // (32 << 20))
    assert bill.gb_read == pytest.approx(result.bytes_by_tier["object"] / 1e9)
    assert bill.num_gets >= result.bytes_by_tier["object"] / (4 << 20) > 0
    # Four prefill workers, two decode workers, two stores and a router each list the bucket twice per minute.
    assert bill.num_lists == pytest.approx(9 * chat.requests[-1].at_s / 30, rel=0.2)
    # The bucket starts empty. The bill has a part of the final bytes times the whole time.
    ends_with = result.bytes_by_tier["uploaded"] / 1e9 * chat.requests[-1].at_s / (30 * 86_400)
    assert 0.1 * ends_with < bill.gb_months < 1.1 * ends_with
    assert bill.request_dollars == pytest.approx((bill.num_puts + bill.num_lists) * 0.005 + bill.num_gets * 0.007)
    assert bill.storage_dollars == pytest.approx(bill.gb_months * 11)
    assert bill.dollars == pytest.approx(bill.request_dollars + bill.storage_dollars + bill.gb_read * 13)
    nothing = one_result(chat, memory_bytes=0, num_stores=2).object_bill
    assert (nothing.dollars, nothing.num_lists) == (0.0, 0)


@pytest.mark.parametrize("text", ["put", "put=x", "put=-1", "get=nan", "month=inf", "weight=1"])
def test_invalid_prices_of_an_object_store_are_refused(text):
    with pytest.raises(InvalidRequest):
        ObjectPrices.parse(text)


def test_prices_of_an_object_store_are_named():
    assert ObjectPrices.parse("get=0.001,month=0") == ObjectPrices(get=0.001, month=0.0)
