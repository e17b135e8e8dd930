"""Every sampling field at both edges of its range: inside passes, outside names field, value, bound and remedy."""

from __future__ import annotations

import math

import pytest

from engine.config import Limits
from engine.errors import InvalidParameter
from engine.sampling_params import allowed_ids, validate
from engine.types import SamplingParams

V = 5000
LIMITS = Limits()


def check(**fields: object) -> None:
    validate(SamplingParams(**fields), logits_size=V, max_model_len=100, limits=LIMITS)  # type: ignore[arg-type]


def refusal(param: str, **fields: object) -> str:
    with pytest.raises(InvalidParameter) as caught:
        check(**fields)
    assert caught.value.param == param
    return str(caught.value)


def test_defaults_and_neutral_values_pass():
    check()
    check(temperature=0.0, top_k=-1, min_tokens=0, seed=0, logprobs=None, stop_token_ids=(), ignore_eos=True)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("temperature", 0.0, 2.0),
        ("top_p", 0.0, 1.0),
        ("min_p", 0.0, 1.0),
        ("typical_p", 1e-6, 1.0),
        ("presence_penalty", -2.0, 2.0),
        ("frequency_penalty", -2.0, 2.0),
        ("repetition_penalty", 0.01, 100.0),
        ("top_k", -1, 2**63 - 1),
        ("seed", -(2**63), 2**63 - 1),
        ("min_tokens", 0, 16),
        ("logprobs", 0, 20),
        ("prompt_logprobs", 0, 20),
    ],
)
def test_ranges_hold_at_both_edges(name, low, high):
    check(**{name: low})
    check(**{name: high})
    step = 1 if isinstance(low, int) else 1e-2
    for outside in (low - step, high + step):
        message = refusal(name, **{name: outside})
        assert message.startswith(f"{name} is {outside}; it must be ")


@pytest.mark.parametrize(
    "name", ["temperature", "top_p", "min_p", "typical_p", "presence_penalty", "repetition_penalty"]
)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused(name, value):
    refusal(name, **{name: value})


def test_typical_p_zero_is_refused():
    assert "above 0" in refusal("typical_p", typical_p=0.0)


@pytest.mark.parametrize("name", ["temperature", "top_k", "seed", "logprobs"])
def test_booleans_are_not_numbers(name):
    refusal(name, **{name: True})


def test_lengths_are_bounded_by_the_context_and_by_each_other():
    check(max_tokens=100, min_tokens=100)
    check(max_tokens=0, min_tokens=100)
    assert "context of this model has 100 tokens" in refusal("max_tokens", max_tokens=101)
    assert "from 0 to 7; it cannot exceed max_tokens" in refusal("min_tokens", max_tokens=7, min_tokens=8)
    refusal("min_tokens", max_tokens=0, min_tokens=101)


@pytest.mark.parametrize("token_id", [-1, V, 2**31, 2**63])
@pytest.mark.parametrize(
    ("param", "build"),
    [
        ("logit_bias", lambda token_id: {"logit_bias": {token_id: 1.0}}),
        ("allowed_token_ids", lambda token_id: {"allowed_token_ids": (1, token_id)}),
        ("stop_token_ids", lambda token_id: {"stop_token_ids": (token_id,)}),
        ("bad_words", lambda token_id: {"bad_words_ids": ((1, token_id),)}),
    ],
)
def test_ids_outside_of_the_logits_are_refused(param, build, token_id):
    check(**build(V - 1))
    assert f"the token id {token_id}; ids of this model are 0 to {V - 1}" in refusal(param, **build(token_id))


@pytest.mark.parametrize(
    ("param", "limit", "build"),
    [
        ("logit_bias", LIMITS.max_logit_bias, lambda n: {"logit_bias": dict.fromkeys(range(n), 1.0)}),
        ("allowed_token_ids", LIMITS.max_logit_bias, lambda n: {"allowed_token_ids": tuple(range(n))}),
        ("stop_token_ids", LIMITS.max_stop_token_ids, lambda n: {"stop_token_ids": tuple(range(n))}),
        ("bad_words", 2 * LIMITS.max_bad_words, lambda n: {"bad_words_ids": ((1, 2),) * n}),
    ],
)
def test_lists_are_bounded_unless_the_caller_owns_the_process(param, limit, build):
    check(**build(limit))
    assert f"{limit + 1} entries; at most {limit}" in refusal(param, **build(limit + 1))
    validate(SamplingParams(**build(limit + 1)), logits_size=V, max_model_len=100)


@pytest.mark.parametrize("bias", [math.nan, math.inf, -math.inf])
def test_biases_must_be_finite_and_large_ones_are_clamped_later(bias):
    check(logit_bias={3: 1e6})
    refusal("logit_bias", logit_bias={3: bias})


def test_empty_bad_words_are_refused():
    refusal("bad_words", bad_words_ids=((),))


def test_restrictions_that_leave_no_token_are_refused():
    check(allowed_token_ids=(1, 2), logit_bias={1: -100.0})
    refusal("logit_bias", allowed_token_ids=(1, 2), logit_bias={1: -100.0, 2: -150.0})
    refusal("allowed_token_ids", allowed_token_ids=(1, 2), logit_bias={3: 100.0})
    with pytest.raises(InvalidParameter, match="forbids every token"):
        validate(SamplingParams(logit_bias={0: -100.0, 1: -100.0}), logits_size=2, max_model_len=100)


def test_exclusive_biases_narrow_the_allowed_ids():
    assert allowed_ids(SamplingParams()) is None
    assert allowed_ids(SamplingParams(logit_bias={4: 99.0})) is None
    assert allowed_ids(SamplingParams(logit_bias={4: 100.0, 5: 3.0})) == {4}
    assert allowed_ids(SamplingParams(allowed_token_ids=(4, 6), logit_bias={4: 200.0, 5: 100.0})) == {4}
