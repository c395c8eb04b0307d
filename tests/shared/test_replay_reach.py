"""The bound of exact replays agrees with a trace of dependencies: a replay that starts later would be wrong."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from antefix.layout import BlockLayout, KVFormat, KVGeometry, LayerKind
from antefix.model.replay import needed_from
from antefix.window import Sizes

SIZES = {"head_dim": 16, "rope_dim": 4, "indexer_dim": 8}
geometries = st.builds(
    KVGeometry,
    layers=st.lists(st.sampled_from(list(LayerKind)), min_size=1, max_size=7).map(tuple),
    csa_ratio=st.integers(1, 20),
    hca_ratio=st.integers(1, 20),
    window=st.integers(1, 12),
    **{name: st.just(size) for name, size in SIZES.items()},
)


def is_exact(geometry: KVGeometry, start: int, stop: int) -> bool:
    """Whether a replay of [start, stop) rebuilds all of the state at `stop`, layer by layer, token by token.

    A token's output is right if its input and each window entry that it attends to are right. Entries and overlap rows
    are right if their token's input is. Before `start` nothing is right. Global KV is always right.
    """
    right = np.arange(stop) >= start
    for kind in geometry.layers:
        oldest = {stop - geometry.window}
        if kind is LayerKind.CSA:
            oldest.add(stop - geometry.csa_ratio)
        if not right[min(oldest) : stop].all():
            return False
        right = np.array([right[max(t - geometry.window + 1, 0) : t + 1].all() for t in range(stop)])
    return True


def depended_on(geometry: KVGeometry, layer: int, stop: int) -> int:
    """The first token whose input at `layer` affects the state at `stop`, found by going down from the state."""
    needed: set[int] = set()
    for index in range(geometry.num_layers - 1, layer - 1, -1):
        # The outputs that the layers above need, and all tokens that these attend to.
        needed = {seen for token in needed for seen in range(token - geometry.window + 1, token + 1)}
        needed |= set(range(stop - geometry.window, stop))
        if geometry.layers[index] is LayerKind.CSA:
            needed |= set(range(stop - geometry.csa_ratio, stop))
    return min(needed)


@given(geometry=geometries)
def test_the_bound_is_what_the_trace_finds_enough_and_not_a_token_more(geometry: KVGeometry) -> None:
    reach = geometry.replay_reach[0]
    stop = reach + 3
    assert is_exact(geometry, stop - reach, stop)
    assert not is_exact(geometry, stop - reach + 1, stop)


@given(geometry=geometries)
def test_each_layers_bound_is_what_the_trace_finds(geometry: KVGeometry) -> None:
    stop = 1000
    for layer in range(geometry.num_layers):
        assert needed_from(geometry, layer, stop) == depended_on(geometry, layer, stop)
    assert needed_from(geometry, geometry.num_layers, stop) == stop


@given(geometry=geometries)
def test_model_and_planner_go_by_the_same_bound(geometry: KVGeometry) -> None:
    sizes = Sizes.of(BlockLayout(geometry=geometry, kv_format=KVFormat.FLOAT32))
    blocks, rest = divmod(sizes.replay_tokens, geometry.block_size)
    assert rest == 0
    assert sizes.replay_tokens == geometry.replay_tokens
    assert (blocks - 1) * geometry.block_size < geometry.replay_reach[0] <= sizes.replay_tokens
    # In each layer, a replay runs only the outputs that the layers above need.
    stop = 10_000
    rows = [stop - needed_from(geometry, layer + 1, stop) for layer in range(geometry.num_layers)]
    assert sizes.exact_replay_work_tokens == -(-sum(rows) // geometry.num_layers)
