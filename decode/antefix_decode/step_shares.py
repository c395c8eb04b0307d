"""Chooses the sequences for the next step, so that no tenant's output is slower than its share of the worker allows.

    step_s(n) = fixed + n * each      measured, including what the event loop does for n tokens

A tenant whose sequences all take part in steps of n sequences is as fast as it would be alone on its share of the
worker, as long as

    step_s(n) <= step_s(its own) * all shares / its share

So a step grows until this no longer holds for one of the tenants that want the worker. A tenant with more sequences
than fit lets them take turns. The fixed part is paid once per step, so such a tenant too gets at least the speed of its
share. If only one tenant wants the worker, all of its sequences take part in each step: no time is reserved for others.

A request that is still being loaded counts as one sequence of its tenant, because it waits for a step to end.

Chunks of prompts run between steps. If a tenant has both chunks and steps, half of its time goes into steps. Tenants
that have only steps get back some of the time that other tenants' chunks took: `repaid_s` says how much per step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

from antefix.linear_law import LinearLaw

# Times assumed before anything is measured: antefix-tiny's on two cores; a GPU with a large model has similar ones.
_FIXED_S: Final = 0.02
_EACH_S: Final = 0.001
# Weight of old measurements per step. There are hundreds of steps: after 100 more, a step counts a third.
_MEMORY: Final = 0.99
# The share of a step's log error that the law's level takes over.
_FOLLOW: Final = 0.05


@dataclass(slots=True, eq=False)
class Place:
    """The place of a request, from its admission on. share: its tenant's share. is_loading: its sequence has not joined
    the batch yet.
    """

    tenant: str = ""
    share: int = 1
    is_loading: bool = True


class HasPlace(Protocol):
    """A sequence that has a place. last_step: the number of the last step that it took part in."""

    place: Place
    last_step: int


R = TypeVar("R", bound=HasPlace)


class StepShares:
    """The shares of one worker. num_held_back: sum over steps of sequences that could have run but were left out."""

    def __init__(self) -> None:
        self.num_held_back = 0
        self._places: set[Place] = set()
        self._number = 0
        self._law = LinearLaw((_FIXED_S, _EACH_S), (1.0, 16.0), _MEMORY, _FOLLOW)

    def enter(self, place: Place) -> None:
        self._places.add(place)

    def leave(self, place: Place) -> None:
        self._places.discard(place)

    def choose(self, able: list[R], computing: Collection[str] = ()) -> list[R]:
        """Choose, from the sequences that can run, those that do: per tenant the ones whose last step is longest ago.
        computing: tenants whose prompts' chunks wait for the same thread.
        """
        self._number += 1
        counts = Counter(each.place.tenant for each in able)
        shares = {each.place.tenant: each.place.share for each in able}
        loading = {place.tenant: place.share for place in self._places if place.is_loading}
        if len(shares.keys() | loading.keys()) > 1:
            sizes = step_sizes(counts, shares | loading, self._step_s, computing)
            able = [each for tenant, size in sizes.items() for each in _longest_ago(able, tenant, size)]
            self.num_held_back += counts.total() - len(able)
        for each in able:
            each.last_step = self._number
        return able

    def repaid_s(self, step: list[R], computing: Collection[str]) -> float | None:
        """How much of the time that other tenants' chunks took one step gives back to tenants that have only steps.
        None: no tenant has only steps. That time is `own * others' shares / their shares`, minus the time of other
        tenants' sequences in the step.
        """
        shares = {place.tenant: place.share for place in self._places}
        alone = [each for each in step if each.place.tenant not in computing]
        if not alone or not computing:
            return None
        mine = sum({each.place.tenant: each.place.share for each in alone}.values())
        own_s = self._step_s(len(alone))
        owed_s = own_s * max(0, sum(shares.values()) - mine) / mine
        # At least half, as `step_sizes` assumes: chunks must get a turn even if measured times break the formula.
        return max(owed_s - (self._step_s(len(step)) - own_s), owed_s / 2)

    def observe(self, num_sequences: int, seconds: float) -> None:
        """Record that a step of this many sequences took `seconds`, including its work on the event loop."""
        self._law.observe((1.0, float(num_sequences)), seconds)

    def _step_s(self, num_sequences: int) -> float:
        return self._law.seconds((1.0, float(num_sequences)))


def step_sizes(
    counts: Mapping[str, int],
    shares: Mapping[str, int],
    step_s: Callable[[int], float],
    computing: Collection[str] = (),
) -> dict[str, int]:
    """How many sequences of each tenant take part: at least one, and more by shares, as the rule above allows.

    counts: sequences that can run, by tenant.  shares: of all tenants that want the worker.  step_s: time of a step by
    its number of sequences.  computing: tenants that also have chunks of prompts to compute, in the other half of their
    time.
    """
    total = sum(shares.values())
    sizes = dict.fromkeys(counts, 1)

    def bound_s(tenant: str) -> float:
        others = total / shares[tenant] - 1
        if tenant not in computing and computing:
            others /= 2
        return step_s(max(1, counts.get(tenant, 0))) * (1 + others)

    # Tenants that only wait for a step to end, and tenants with a single sequence, which is in every step.
    bounds = [bound_s(tenant) for tenant in shares if counts.get(tenant, 0) <= 1]
    while open_to := [tenant for tenant in counts if sizes[tenant] < counts[tenant]]:
        if bounds and step_s(sum(sizes.values()) + 1) > min(bounds):
            break
        tenant = min(open_to, key=lambda name: (sizes[name] + 1) / shares[name])
        sizes[tenant] += 1
        if sizes[tenant] == counts[tenant]:
            bounds.append(bound_s(tenant))
    return sizes


def _longest_ago(able: Iterable[R], tenant: str, size: int) -> list[R]:
    of_it = [each for each in able if each.place.tenant == tenant]
    return sorted(of_it, key=lambda each: each.last_step)[:size]
