"""Chooses the next tokens of a whole batch on the device that holds the logits: only token ids are copied back.

The chooser takes the same steps, in the same order and arithmetic, as `token_choice.Sampler` takes for one sequence on
the host:

    grammar -> penalties -> greedy, or temperature -> min_p -> top_k -> top_p -> draw; and log probabilities

The host sends each request's settings and its random number (`Wish`). Greedy tokens equal the host's. A drawn token
equals the host's unless its random number lies within rounding (1e-12) of a border between two tokens: the device adds
probabilities in another order.

Shapes:  S = sequences, V = vocabulary, n = sequences that draw, or that want log probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from antefix.model.host_rows import upload
from antefix.model.numerics import has_kernels
from antefix.sampling import Sampling
from antefix.wire import TokenLogprob


@dataclass(frozen=True, slots=True, kw_only=True)
class Edits:
    """Changes to one sequence's logits, in this order (`penalties.Penalties`). Token ids may lie beyond V.

    forbidden: ids that get no probability, unless no other id is left.  biased, bias: ids, and the bias added to each.
    repeated: ids that `repetition` makes less likely.  counted, counts: ids that have appeared, and how often;
    `frequency` times the count, and `presence`, are subtracted.
    """

    forbidden: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    biased: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    bias: npt.NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    repeated: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    repetition: float = 1.0
    counted: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    counts: npt.NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    frequency: float = 0.0
    presence: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """How one sequence's token is chosen.

    allowed: the tokens that a grammar allows, as bits [V / 32] int32, lowest first.  uniform: the random number, in
    [0, 1).  num_top: log probabilities are wanted for this many of the likeliest tokens, and for the chosen one; None:
    no log probabilities.
    """

    sampling: Sampling
    edits: Edits | None = None
    allowed: npt.NDArray[np.int32] | None = None
    uniform: float = 0.0
    num_top: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """are_numbers: whether all logits were finite; if they were not, the token means nothing."""

    token: int
    are_numbers: bool
    logprob: TokenLogprob | None = None


@torch.inference_mode()
def choose_tokens(logits: Tensor, wishes: Sequence[Wish]) -> list[Choice]:
    """Choose a token per sequence. logits: [S, V], not changed. The numbers are copied from the device only once."""
    logits = logits.float()
    tokens, are_numbers = _likeliest(logits)
    edited = _edited(logits, wishes)
    if edited is not logits:
        tokens, _ = _likeliest(edited)
    drawing = [row for row, wish in enumerate(wishes) if wish.sampling.temperature > 0]
    if drawing:
        rows = _upload(drawing, np.int64, logits)
        tokens = tokens.index_copy(0, rows, _draw(edited.index_select(0, rows), [wishes[row] for row in drawing]))
    told = [row for row, wish in enumerate(wishes) if wish.num_top is not None]
    most = min(max((wishes[row].num_top or 0 for row in told), default=0), logits.shape[1])
    pieces = [torch.stack((tokens.double(), are_numbers.double()), 1).flatten()]
    if told:
        rows = _upload(told, np.int64, logits)
        pieces.append(_logprobs(logits.index_select(0, rows), tokens.index_select(0, rows), most).flatten())
    # Token ids and float32 numbers are exact in float64, so one copy carries both.
    found = torch.cat(pieces).cpu().numpy()
    heads = found[: 2 * len(wishes)].reshape(-1, 2)
    tails = dict(zip(told, found[2 * len(wishes) :].reshape(len(told), 1 + 2 * most), strict=True))
    return [
        Choice(token=int(token), are_numbers=bool(fine), logprob=_told(tails.get(row), wish.num_top))
        for row, (wish, (token, fine)) in enumerate(zip(wishes, heads, strict=True))
    ]


def _likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest token of each row [S], and whether all of its logits are finite."""
    if has_kernels(logits):
        from antefix_kernels.likeliest import likeliest

        return likeliest(logits)
    low, high = logits.aminmax(dim=1)
    return logits.argmax(1), low.isfinite() & high.isfinite()


def _told(numbers: npt.NDArray[np.float64] | None, num_top: int | None) -> TokenLogprob | None:
    if numbers is None:
        return None
    top = numbers[1:].reshape(-1, 2)[:num_top]
    return TokenLogprob(logprob=float(numbers[0]), top=tuple((int(token), float(value)) for token, value in top))


def _edited(logits: Tensor, wishes: Sequence[Wish]) -> Tensor:
    """Logits after grammars and penalties; the same tensor if no request has any."""
    masked = [row for row, wish in enumerate(wishes) if wish.allowed is not None]
    edits = [(row, wish.edits) for row, wish in enumerate(wishes) if wish.edits is not None]
    if not masked and not edits:
        return logits
    logits = logits.clone()
    if masked:
        bits = np.stack([wish.allowed for wish in wishes if wish.allowed is not None])
        rows, words = _upload(masked, np.int64, logits), upload(bits, logits.device)
        token = torch.arange(logits.shape[1], device=logits.device)
        allowed = (words[:, token // 32] >> (token % 32).int()) & 1
        logits[rows] = logits[rows].masked_fill(allowed == 0, float("-inf"))
    flat, size = logits.view(-1), logits.shape[1]
    if (found := _places([(row, e.forbidden) for row, e in edits], size))[0].size:
        places, rows = (upload(each, logits.device) for each in found)
        before = flat[places]
        flat[places] = float("-inf")
        flat[places] = torch.where(logits.amax(1).isfinite()[rows], flat[places], before)
    for name, change in (("biased", _bias), ("repeated", _repeat), ("counted", _count)):
        given = [(row, e) for row, e in edits if len(getattr(e, name))]
        if given:
            change(flat, size, given)
    return logits


def _bias(flat: Tensor, size: int, edits: list[tuple[int, Edits]]) -> None:
    places, _ = _places([(row, e.biased) for row, e in edits], size)
    values = np.concatenate([e.bias[e.biased < size] for _, e in edits])
    at = upload(places, flat.device)
    flat[at] = flat[at] + upload(values, flat.device)


def _repeat(flat: Tensor, size: int, edits: list[tuple[int, Edits]]) -> None:
    places, _ = _places([(row, e.repeated) for row, e in edits], size)
    penalties = np.concatenate([np.full((e.repeated < size).sum(), e.repetition, np.float32) for _, e in edits])
    at, penalty = upload(places, flat.device), upload(penalties, flat.device)
    shares = upload(np.float32(1.0) / penalties, flat.device)
    values = flat[at]
    flat[at] = torch.where(values > 0, values * shares, values * penalty)


def _count(flat: Tensor, size: int, edits: list[tuple[int, Edits]]) -> None:
    places, _ = _places([(row, e.counted) for row, e in edits], size)
    inside = [e.counted < size for _, e in edits]
    taken = [np.float32(e.frequency) * e.counts[kept] for (_, e), kept in zip(edits, inside, strict=True)]
    presence = [np.full(kept.sum(), e.presence, np.float32) for (_, e), kept in zip(edits, inside, strict=True)]
    at = upload(places, flat.device)
    flat[at] = flat[at] - upload(np.concatenate(taken), flat.device) - upload(np.concatenate(presence), flat.device)


def _places(rows: list[tuple[int, npt.NDArray[np.int64]]], size: int) -> tuple[npt.NDArray[np.int64], ...]:
    """For ids by row: their places in the flattened logits, and their rows. Ids beyond the vocabulary are left out."""
    kept = [(row, ids[ids < size]) for row, ids in rows]
    empty = [np.zeros(0, np.int64)]
    return (
        np.concatenate(empty + [row * size + ids for row, ids in kept]),
        np.concatenate(empty + [np.full(len(ids), row, np.int64) for row, ids in kept]),
    )


def _draw(logits_nV: Tensor, wishes: list[Wish]) -> Tensor:
    """Drawn tokens [n], as `Sampler` draws them."""
    settings = np.array(
        [(w.sampling.temperature, w.sampling.min_p, w.sampling.top_p, w.uniform) for w in wishes], np.float64
    )
    temperature, min_p, top_p, uniform = upload(np.ascontiguousarray(settings.T), logits_nV.device).unsqueeze(2)
    scaled = logits_nV.double() / temperature
    probabilities = torch.exp(scaled - scaled.amax(1, keepdim=True))
    least = min_p * probabilities.amax(1, keepdim=True)
    probabilities = torch.where(probabilities < least, 0.0, probabilities)
    ordered = probabilities.sort(dim=1, descending=True, stable=True)
    values = ordered.values
    size = values.shape[1]
    top_k = [w.sampling.top_k if 0 < w.sampling.top_k < size else size for w in wishes]
    if min(top_k) < size:
        last = _upload([k - 1 for k in top_k], np.int64, logits_nV).unsqueeze(1)
        # Tokens that are as likely as the k-th are kept too.
        values = torch.where(values < values.gather(1, last), 0.0, values)
    cumulative = (values / values.sum(1, keepdim=True)).cumsum(1)
    num_kept = torch.searchsorted(cumulative, top_p * cumulative[:, -1:]).clamp(max=size - 1)
    # Tokens without probability are never kept.
    num_kept = torch.minimum(num_kept, (values > 0).sum(1, keepdim=True) - 1)
    place = torch.searchsorted(cumulative, uniform * cumulative.gather(1, num_kept), right=True)
    return ordered.indices.gather(1, torch.minimum(place, num_kept)).squeeze(1)


def _logprobs(logits_nV: Tensor, tokens_n: Tensor, num_top: int) -> Tensor:
    """[n, 1 + 2 * num_top] float64: the token's log probability, then ids and log probabilities of the likeliest."""
    wide = logits_nV.double()
    wide = wide - wide.amax(1, keepdim=True)
    wide = (wide - wide.exp().sum(1, keepdim=True).log()).float().double()
    own = wide.gather(1, tokens_n.unsqueeze(1))
    if not num_top:
        return own
    # A stable sort, so that of equal ones the lowest id comes first.
    likeliest = logits_nV.sort(dim=1, descending=True, stable=True).indices[:, :num_top]
    top = torch.stack((likeliest.double(), wide.gather(1, likeliest)), 2)
    return torch.cat((own, top.flatten(1)), 1)


def _upload(numbers: list[int], kind: Any, like: Tensor) -> Tensor:
    return upload(np.array(numbers, kind), like.device)
