"""Looking for slow workers costs a placement little, however many workers there are."""

from types import SimpleNamespace

from antefix_router.placement.pace import slow_ones, without_slow


class Counted:
    """A worker whose health checks take `rtt_s`. num_reads: how often somebody asked for that."""

    def __init__(self, rtt_s):
        self.num_reads = 0
        self.probed_at = 0.0
        self.pace = SimpleNamespace(gap_s=0.0)
        self.backlog = SimpleNamespace(tokens_per_s=0.0)
        self._pulse = SimpleNamespace(rtt_s=rtt_s)

    @property
    def pulse(self):
        self.num_reads += 1
        return self._pulse


def test_each_worker_is_compared_with_the_best_alone():
    workers = [Counted(0.1) for _ in range(63)] + [Counted(3.0)]
    assert slow_ones(workers) == [workers[-1]]
    # Twice each: whether there is a measurement, and the measurement.
    assert {worker.num_reads for worker in workers} == {2}


def test_the_only_measured_worker_is_not_slow():
    workers = [Counted(0.0), Counted(3.0)]
    assert slow_ones(workers) == [] and list(without_slow(workers, 1.0)) == workers
