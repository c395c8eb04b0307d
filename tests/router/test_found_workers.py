"""Workers with DNS names and leases come, go and are replaced. A worker that cannot serve here gets no requests."""

import time
from types import SimpleNamespace

import pytest

from antefix.discovery import DnsName
from antefix.discovery.finders import called_names, check_finders, finders, without_finders
from antefix.errors import ConfigError, FingerprintMismatch, Unavailable
from antefix.events.event_seal import EventKeys
from antefix.security.identity import Role
from antefix_router.placement.directory import Directory
from antefix_router.placement.found_workers import FoundWorkers
from antefix_router.placement.leases import Leases
from antefix_router.placement.policy import make_policy
from antefix_router.placement.workers import WorkerRole, Workers

OURS = b"f" * 32
NAMED = "10.0.0.99:7003"


class Fleet:
    """Two roles with a DNS name each.  there: their addresses.  dead: do not answer.  other: have another model."""

    def __init__(self):
        self.there = {WorkerRole.PREFILL: [], WorkerRole.DECODE: []}
        self.dead, self.other, self.asked = set(), set(), []
        self.fails, self.now = False, 0.0
        self.prefill = Workers(WorkerRole.PREFILL, make_policy("least_work"))
        self.decode = Workers(WorkerRole.DECODE, make_policy("least_work"), [NAMED])
        self.leases = Leases(self.prefill, self.decode, Directory(), fingerprint=OURS)
        names = {role: [self._name(role, 7002 + number)] for number, role in enumerate(self.there)}
        self.found = FoundWorkers(names, self.leases, admit=self._admit, may_call=self._may_call, ask=self._ask)

    def addresses(self, role):
        return sorted(worker.address for worker in (self.prefill if role == "prefill" else self.decode).workers)

    def _name(self, role, port):
        async def resolve(host, port):
            if self.fails:
                raise OSError("the name server is away")
            return self.there[role]

        return DnsName(f"dns:workers.rack:{port}", resolve=resolve, clock=lambda: self.now)

    async def _ask(self, role, address):
        self.asked.append(address)
        if address in self.dead:
            raise Unavailable("it starts")
        return SimpleNamespace(fingerprint=b"o" * 32 if address in self.other else OURS, arithmetic="", setup="")

    def _admit(self, role, address, status):
        self.leases.add_found(role, address, fingerprint=status.fingerprint, arithmetic="", setup="")

    def _may_call(self, address):
        if address.startswith("192."):
            raise ConfigError("on another host, without TLS")


@pytest.fixture
def fleet():
    return Fleet()


async def test_workers_come_and_go_with_their_addresses(fleet):
    fleet.there[WorkerRole.PREFILL] = ["10.0.0.1", "10.0.0.2"]
    fleet.there[WorkerRole.DECODE] = ["10.0.0.1"]
    await fleet.found.look()
    assert fleet.addresses("prefill") == ["10.0.0.1:7002", "10.0.0.2:7002"]
    assert fleet.addresses("decode") == ["10.0.0.1:7003", NAMED]
    # One worker is replaced. A DNS answer may be incomplete, so a missing address stays for half a minute.
    fleet.there[WorkerRole.PREFILL] = ["10.0.0.2", "10.0.0.3"]
    await fleet.found.look()
    assert len(fleet.addresses("prefill")) == 3
    fleet.now = 31.0
    await fleet.found.look()
    assert fleet.addresses("prefill") == ["10.0.0.2:7002", "10.0.0.3:7002"]
    # Workers that the settings name always stay.
    assert NAMED in fleet.addresses("decode")
    # Each worker was asked once.
    assert len(fleet.asked) == len(set(fleet.asked)) == 4


async def test_a_worker_gets_nothing_before_it_answers(fleet):
    fleet.there[WorkerRole.DECODE] = ["10.0.0.1"]
    fleet.dead = {"10.0.0.1:7003"}
    await fleet.found.look()
    assert fleet.addresses("decode") == [NAMED]
    fleet.dead = set()
    await fleet.found.look()
    assert fleet.addresses("decode") == ["10.0.0.1:7003", NAMED]


async def test_a_worker_of_other_weights_is_refused_until_it_is_another(fleet):
    fleet.there[WorkerRole.PREFILL] = ["10.0.0.1", "192.0.2.1"]
    fleet.other = {"10.0.0.1:7002"}
    for _ in range(3):
        await fleet.found.look()
    assert fleet.addresses("prefill") == []
    # Each refusal is counted once. The address that may not be called was never called.
    assert fleet.found.num_refused[WorkerRole.PREFILL] == 2 and "192.0.2.1:7002" not in fleet.asked
    fleet.other = set()
    await fleet.found.look()
    assert fleet.addresses("prefill") == ["10.0.0.1:7002"]


async def test_a_name_server_that_is_away_changes_nothing(fleet):
    fleet.there[WorkerRole.PREFILL] = ["10.0.0.1"]
    await fleet.found.look()
    fleet.fails, fleet.now = True, 100.0
    await fleet.found.look()
    assert fleet.addresses("prefill") == ["10.0.0.1:7002"]
    assert fleet.found.num_failed[WorkerRole.PREFILL] == 1


async def test_one_that_registers_as_well_stays_as_long_as_its_lease(fleet):
    fleet.there[WorkerRole.PREFILL] = ["10.0.0.1"]
    await fleet.found.look()

    def renew(ttl_s):
        fleet.leases.renew("prefill", "10.0.0.1:7002", instance=b"1", fingerprint=OURS, ttl_s=ttl_s, name="p1")

    renew(10.0)
    fleet.there[WorkerRole.PREFILL], fleet.now = [], 31.0
    await fleet.found.look()
    assert fleet.addresses("prefill") == ["10.0.0.1:7002"]
    fleet.leases.expire(time.monotonic() + 11)
    assert fleet.addresses("prefill") == []
    # A worker that leaves but is still in DNS comes back when it answers.
    fleet.there[WorkerRole.PREFILL] = ["10.0.0.1"]
    await fleet.found.look()
    renew(10.0)
    renew(0.0)
    assert fleet.addresses("prefill") == []
    await fleet.found.look()
    assert fleet.addresses("prefill") == ["10.0.0.1:7002"]


async def test_what_is_found_must_be_of_this_routers_model(fleet):
    with pytest.raises(FingerprintMismatch, match="other weights"):
        fleet.leases.add_found(WorkerRole.PREFILL, "10.0.0.1:7002", fingerprint=b"o" * 32, arithmetic="", setup="")


def test_settings_mix_addresses_names_and_leases(tmp_path):
    texts = ("127.0.0.1:1", "dns:workers:7002", "redis://127.0.0.1:6379/0", "127.0.0.1:1")
    config = SimpleNamespace(redis_password_file="", redis_ca_file="")
    keys = EventKeys({1: bytes(32)}, generation=1)
    assert without_finders(texts) == ("127.0.0.1:1",)
    assert set(called_names(texts)) == {"127.0.0.1:1", "workers:7002"}
    assert len(finders(texts, config, role=Role.PREFILL, keys=keys)) == 2
    check_finders(texts, "prefill")
    for wrong in ("dns:workers", "redis://10.1.1.1/0"):
        with pytest.raises(ConfigError):
            check_finders((wrong,), "prefill")


async def test_two_names_of_one_role_may_lead_to_one_host(fleet):
    async def resolve(host, port):
        return ["10.0.0.1"]

    names = [DnsName(f"dns:{name}:{port}", resolve=resolve) for name, port in (("gpu0", 7002), ("gpu1", 7012))]
    found = FoundWorkers({WorkerRole.PREFILL: names}, fleet.leases, admit=fleet._admit, ask=fleet._ask)
    await found.look()
    assert fleet.addresses("prefill") == ["10.0.0.1:7002", "10.0.0.1:7012"]
