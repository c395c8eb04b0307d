"""How the next token is chosen: the settings of one request, checked. The settings mean what vLLM's settings of the
same name mean (docs/HTTP_API.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from antefix.errors import InvalidRequest

TEMPERATURE_MAX = 10.0
STOP_SEQUENCES_MAX = 16
STOP_TOKENS_MAX = 256
STOP_TOKEN_IDS_MAX = 256
NUM_TOP_LOGPROBS_MAX = 20
PENALTY_MAX = 2.0
LOGIT_BIASES_MAX = 1024
LOGIT_BIAS_MAX = 100.0
# A grammar is made from JSON schemas. The largest one seen from a client has 70 KB, with all its tools.
GRAMMAR_BYTES_MAX = 512 << 10


class WrongSetting(InvalidRequest):
    """A sampling setting is out of range.  param: the setting's name."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(f"{param} {message}")
        self.param = param


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to sample. temperature 0 is greedy; seed None draws one. stop: token sequences that end the output.

    top_k 0 and min_p 0 keep all tokens.  stop_token_ids: tokens that end the output as the model's end token does.
    min_tokens: the output cannot end before it has this many tokens.  logit_bias: pairs (token, number added to its
    logit), sorted by token.  grammar: a grammar that the output must match, in the grammar engine's language; empty:
    any output.
    num_top_logprobs: None gives no log probabilities; a number gives those of the sampled tokens and of that many of
    the likeliest tokens at each place.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[tuple[int, ...], ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    grammar: str = ""
    num_top_logprobs: int | None = None

    def __post_init__(self) -> None:
        """Raises:  WrongSetting: a setting is out of its range."""
        _within("max_tokens", self.max_tokens, 1, math.inf)
        _within("temperature", self.temperature, 0.0, TEMPERATURE_MAX)
        _require("top_p", 0.0 < self.top_p <= 1.0, f"must be in (0, 1], is {self.top_p}")
        _within("top_k", self.top_k, 0, 2**31 - 1)
        _within("min_p", self.min_p, 0.0, 1.0)
        _within("seed", self.seed or 0, 0, 2**64 - 1)
        _within("min_tokens", self.min_tokens, 0, self.max_tokens)
        _within("presence_penalty", self.presence_penalty, -PENALTY_MAX, PENALTY_MAX)
        _within("frequency_penalty", self.frequency_penalty, -PENALTY_MAX, PENALTY_MAX)
        is_positive = 0.0 < self.repetition_penalty < math.inf
        _require("repetition_penalty", is_positive, f"must be greater than 0, is {self.repetition_penalty}")
        _within("top_logprobs", self.num_top_logprobs or 0, 0, NUM_TOP_LOGPROBS_MAX)
        self._check_lists()

    def _check_lists(self) -> None:
        fits = len(self.stop) <= STOP_SEQUENCES_MAX and all(0 < len(each) <= STOP_TOKENS_MAX for each in self.stop)
        _require("stop", fits, f"takes at most {STOP_SEQUENCES_MAX} sequences, each of 1 to {STOP_TOKENS_MAX} tokens")
        fits = len(self.stop_token_ids) <= STOP_TOKEN_IDS_MAX and all(0 <= t < 2**32 for t in self.stop_token_ids)
        _require("stop_token_ids", fits, f"takes at most {STOP_TOKEN_IDS_MAX} token ids")
        _require("logit_bias", len(self.logit_bias) <= LOGIT_BIASES_MAX, f"takes {LOGIT_BIASES_MAX} tokens")
        for token, bias in self.logit_bias:
            fits = 0 <= token < 2**32 and -LOGIT_BIAS_MAX <= bias <= LOGIT_BIAS_MAX
            _require(
                "logit_bias",
                fits,
                f"is {bias} for {token}: each key must be a token id, and each value from -100 to 100",
            )
        _require("grammar", len(self.grammar.encode()) <= GRAMMAR_BYTES_MAX, f"takes {GRAMMAR_BYTES_MAX} bytes")

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises:  WrongSetting: a setting names a token that the model does not have."""
        if wrong := [token for token, _ in self.logit_bias if token >= vocab_size]:
            raise WrongSetting("logit_bias", f"names token id {wrong[0]}; the vocabulary has {vocab_size}")


def _require(param: str, holds: bool, message: str) -> None:
    if not holds:
        raise WrongSetting(param, message)


def _within(param: str, value: float, low: float, high: float) -> None:
    # Negated so that NaN is refused.
    bound = f"at least {low}" if high == math.inf else f"from {low} to {high}"
    _require(param, low <= value <= high, f"must be {bound}, is {value}")
