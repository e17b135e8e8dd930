"""Ranges of SamplingParams: the last check before the core, where one bad value could hurt other requests.

Ranges of peers-compatible servers (OpenAI, vLLM); sizes of lists are `engine.config.Limits`. Torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from engine.config import Limits
from engine.errors import InvalidParameter
from engine.types import SamplingParams

# A logit_bias of this much or more forbids the token, or makes the token and its like the only choice; what lies
# beyond is clamped.
MAX_LOGIT_BIAS = 100.0

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1

# field -> lowest and highest accepted value, what the neutral value does
_RANGES: dict[str, tuple[float, float, str]] = {
    "temperature": (0.0, 2.0, "0 always takes the most likely token"),
    "top_p": (0.0, 1.0, "1 is off, 0 keeps the most likely token only"),
    "min_p": (0.0, 1.0, "0 is off"),
    "presence_penalty": (-2.0, 2.0, "0 is off"),
    "frequency_penalty": (-2.0, 2.0, "0 is off"),
    # Below, dividing by it could overflow a logit.
    "repetition_penalty": (0.01, 100.0, "1 is off"),
}


def validate(params: SamplingParams, *, logits_size: int, max_model_len: int, limits: Limits | None = None) -> None:
    """Check everything that a client can set.

    logits_size    columns of the logits: token ids must be below
    max_model_len  tokens of prompt plus output; `max_tokens` 0 or less means as much as fits
    limits         bounds on the sizes of lists; None: unbounded, for callers that own the process
    Raises InvalidParameter, with `param` set, naming the value, the bound and the remedy.
    """
    for name, (low, high, remedy) in _RANGES.items():
        _check_range(name, getattr(params, name), low, high, remedy)
    _check_range("typical_p", params.typical_p, 0.0, 1.0, "1 is off")
    if params.typical_p == 0.0:
        raise InvalidParameter("typical_p is 0; it must be above 0 and at most 1; 1 is off", param="typical_p")
    _check_integer("top_k", params.top_k, -1, INT64_MAX, "0 or -1 is off")
    _check_integer("seed", params.seed, INT64_MIN, INT64_MAX, "any other seed does as well")
    _check_lengths(params, max_model_len)
    most_top, most_prompt = logits_size, logits_size
    if limits is not None:
        most_top = max(limits.max_top_logprobs, limits.max_completion_logprobs)
        most_prompt = limits.max_top_logprobs
    _check_top("logprobs", params.logprobs, min(most_top, logits_size))
    _check_top("prompt_logprobs", params.prompt_logprobs, min(most_prompt, logits_size))
    _check_lists(params, logits_size, limits)
    _check_something_is_allowed(params, logits_size)


def _check_range(name: str, value: float, low: float, high: float, remedy: str) -> None:
    if isinstance(value, bool) or not low <= value <= high:  # NaN fails every comparison
        raise InvalidParameter(f"{name} is {value}; it must be a number from {low:g} to {high:g}; {remedy}", param=name)


def _check_integer(name: str, value: int, low: int, high: int, remedy: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidParameter(f"{name} is {value}; it must be an integer from {low} to {high}; {remedy}", param=name)


def _check_lengths(params: SamplingParams, max_model_len: int) -> None:
    if params.max_tokens > max_model_len:
        raise InvalidParameter(
            f"max_tokens is {params.max_tokens}; the context of this model has {max_model_len} tokens; "
            "lower it or leave it out",
            param="max_tokens",
        )
    most = params.max_tokens if params.max_tokens > 0 else max_model_len
    _check_integer("min_tokens", params.min_tokens, 0, most, "it cannot exceed max_tokens")


def _check_top(name: str, value: int | None, most: int) -> None:
    if value is not None:
        _check_integer(name, value, 0, most, "ask for fewer alternatives")


def _check_lists(params: SamplingParams, logits_size: int, limits: Limits | None) -> None:
    if limits is not None:
        _check_count("logit_bias", len(params.logit_bias), limits.max_logit_bias)
        _check_count("allowed_token_ids", len(params.allowed_token_ids), limits.max_logit_bias)
        _check_count("stop_token_ids", len(params.stop_token_ids), limits.max_stop_token_ids)
        # each word comes as two sequences: with and without a space before it
        _check_count("bad_words", len(params.bad_words_ids), 2 * limits.max_bad_words)
    _check_ids("logit_bias", params.logit_bias, logits_size)
    _check_ids("allowed_token_ids", params.allowed_token_ids, logits_size)
    _check_ids("stop_token_ids", params.stop_token_ids, logits_size)
    for sequence in params.bad_words_ids:
        if not sequence:
            raise InvalidParameter("bad_words holds a word without tokens; leave it out", param="bad_words")
        _check_ids("bad_words", sequence, logits_size)
    for token_id, bias in params.logit_bias.items():
        if isinstance(bias, bool) or not math.isfinite(bias):
            raise InvalidParameter(
                f"logit_bias of token {token_id} is {bias}; it must be a finite number, of which "
                f"{-MAX_LOGIT_BIAS:g} to {MAX_LOGIT_BIAS:g} have an effect",
                param="logit_bias",
            )


def _check_count(name: str, count: int, limit: int) -> None:
    if count > limit:
        raise InvalidParameter(f"{name} has {count} entries; at most {limit} are allowed; send fewer", param=name)


def _check_ids(name: str, ids: Iterable[int], logits_size: int) -> None:
    for token_id in ids:
        if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < logits_size:
            raise InvalidParameter(
                f"{name} holds the token id {token_id}; ids of this model are 0 to {logits_size - 1}", param=name
            )


def _check_something_is_allowed(params: SamplingParams, logits_size: int) -> None:
    """Restrictions that hold at every step must leave a token to choose."""
    banned = {token_id for token_id, bias in params.logit_bias.items() if bias <= -MAX_LOGIT_BIAS}
    allowed = allowed_ids(params)
    if allowed is not None and not allowed:
        raise InvalidParameter(
            f"allowed_token_ids holds none of the tokens that logit_bias makes exclusive ({MAX_LOGIT_BIAS:g} or more); "
            "drop one of the two",
            param="allowed_token_ids",
        )
    if len(banned) >= logits_size if allowed is None else allowed <= banned:
        raise InvalidParameter("logit_bias forbids every token that could be chosen; allow one", param="logit_bias")


def allowed_ids(params: SamplingParams) -> set[int] | None:
    """The only tokens that may be chosen, by `allowed_token_ids` and exclusive biases together; None: no such bound."""
    exclusive = {token_id for token_id, bias in params.logit_bias.items() if bias >= MAX_LOGIT_BIAS}
    if params.allowed_token_ids:
        allowed = set(params.allowed_token_ids)
        return allowed & exclusive if exclusive else allowed
    return exclusive or None
