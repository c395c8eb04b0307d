"""Converts where a prompt's blocks are, and how fast workers read from there, from and to protobuf."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, pairwise

from antefix.errors import InvalidRequest
from antefix.located import Located, ReadSpeed
from antefix.record import Held
from antefix.v1 import worker_pb2


def hints_to_wire(located: Located | None) -> list[worker_pb2.StoreHint]:
    """The hints of a call about stored blocks. located: None: nothing is known about the blocks, so the call has no
    hints.
    """
    if located is None:
        return []
    return [
        worker_pb2.StoreHint(store=name, spans=chain.from_iterable(held.spans), checkpoints=held.checkpoints)
        for name, held in located.held.items()
    ]


def hints_from_wire(
    hints: Iterable[worker_pb2.StoreHint], hashes: Sequence[bytes], fingerprint: bytes
) -> Located | None:
    """hashes: the prompt's chain.

    Raises:  InvalidRequest: spans of blocks, or checkpoints, are not in ascending order.
    """
    held = {hint.store: _held(hint) for hint in hints}
    return Located(chain=hashes, fingerprint=fingerprint, held=held) if held else None


def speeds_to_wire(speeds: Mapping[str, ReadSpeed]) -> list[worker_pb2.TierSpeed]:
    return [
        worker_pb2.TierSpeed(tier=name, latency_s=speed.latency_s, seconds_per_token=speed.seconds_per_token)
        for name, speed in speeds.items()
    ]


def speeds_from_wire(speeds: Iterable[worker_pb2.TierSpeed]) -> dict[str, ReadSpeed]:
    """The speeds of an answer. Invalid speeds are dropped, because speeds only affect where a request is placed."""
    found = {}
    for each in speeds:
        speed = ReadSpeed(latency_s=each.latency_s, seconds_per_token=each.seconds_per_token)
        if speed.is_sound:
            found[each.tier] = speed
    return found


def _held(hint: worker_pb2.StoreHint) -> Held:
    flat, checkpoints = tuple(hint.spans), tuple(hint.checkpoints)
    if len(flat) % 2 or any(a >= b for a, b in (*pairwise(flat), *pairwise(checkpoints))):
        raise InvalidRequest(
            f"the hint of which blocks store {hint.store!r} has is damaged: its spans do not follow each other"
        )
    return Held(spans=tuple(zip(flat[::2], flat[1::2], strict=True)), checkpoints=checkpoints)
