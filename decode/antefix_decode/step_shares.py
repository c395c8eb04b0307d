"""Which sequences take part in the next step, so that no tenant's output is slowed down beyond its share of the worker.

    step_s(n) = fixed + n * each      as measured, with what the event loop does for n tokens

A tenant whose sequences all take part gets, in steps of n, what it would get alone on its share of the worker while

    step_s(n) <= step_s(its own) * all shares / its share

So a step grows until that ends for one of the tenants that want the worker, and one with more sequences takes turns
among them. Since the fixed part is paid once per step, such a tenant too gets no less than on its share alone. While
only one tenant wants the worker, all of its sequences take part in each step: no time is kept for who does not ask.

A request that is still being loaded counts as one sequence of its tenant: what it waits for is the end of a step.

Chunks of prompts run between steps. Where a tenant has both, half of the time that is its own goes into steps, and
`repaid_s` says how much of the time that its chunks took a step gives back to those who have steps alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

from antefix.linear_law import LinearLaw

# Seconds before anything is measured: antefix-tiny's on two cores, of the order of a card's with a large model.
_FIXED_S: Final = 0.02
_EACH_S: Final = 0.001
# Steps come by the hundred: one counts a third after a hundred more.
_MEMORY: Final = 0.99


@dataclass(slots=True, eq=False)
class Place:
    """A request's, from its admission on. share: its tenant's.  is_loading: its sequence has not joined yet."""

    tenant: str = ""
    share: int = 1
    is_loading: bool = True


class HasPlace(Protocol):
    """A sequence. last_step: the number of the last step that it took part in."""

    place: Place
    last_step: int


R = TypeVar("R", bound=HasPlace)


class StepShares:
    """One worker's. num_held_back: sequences that could have run in a step and were not taken into it, summed up."""

    def __init__(self) -> None:
        self.num_held_back = 0
        self._places: set[Place] = set()
        self._number = 0
        self._law = LinearLaw((_FIXED_S, _EACH_S), (1.0, 16.0), _MEMORY)

    def enter(self, place: Place) -> None:
        self._places.add(place)

    def leave(self, place: Place) -> None:
        self._places.discard(place)

    def choose(self, able: list[R], computing: Collection[str] = ()) -> list[R]:
        """Of the sequences that can run, those that do: the ones whose last step is longest ago, per tenant.
        computing: tenants whose chunks of prompts wait for the same thread."""
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
        """What a step gives back to those who have steps alone of the time that others' chunks took; None: there is
        nobody. It is `own * others' shares / their shares`, less the time that others' sequences have in the step.
        """
        shares = {place.tenant: place.share for place in self._places}
        alone = [each for each in step if each.place.tenant not in computing]
        if not alone or not computing:
            return None
        mine = sum({each.place.tenant: each.place.share for each in alone}.values())
        own_s = self._step_s(len(alone))
        owed_s = own_s * max(0, sum(shares.values()) - mine) / mine
        # Half at least, as `step_sizes` lets it: where a law is not kept to, chunks must have their turn all the same.
        return max(owed_s - (self._step_s(len(step)) - own_s), owed_s / 2)

    def observe(self, num_sequences: int, seconds: float) -> None:
        """A step of so many took so long, with what followed of it on the event loop."""
        self._law.observe((1.0, float(num_sequences)), seconds)

    def _step_s(self, num_sequences: int) -> float:
        return self._law.seconds((1.0, float(num_sequences)))


def step_sizes(
    counts: Mapping[str, int],
    shares: Mapping[str, int],
    step_s: Callable[[int], float],
    computing: Collection[str] = (),
) -> dict[str, int]:
    """How many sequences of each tenant take part: one at least, and the others by shares as the rule above lets.

    counts: that can run, by tenant.  shares: of all tenants that want the worker.  step_s: of so many sequences.
    computing: tenants that have chunks of prompts to compute as well, in the other half of what others leave them.
    """
    total = sum(shares.values())
    sizes = dict.fromkeys(counts, 1)

    def bound_s(tenant: str) -> float:
        others = total / shares[tenant] - 1
        if tenant not in computing and computing:
            others /= 2
        return step_s(max(1, counts.get(tenant, 0))) * (1 + others)

    # Those that wait for a step to end, and those all of whose sequences are in it already.
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
