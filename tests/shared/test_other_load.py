"""The processor time that other programs took during a measurement."""

import os

import pytest

from benchmarks.load_outcome import Outcome
from benchmarks.other_load import OtherLoad
from benchmarks.overload import verdicts

TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class Machine:
    """A /proc directory. busy_s: seconds of all cores, by field of /proc/stat; own_s: of the measured processes."""

    def __init__(self, proc):
        self.proc = proc
        self.busy_s = dict.fromkeys(
            ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal", "guest", "guest_nice"), 0.0
        )
        self.own_s = {11: 0.0, 12: 0.0}
        self.write()

    def write(self):
        ticks = [round(seconds * TICKS_PER_S) for seconds in self.busy_s.values()]
        (self.proc / "stat").write_text(f"cpu  {' '.join(map(str, ticks))}\ncpu0 1 2 3\n")
        for pid, seconds in self.own_s.items():
            (self.proc / str(pid)).mkdir(exist_ok=True)
            before = " ".join("0" for _ in range(10))
            used = round(seconds * TICKS_PER_S)
            (self.proc / str(pid) / "stat").write_text(f"{pid} (a (name) x) S {before} {used} 0 0 0 20\n")

    def pids(self):
        return list(self.own_s)


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def test_what_the_measured_processes_did_not_use_was_used_by_others(machine):
    load = OtherLoad(machine.pids, proc=machine.proc)
    machine.busy_s["user"] += 10.0
    machine.own_s = {11: 3.0, 12: 4.0}
    machine.write()
    assert load.lap_s() == pytest.approx(3.0)
    machine.write()
    assert load.lap_s() == 0.0


@pytest.mark.parametrize(("field", "found_s"), [("steal", 2.0), ("nice", 2.0), ("idle", 0.0), ("iowait", 0.0)])
def test_stolen_time_counts_and_idle_time_does_not(machine, field, found_s):
    load = OtherLoad(machine.pids, proc=machine.proc)
    machine.busy_s[field] += 2.0
    machine.write()
    assert load.lap_s() == pytest.approx(found_s)


def test_a_process_that_is_gone_or_new_is_no_error(machine):
    machine.own_s[11] = 5.0
    machine.write()
    load = OtherLoad(machine.pids, proc=machine.proc)
    del machine.own_s[11]
    machine.own_s[13] = 1.0
    machine.busy_s["system"] += 1.5
    machine.write()
    assert load.lap_s() == pytest.approx(0.5)
    machine.own_s[14] = 0.0
    assert load.lap_s() == 0.0


def test_a_disturbed_run_says_so():
    row = Outcome(seconds=10.0, other_cpu_s=5.0).figures()
    part = {"times_2": row, "p99_bound_ms": 5, "after_times_2": row | {"back_after_s": 0.0, "others_cpu": 0.01}}
    part |= {"times_10": row, "after_times_10": part["after_times_2"]}
    part |= {"goodput_of_peak_times_2": 1.0, "goodput_of_peak_times_10": 1.0}
    said = verdicts({"rates": part})
    assert said[0] == "cores that other programs used, the most in any stretch: 0.5 (wanted: 0.1 or less): NOT met"
    assert all(each.endswith(": met") for each in said[1:])
