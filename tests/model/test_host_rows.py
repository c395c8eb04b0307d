"""Host memory next to a card's pool: whole payloads move in both directions, and nothing else.

Rows here are on a CPU.
"""

from __future__ import annotations

import numpy as np
import torch

from antefix.model.host_rows import HostIntegers, HostRows


def rows() -> torch.Tensor:
    return torch.arange(8 * 5, dtype=torch.uint8).view(8, 5)


def test_what_is_fetched_is_the_rows_as_they_are_now() -> None:
    card = rows()
    host = HostRows(card)
    ids = [6, 1, 2, 6, 0]
    assert [bytes(payload) for payload in host.fetch(ids)] == [card[i].numpy().tobytes() for i in ids]
    card[2] = 200
    assert bytes(host.fetch([2])[0]) == bytes([200] * 5)


def test_fetched_payloads_stay_while_rows_change() -> None:
    card = rows()
    host = HostRows(card)
    payload = host.fetch([3])[0]
    before = bytes(payload)
    card[3] = 9
    assert bytes(payload) == before


def test_what_landed_is_sent_and_nothing_beside_it() -> None:
    card = rows()
    host = HostRows(card)
    for number, landing in enumerate(host.landing([4, 5, 7])):
        assert len(landing) == 5
        landing[:] = bytes([100 + number] * 5)
    assert torch.equal(card, rows()), "a landing is no row yet"
    host.send([4, 5, 7])
    want = rows()
    want[4], want[5], want[7] = 100, 101, 102
    assert torch.equal(card, want)


def test_no_blocks_are_no_work() -> None:
    host = HostRows(rows())
    assert host.fetch([]) == host.landing([]) == []
    host.send([])


def test_rows_are_lent_without_a_copy() -> None:
    host = HostRows(rows())
    first, again = host.landing([2])[0], host.landing([2])[0]
    first[0] = 77
    assert np.asarray(again)[0] == 77


def test_integers_of_steps_are_sent_in_turn_and_filled_with_zeros():
    target = torch.full((3, 4), 9, dtype=torch.int32)
    inputs = HostIntegers(target)
    for size in ((3, 4), (2, 3), (1, 4), (3, 4)):
        given = np.arange(1, 1 + size[0] * size[1], dtype=np.int32).reshape(size)
        inputs.send(given)
        want = np.zeros((3, 4), np.int32)
        want[: size[0], : size[1]] = given
        assert (target.numpy() == want).all()
