"""Reads sampling settings from a request: OpenAI's names of settings, and vLLM's names for settings that OpenAI lacks.
`Sampling` has the ranges.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from antefix.checked_table import finite
from antefix.sampling import LOGIT_BIAS_MAX, Sampling
from antefix.tokenizer import Tokenizer
from antefix_router.front import NUM_SAMPLES_MAX
from antefix_router.gateway.fields import Fields, WrongField, unsupported, wrong_type
from antefix_router.gateway.output import stop_tokens

STOPS_MAX = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Knobs:
    """max_tokens None: the server's default.  num_top_logprobs None: no log probabilities.  n: how many of the best_of
    outputs are shown.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    num_top_logprobs: int | None = None
    n: int = 1
    best_of: int = 1

    def sampling(self, tokenizer: Tokenizer, *, max_tokens_default: int, grammar: str = "") -> Sampling:
        """Raises:  WrongSetting, WrongField: a setting is out of range."""
        if len(self.stop) > STOPS_MAX:
            raise WrongField(f"stop takes at most {STOPS_MAX} sequences", param="stop", code="invalid_value")
        # Several outputs are ranked by their log probabilities, so they are needed even if the client did not ask for
        # them.
        num_top = 0 if self.num_top_logprobs is None and self.best_of > self.n else self.num_top_logprobs
        return Sampling(
            max_tokens=self.max_tokens if self.max_tokens is not None else max_tokens_default,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            seed=None if self.seed is None else self.seed & (2**63 - 1),
            stop=stop_tokens(tokenizer, self.stop),
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
            min_tokens=self.min_tokens,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=self.logit_bias,
            grammar=grammar,
            num_top_logprobs=num_top,
        )


def read_knobs(
    fields: Fields,
    *length_names: str,
    num_top_logprobs: int | None = None,
    stop_name: str = "stop",
    several: bool = False,
) -> Knobs:
    """length_names: the names of the output limit, of which the first one present counts. several: whether n and
    best_of are read as well.

    Raises:  WrongField: a wrong type. Values out of range are refused later, by `sampling`.
    """
    lengths = [fields.integer(name, low=1) for name in length_names]
    n, best_of = _counts(fields) if several else (1, 1)
    return Knobs(
        max_tokens=next((length for length in lengths if length is not None), None),
        temperature=fields.number("temperature", 1.0),
        top_p=fields.number("top_p", 1.0),
        top_k=max(0, fields.integer("top_k", 0, low=-1) or 0),  # -1 is vLLM's other way to say "all"
        min_p=fields.number("min_p", 0.0),
        seed=fields.integer("seed", low=-(2**63)),
        stop=tuple(fields.texts(stop_name)),
        stop_token_ids=_token_ids(fields, "stop_token_ids"),
        ignore_eos=fields.boolean("ignore_eos"),
        min_tokens=fields.integer("min_tokens", 0) or 0,
        presence_penalty=fields.number("presence_penalty", 0.0),
        frequency_penalty=fields.number("frequency_penalty", 0.0),
        repetition_penalty=fields.number("repetition_penalty", 1.0),
        logit_bias=_logit_bias(fields.take("logit_bias")),
        num_top_logprobs=num_top_logprobs,
        n=n,
        best_of=best_of,
    )


def _counts(fields: Fields) -> tuple[int, int]:
    n = fields.integer("n", 1, low=1) or 1
    best_of = fields.integer("best_of", n, low=1) or n
    if best_of < n:
        raise unsupported("best_of", f" is {best_of}: it must be at least n, which is {n}")
    if best_of > NUM_SAMPLES_MAX:
        name = "n" if n > NUM_SAMPLES_MAX else "best_of"
        raise unsupported(name, f" is {max(n, best_of)}: at most {NUM_SAMPLES_MAX} outputs per request")
    return n, best_of


def _token_ids(fields: Fields, name: str) -> tuple[int, ...]:
    values = fields.items(name, [])
    if not all(isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in values):
        raise wrong_type(fields.name_of(name), "a list of token ids")
    return tuple(dict.fromkeys(values))


def _logit_bias(value: Any) -> tuple[tuple[int, float], ...]:
    """Token ids are names in a JSON object, so they are text. A bias beyond 100 or -100 is set to that bound, as in
    vLLM.
    """
    biases: dict[int, float] = {}
    for name, bias in Fields({} if value is None else value, "logit_bias").rest().items():
        is_number = finite(bias)
        if not is_number or not (name.isascii() and name.isdigit() and len(name) < 10):
            raise wrong_type("logit_bias", "an object of token ids, each with a number")
        biases[int(name)] = max(-LOGIT_BIAS_MAX, min(LOGIT_BIAS_MAX, float(bias)))
    return tuple(sorted(biases.items()))
