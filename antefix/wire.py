"""Between our value types and protobuf's; the only place that knows both. Used by servers and clients alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from antefix.block import as_tokens
from antefix.errors import InternalError, InvalidRequest
from antefix.restore_report import RestoreReport
from antefix.v1 import worker_pb2

TEMPERATURE_MAX = 10.0
STOP_SEQUENCES_MAX = 16
STOP_TOKENS_MAX = 256
NUM_TOP_LOGPROBS_MAX = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to sample. temperature 0 is greedy; seed None draws one. stop: token sequences that end the output.

    num_top_logprobs: None gives no log probabilities; a number those of the tokens and of so many likeliest ones.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[tuple[int, ...], ...] = ()
    ignore_eos: bool = False
    num_top_logprobs: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise InvalidRequest(f"max_tokens must be at least 1, is {self.max_tokens}")
        if not 0.0 <= self.temperature <= TEMPERATURE_MAX:
            raise InvalidRequest(f"temperature must be in [0, {TEMPERATURE_MAX}], is {self.temperature}")
        if not 0.0 < self.top_p <= 1.0:
            raise InvalidRequest(f"top_p must be in (0, 1], is {self.top_p}")
        if not 0 <= (self.seed or 0) < 1 << 64:
            raise InvalidRequest(f"seed must be from 0 to 2**64 - 1, is {self.seed}")
        if len(self.stop) > STOP_SEQUENCES_MAX or any(not 0 < len(s) <= STOP_TOKENS_MAX for s in self.stop):
            raise InvalidRequest(f"at most {STOP_SEQUENCES_MAX} stop sequences of 1 to {STOP_TOKENS_MAX} tokens")
        if not 0 <= (self.num_top_logprobs or 0) <= NUM_TOP_LOGPROBS_MAX:
            raise InvalidRequest(f"top_logprobs must be from 0 to {NUM_TOP_LOGPROBS_MAX}, is {self.num_top_logprobs}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """One token's log probability, and the likeliest at its place as (id, log probability), best first."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def tokens_to_wire(tokens: npt.ArrayLike) -> worker_pb2.TokenIds:
    return worker_pb2.TokenIds(ids=as_tokens(np.asarray(tokens)).tobytes())


def tokens_from_wire(message: worker_pb2.TokenIds) -> npt.NDArray[np.uint32]:
    """[N] uint32.  Raises:  InvalidRequest: not whole tokens."""
    if len(message.ids) % 4:
        raise InvalidRequest(f"token ids are 4 bytes each; {len(message.ids)} bytes are no whole number of them")
    return np.frombuffer(message.ids, "<u4")


def sampling_to_wire(sampling: Sampling) -> worker_pb2.Sampling:
    return worker_pb2.Sampling(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=sampling.seed,
        max_tokens=sampling.max_tokens,
        stop=[tokens_to_wire(sequence) for sequence in sampling.stop],
        ignore_eos=sampling.ignore_eos,
        num_top_logprobs=sampling.num_top_logprobs,
    )


def sampling_from_wire(message: worker_pb2.Sampling) -> Sampling:
    """Raises:  InvalidRequest: a value out of its range."""
    return Sampling(
        max_tokens=message.max_tokens,
        temperature=message.temperature,
        top_p=message.top_p or 1.0,
        seed=message.seed if message.HasField("seed") else None,
        stop=tuple(tuple(int(t) for t in tokens_from_wire(sequence)) for sequence in message.stop),
        ignore_eos=message.ignore_eos,
        num_top_logprobs=message.num_top_logprobs if message.HasField("num_top_logprobs") else None,
    )


def logprobs_to_wire(logprobs: Sequence[TokenLogprob]) -> worker_pb2.TokenLogprobs | None:
    """None for none, so that the field stays unset."""
    if not logprobs:
        return None
    top = [pair for each in logprobs for pair in each.top]
    return worker_pb2.TokenLogprobs(
        chosen=[each.logprob for each in logprobs],
        top=tokens_to_wire(np.array([token for token, _ in top], np.uint32)),
        top_logprobs=[logprob for _, logprob in top],
    )


def logprobs_from_wire(message: worker_pb2.TokenLogprobs) -> tuple[TokenLogprob, ...]:
    """Raises:  InternalError: its parts are of different lengths."""
    ids = tokens_from_wire(message.top)
    num_tokens = len(message.chosen)
    num_top = len(ids) // num_tokens if num_tokens else 0
    if len(ids) != num_tokens * num_top or len(message.top_logprobs) != len(ids):
        raise InternalError("log probabilities do not fit their tokens")
    pairs = [(int(token), logprob) for token, logprob in zip(ids, message.top_logprobs, strict=True)]
    return tuple(
        TokenLogprob(logprob=logprob, top=tuple(pairs[index * num_top : (index + 1) * num_top]))
        for index, logprob in enumerate(message.chosen)
    )


def report_to_wire(report: RestoreReport) -> worker_pb2.RestoreReport:
    return worker_pb2.RestoreReport(**dataclasses.asdict(report))


def report_from_wire(message: worker_pb2.RestoreReport) -> RestoreReport:
    return RestoreReport(**{field.name: getattr(message, field.name) for field in dataclasses.fields(RestoreReport)})
