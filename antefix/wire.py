"""Converts between Antefix's value types and protobuf messages. Only servers and clients use this module."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from antefix.block import as_tokens
from antefix.errors import InternalError, InvalidRequest, Unavailable
from antefix.miss_reason import MissReason
from antefix.restore_report import RestoreReport
from antefix.sampling import Sampling
from antefix.usage import Evidence, Usage
from antefix.v1 import usage_pb2, worker_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """One token's log probability, and the likeliest tokens at its place as (id, log probability), best first."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def tokens_to_wire(tokens: npt.ArrayLike) -> worker_pb2.TokenIds:
    return worker_pb2.TokenIds(ids=as_tokens(np.asarray(tokens)).tobytes())


def tokens_from_wire(message: worker_pb2.TokenIds) -> npt.NDArray[np.uint32]:
    """[N] uint32.  Raises:  InvalidRequest: the bytes are not a whole number of token ids."""
    if len(message.ids) % 4:
        raise InvalidRequest(f"the token ids have {len(message.ids)} bytes, which is not a whole number of 4-byte ids")
    return np.frombuffer(message.ids, "<u4")


def sampling_to_wire(sampling: Sampling) -> worker_pb2.Sampling:
    return worker_pb2.Sampling(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        seed=sampling.seed,
        max_tokens=sampling.max_tokens,
        stop=[tokens_to_wire(sequence) for sequence in sampling.stop],
        stop_token_ids=sampling.stop_token_ids,
        ignore_eos=sampling.ignore_eos,
        min_tokens=sampling.min_tokens,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        logit_bias_tokens=[token for token, _ in sampling.logit_bias],
        logit_bias_values=[bias for _, bias in sampling.logit_bias],
        grammar=sampling.grammar,
        num_top_logprobs=sampling.num_top_logprobs,
    )


def sampling_from_wire(message: worker_pb2.Sampling) -> Sampling:
    """Raises:  InvalidRequest: a value is out of its range."""
    if len(message.logit_bias_tokens) != len(message.logit_bias_values):
        raise InvalidRequest("the logit_bias field needs as many tokens as values")
    return Sampling(
        max_tokens=message.max_tokens,
        temperature=message.temperature,
        top_p=message.top_p or 1.0,
        top_k=message.top_k,
        min_p=message.min_p,
        seed=message.seed if message.HasField("seed") else None,
        stop=tuple(tuple(int(t) for t in tokens_from_wire(sequence)) for sequence in message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        min_tokens=message.min_tokens,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        repetition_penalty=message.repetition_penalty or 1.0,
        logit_bias=tuple(zip(message.logit_bias_tokens, message.logit_bias_values, strict=True)),
        grammar=message.grammar,
        num_top_logprobs=message.num_top_logprobs if message.HasField("num_top_logprobs") else None,
    )


def logprobs_to_wire(logprobs: Sequence[TokenLogprob]) -> worker_pb2.TokenLogprobs | None:
    """The protobuf message for these log probabilities. Returns None if there are no log probabilities, so that the
    field stays unset.
    """
    if not logprobs:
        return None
    top = [pair for each in logprobs for pair in each.top]
    return worker_pb2.TokenLogprobs(
        chosen=[each.logprob for each in logprobs],
        top=tokens_to_wire(np.array([token for token, _ in top], np.uint32)),
        top_logprobs=[logprob for _, logprob in top],
    )


def logprobs_from_wire(message: worker_pb2.TokenLogprobs) -> tuple[TokenLogprob, ...]:
    """Raises:  InternalError: the message's lists do not have matching lengths."""
    ids = tokens_from_wire(message.top)
    num_tokens = len(message.chosen)
    num_top = len(ids) // num_tokens if num_tokens else 0
    if len(ids) != num_tokens * num_top or len(message.top_logprobs) != len(ids):
        raise InternalError("the answer's log probabilities do not match its tokens")
    pairs = [(int(token), logprob) for token, logprob in zip(ids, message.top_logprobs, strict=True)]
    return tuple(
        TokenLogprob(logprob=logprob, top=tuple(pairs[index * num_top : (index + 1) * num_top]))
        for index, logprob in enumerate(message.chosen)
    )


def report_to_wire(report: RestoreReport) -> worker_pb2.RestoreReport:
    return worker_pb2.RestoreReport(**dataclasses.asdict(report))


def report_from_wire(message: worker_pb2.RestoreReport, num_tokens: int | None = None) -> RestoreReport:
    """num_tokens: the prompt's length; None: not checked. Raises: Unavailable: the report counts more tokens than the
    prompt has.
    """
    if num_tokens is not None and message.hit_tokens + message.miss_tokens > num_tokens:
        raise Unavailable(
            f"the worker's answer cannot be right: {message.hit_tokens} tokens hit and {message.miss_tokens} missed,"
            f" of {num_tokens}"
        )
    values = {field.name: getattr(message, field.name) for field in dataclasses.fields(RestoreReport)}
    more = {"miss_reason": MissReason(message.miss_reason), "hit_tiers": dict(message.hit_tiers)}
    return RestoreReport(**{**values, **more})


def usage_to_wire(usage: Usage, *, request_id: str = "", total_s: float = 0.0) -> usage_pb2.Usage:
    """total_s: seconds from the arrival of the request to the end of its answer."""
    values = {field.name: getattr(usage, field.name) for field in dataclasses.fields(Usage) if field.name != "ttft_us"}
    return usage_pb2.Usage(
        **values,
        cache_miss_tokens=usage.cache_miss_tokens,
        written_tokens=usage.written_tokens,
        ttft_s=usage.ttft_s,
        request_id=request_id,
        total_s=total_s,
    )


def usage_from_wire(message: usage_pb2.Usage) -> Usage:
    names = {field.name for field in dataclasses.fields(Usage)} - {"ttft_us", "miss_reason", "evidence"}
    return Usage(
        **{name: getattr(message, name) for name in names},
        miss_reason=MissReason(message.miss_reason),
        evidence=Evidence(message.evidence),
        ttft_us=round(message.ttft_s * 1e6),
    )
