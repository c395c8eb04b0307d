"""Workers join and leave by lease, and the router knows which workers drain or restart."""

import time

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from antefix.errors import ConfigError, FingerprintMismatch, InvalidRequest, Unauthenticated
from antefix.registration import Registration
from antefix.secret import Keyring
from antefix_router.health import HealthWatch
from antefix_router.placement.directory import Directory
from antefix_router.placement.leases import Leases
from antefix_router.placement.policy import make_policy
from antefix_router.placement.workers import WorkerRole, Workers
from tests.waiting import until

FINGERPRINT = b"f" * 32
ADDRESS = "127.0.0.1:7001"


@pytest.fixture
def fleet():
    roles = (WorkerRole.PREFILL, WorkerRole.DECODE)
    prefill, decode = (Workers(role, make_policy("least_work"), ["127.0.0.1:9"]) for role in roles)
    directory = Directory()
    return Leases(prefill, decode, directory, fingerprint=FINGERPRINT), prefill, decode, directory


def renew(leases, address=ADDRESS, role="prefill", instance=b"1", ttl_s=10.0, fingerprint=FINGERPRINT):
    leases.renew(role, address, instance=instance, fingerprint=fingerprint, ttl_s=ttl_s)


def addresses(workers):
    return [worker.address for worker in workers.workers]


def test_a_lease_makes_a_worker_known_until_it_runs_out(fleet):
    leases, prefill, decode, _ = fleet
    renew(leases)
    renew(leases, role="decode", address="127.0.0.1:7002")
    assert addresses(prefill) == ["127.0.0.1:9", ADDRESS] and addresses(decode)[1:] == ["127.0.0.1:7002"]
    leases.expire(time.monotonic() + 9)
    assert len(prefill.workers) == 2
    leases.expire(time.monotonic() + 11)
    assert addresses(prefill) == addresses(decode) == ["127.0.0.1:9"]


def test_a_worker_that_leaves_is_gone_at_once_and_one_of_the_settings_stays(fleet):
    leases, prefill, _, _ = fleet
    renew(leases)
    renew(leases, ttl_s=0)
    renew(leases, ttl_s=0, address="127.0.0.1:9")
    assert addresses(prefill) == ["127.0.0.1:9"]


def test_a_worker_that_stops_renewing_is_named_until_it_is_back_or_says_goodbye(fleet):
    leases, *_ = fleet
    other, third = "127.0.0.1:7003", "127.0.0.1:7004"
    for address in (ADDRESS, other, third):
        renew(leases, address=address)
    renew(leases, address=third, ttl_s=0)
    now = time.monotonic() + 11
    leases.expire(now)
    assert leases.lost(now + 5) == [(WorkerRole.PREFILL, ADDRESS, 5), (WorkerRole.PREFILL, other, 5)]
    renew(leases)
    renew(leases, address=other, ttl_s=0)
    assert leases.lost(now + 5) == []


def test_lost_workers_are_forgotten_in_time_and_in_number(fleet):
    leases, *_ = fleet
    now = time.monotonic()
    for port in range(300):
        renew(leases, address=f"127.0.0.1:{8000 + port}")
    leases.expire(now + 20)
    named = [address for _, address, _ in leases.lost(now + 20)]
    assert len(named) == 256 and named[-1] == "127.0.0.1:8299"
    assert leases.lost(now + 20 + 3601) == []


def test_renewing_keeps_load_and_memory_and_a_new_process_starts_empty(fleet):
    leases, prefill, _, directory = fleet
    renew(leases)
    worker = prefill.find(ADDRESS)
    directory.placed(ADDRESS, [1, 2])
    with prefill.load(worker, 100):
        renew(leases)
        assert prefill.find(ADDRESS) is worker and worker.num_tokens == 100
    assert directory.leading([ADDRESS], [1, 2]).tolist() == [2]
    renew(leases, instance=b"2")
    assert directory.leading([ADDRESS], [1, 2]).tolist() == [0]


def test_load_of_a_worker_that_left_is_given_back_without_harm(fleet):
    leases, prefill, _, _ = fleet
    renew(leases)
    worker = prefill.find(ADDRESS)
    with prefill.load(worker, 100):
        renew(leases, ttl_s=0)
        renew(leases)
    assert worker.num_requests == 0 and prefill.find(ADDRESS).num_requests == 0


def test_who_cannot_serve_here_gets_no_lease(fleet):
    leases, prefill, _, _ = fleet
    for kind, changes in (
        (FingerprintMismatch, {"fingerprint": b"x" * 32}),
        (InvalidRequest, {"role": "router"}),
        (InvalidRequest, {"ttl_s": 0.01}),
        (InvalidRequest, {"ttl_s": 1e9}),
        (ConfigError, {"address": "nowhere"}),
    ):
        with pytest.raises(kind):
            renew(leases, **changes)
    assert addresses(prefill) == ["127.0.0.1:9"]


KEYRING = Keyring(b"s" * 32)


def registration(**changes):
    said = {"role": "prefill", "address": ADDRESS, "fingerprint": FINGERPRINT, "instance": b"1", "ttl_s": 6.0}
    return Registration(**{**said, "said_at_ms": round(time.time() * 1000), **changes})


def test_only_who_has_the_secret_may_register_and_only_with_what_was_said():
    said = registration()
    said.check(KEYRING, said.proof(KEYRING))
    for proof in (b"", said.proof(Keyring(b"x" * 32)), KEYRING.key(""), said.proof(KEYRING)[:-1]):
        with pytest.raises(Unauthenticated):
            said.check(KEYRING, proof)
    for changes in ({"address": "127.0.0.1:6666"}, {"role": "decode"}, {"ttl_s": 0.0}, {"instance": b"2"}):
        with pytest.raises(Unauthenticated):
            registration(said_at_ms=said.said_at_ms, **changes).check(KEYRING, said.proof(KEYRING))
    for seconds in (-600, 600):
        old = registration(said_at_ms=said.said_at_ms + 1000 * seconds)
        with pytest.raises(Unauthenticated, match="old"):
            old.check(KEYRING, old.proof(KEYRING))


async def test_a_worker_that_drains_is_known_to_and_one_that_died_has_forgotten():
    server, health = grpc.aio.server(), HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    address = f"127.0.0.1:{port}"
    workers, directory = Workers(WorkerRole.PREFILL, make_policy("least_work"), [address]), Directory()
    watch, worker = HealthWatch(directory), workers.workers[0]
    watch.follow((workers,))
    try:
        for status, draining in (("NOT_SERVING", True), ("SERVING", False), ("NOT_SERVING", True)):
            await health.set("", health_pb2.HealthCheckResponse.ServingStatus.Value(status))
            await until(lambda draining=draining: worker.draining is draining)
        directory.placed(address, [1, 2])
        await server.stop(0)
        await until(lambda: directory.leading([address], [1, 2]).tolist() == [0])
    finally:
        await watch.close()
        await server.stop(0)


def test_a_worker_with_blocks_of_another_size_is_told_both_sizes():
    roles = (WorkerRole.PREFILL, WorkerRole.DECODE)
    prefill, decode = (Workers(role, make_policy("least_work")) for role in roles)
    leases = Leases(prefill, decode, Directory(), fingerprint=FINGERPRINT, block_size=64)
    with pytest.raises(FingerprintMismatch, match=r"blocks of 128 tokens, this router's model of 64: .*--model"):
        leases.renew("decode", ADDRESS, instance=b"1", fingerprint=b"o" * 32, ttl_s=10.0, block_size=128)
    leases.renew("decode", ADDRESS, instance=b"1", fingerprint=FINGERPRINT, ttl_s=10.0, block_size=64)
    leases.renew("prefill", "127.0.0.1:7002", instance=b"1", fingerprint=FINGERPRINT, ttl_s=10.0)
    assert addresses(decode) == [ADDRESS] and not [w for w in prefill.workers if w.address == ADDRESS]
