"""Drafts one token ahead with the checkpoint's own draft layer (`mtp.0`), a window-only layer over the main streams.

At position p the layer takes the main model's streams h_p and the token that follows, t_{p+1}, and predicts t_{p+2}.
The draft layer's window KV at p depends on that pair alone, so a prompt's draft state is filled without running its
attention.

A drafted token is only a guess: the main model runs it behind the chosen token, and the drafted token is kept only if
the request's sampler chooses it too (`antefix_decode.step`). So a draft can change the speed, never an answer.

    sequence of P tokens      draft state
    t_0 ... t_{P-1} run       entries of positions < P - 1, and h_{P-1}, which waits for t_P
    after `draft`             entries of positions < P; h_{P-1} has been used
    after `follow`            as in the first line, for the tokens that were kept

Shapes:  N = tokens, padded to ROW_TILE; T = tokens of one sequence; M = streams, D = hidden size.
Source:  MTPBlock of the released inference/model.py.
"""

from __future__ import annotations

import collections.abc
import contextlib
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from antefix.block import TokenArray
from antefix.errors import InternalError
from antefix.layout import LayerKind
from antefix.model.attend import line_up
from antefix.model.mhc import expand
from antefix.model.model import DraftLayer, Model
from antefix.model.numerics import linear, pad_rows
from antefix.model.ops import Ops, TorchOps
from antefix.model.runner import Ran
from antefix.model.window_state import DraftState, WindowState

_TORCH_OPS = TorchOps()


@dataclass(frozen=True, slots=True)
class _Pairs:
    """Streams [N, M, D] of some tokens, the positions [N] of these tokens, and the tokens [N] that follow them."""

    streams: Tensor
    tokens: Tensor
    positions: Tensor


def can_draft(model: Model, window: WindowState) -> bool:
    """Whether the last token's streams are known. After a replay, or from a checkpoint without draft state, the last
    token's streams are not known until one more token has been run.
    """
    state = window.draft
    return bool(model.mtp) and state is not None and state.is_at(window.position)


def draft(
    model: Model, windows: collections.abc.Sequence[WindowState], next_tokens: list[int], ops: Ops = _TORCH_OPS
) -> list[int]:
    """The draft for each sequence: the likeliest token after its next token."""
    found: list[int] = draft_logits(model, windows, next_tokens, ops).argmax(1).tolist()
    return found


@torch.inference_mode()
def draft_logits(
    model: Model, windows: collections.abc.Sequence[WindowState], next_tokens: list[int], ops: Ops = _TORCH_OPS
) -> Tensor:
    """Logits [sequences, V] of the token after each sequence's next one. The pair of streams and token also adds an
    entry to the draft state.

    windows: `can_draft` must be true for each of the sequences.
    """
    lead = model.lead
    with contextlib.nullcontext() if lead is None else lead.draft(windows, next_tokens):
        return _draft_logits(model, windows, next_tokens, ops)


def _draft_logits(
    model: Model, windows: collections.abc.Sequence[WindowState], next_tokens: list[int], ops: Ops
) -> Tensor:
    states = [cast(DraftState, window.draft) for window in windows]
    module, device = _module(model), model.device
    pairs = _Pairs(
        streams=torch.stack([_streams(model, state) for state in states]),
        tokens=torch.tensor(next_tokens, device=device),
        positions=torch.tensor([state.end for state in states], device=device),
    )
    streams, positions, rope = _inputs(model, module, pairs)
    attention = module.self_attn
    x, post, comb = module.attn_hc.normed(streams, module.input_layernorm)
    q = attention.queries(attention.query_residual(x), *rope)
    entries = ops.window_pack(attention.window_entries(x, *rope), model.layout)
    attended = torch.zeros_like(q)
    for row, state in enumerate(states):
        own = slice(row, row + 1)
        line = line_up(state.ring, entries[own], state.end, state.first)
        attended[own] = ops.full_attention(q[own], line, attention.sinks, None, positions[own])
        state.take(entries[own])
        state.streams = None
    streams = expand(streams, attention.output(attended, *rope), post, comb)
    x, post, comb = module.ffn_hc.normed(streams, module.post_attention_layernorm)
    live = len(states)
    streams = expand(streams, module.mlp(x, pairs.tokens), post, comb)
    return linear(module.norm(module.hc_head(streams))[:live], model.lm_head.weight)


def follow_ran(
    model: Model, ran: Ran, number: int, window: WindowState, tokens: TokenArray, *, stop: int, ops: Ops = _TORCH_OPS
) -> None:
    """`follow` for the kept tokens of sequence `number`, which are its new tokens before index `stop`."""
    ran.follow(number, window, tokens, stop)
    end = ran.rows(number).start + stop
    given = torch.from_numpy(tokens.astype("i8")).to(model.device)
    follow(model, window, given, ran.streams[end - len(tokens) : end], ops)


@torch.inference_mode()
def follow(model: Model, window: WindowState, tokens: Tensor, streams: Tensor, ops: Ops = _TORCH_OPS) -> None:
    """Bring the draft state to the window's position, after the main model has run `tokens` [T], which end there, with
    the streams `streams` [T, M, D].
    """
    position, num_tokens = window.position, len(tokens)
    state = window.draft
    first = position - num_tokens
    if state is None or state.end not in (first - 1, first) or (state.end == first) != (state.streams is None):
        # The draft state has no entries of earlier tokens: its attention begins here.
        state = window.draft = DraftState.empty(window.layout, first, device=streams.device)
    num_kept = window.layout.geometry.window
    if num_tokens > num_kept:
        # Entries of earlier positions would fall out of the window anyway.
        state.streams, state.end = None, position - 1 - num_kept
        streams, tokens = streams[-num_kept - 1 :], tokens[-num_kept - 1 :]
    if state.streams is None:
        tokens = tokens[1:]
    else:
        streams = torch.cat((_streams(model, state).to(streams.dtype).unsqueeze(0), streams))
    if len(tokens):
        positions = torch.arange(state.end, state.end + len(tokens), device=streams.device)
        module = _module(model)
        wide, _, rope = _inputs(model, module, _Pairs(streams[:-1], tokens, positions))
        x = module.attn_hc.normed(wide, module.input_layernorm)[0]
        state.take(ops.window_pack(module.self_attn.window_entries(x, *rope), model.layout)[: len(tokens)])
    state.streams = streams[-1].clone()


def _streams(model: Model, state: DraftState) -> Tensor:
    """The waiting streams [M, D]. A draft state that was read from bytes holds the waiting streams as one flat row."""
    return cast(Tensor, state.streams).view(model.config.hc_mult, model.config.hidden_size)


def _module(model: Model) -> DraftLayer:
    if not model.mtp:
        raise InternalError("this model was loaded without the module that drafts tokens")
    return cast(DraftLayer, model.mtp[0])


def _inputs(model: Model, module: DraftLayer, pairs: _Pairs) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """The layer's input streams [N, M, D] (each stream of h projected, plus the next token's embedding), and cos and
    sin at their positions.
    """
    positions = pad_rows(pairs.positions)
    embedded = module.enorm(model.model.embed_tokens(pad_rows(pairs.tokens)))
    streams = module.hnorm(pad_rows(pairs.streams).to(embedded.dtype))
    mixed = linear(streams, module.h_proj.weight) + linear(embedded, module.e_proj.weight).unsqueeze(1)
    return mixed, positions, model.rope(LayerKind.WINDOW, positions)
