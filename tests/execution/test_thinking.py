"""The thinking budget: when it forces tokens, and that nothing else changes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.execution.sampler import Sampler
from engine.execution.thinking import ThinkingLimit
from engine.types import SamplingParams, ThinkingBudget

END, FORCED = 7, (5, 7, 5)


def budget(max_tokens: int = 3, start_ids: tuple[int, ...] = ()) -> ThinkingBudget:
    return ThinkingBudget(max_tokens, start_ids, END, FORCED)


def run(limit: ThinkingLimit, wanted: list[int]) -> list[int]:
    """The outputs of a model that wants these tokens."""
    outputs = []
    for token_id in wanted:
        chosen = token_id if limit.forced_id is None else limit.forced_id
        limit.append(chosen)
        outputs.append(chosen)
    return outputs


def test_at_the_budget_the_end_is_written_and_then_the_model_goes_on() -> None:
    assert run(ThinkingLimit(budget(), ()), [1, 2, 3, 4, 4, 4, 8, 9]) == [1, 2, 3, *FORCED, 8, 9]
    assert run(ThinkingLimit(budget(0), ()), [1, 2, 3, 4]) == [*FORCED, 4]


def test_thinking_that_ends_by_itself_is_left_alone() -> None:
    assert run(ThinkingLimit(budget(), ()), [1, 2, END, 1, 2, 3, 4, 5]) == [1, 2, END, 1, 2, 3, 4, 5]


def test_an_answer_that_does_not_think_has_no_budget() -> None:
    assert run(ThinkingLimit(budget(2, (3, 4)), ()), [1] * 9) == [1] * 9
    assert run(ThinkingLimit(budget(2, (3, 4)), ()), [3, 3, 4, 1, 1, 1, 1, 1, 9]) == [3, 3, 4, 1, 1, *FORCED, 9]


@settings(max_examples=100)
@given(
    wanted=st.lists(st.integers(0, 9), max_size=20), cut=st.integers(0, 20), start=st.sampled_from([(), (3,), (3, 4)])
)
def test_a_row_that_was_preempted_anywhere_goes_on_alike(wanted: list[int], cut: int, start: tuple[int, ...]) -> None:
    whole = run(ThinkingLimit(budget(3, start), ()), wanted)
    before = whole[:cut]
    assert before + run(ThinkingLimit(budget(3, start), before), wanted[cut:]) == whole


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_sampler_forces_the_end_and_draws_as_without_a_budget_elsewhere(temperature: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(12, 16)
    logits[:, END] = -30.0  # it never ends by itself
    free, _ = sampled(logits, SamplingParams(temperature=temperature, seed=5))
    bound, logprobs = sampled(logits, SamplingParams(temperature=temperature, seed=5, thinking=budget(4), logprobs=0))
    assert bound[:4] == free[:4]
    assert tuple(bound[4:7]) == FORCED
    assert bound[7:] == free[7:], "draws depend on the place alone"
    raw = torch.log_softmax(logits[5], dim=0)[END].item()
    assert logprobs[5] == pytest.approx(raw, abs=1e-4), "a forced token has its own probability"


def test_neither_bias_nor_bad_words_nor_min_tokens_keep_the_end_away() -> None:
    params = SamplingParams(
        temperature=0.0, thinking=budget(1), logit_bias={END: -100.0}, bad_words_ids=((5,),), min_tokens=12
    )
    assert tuple(sampled(torch.randn(6, 16), params)[0][1:4]) == FORCED


def test_an_output_that_must_answer_does_not_end_inside_of_its_thinking() -> None:
    logits = torch.zeros(6, 16)
    logits[:, 9] = 5.0  # the end of the output
    logits[2, END] = 3.0
    for must_answer, expected in ((False, [9] * 4), (True, [0, 0, END, 9])):
        bound = ThinkingBudget(100, (), END, FORCED, must_answer)
        params = SamplingParams(temperature=0.0, thinking=bound, stop_token_ids=(9,))
        assert sampled(logits, params)[0][:4] == expected


def test_infinite_and_broken_logits_stay_visible() -> None:
    sampler = Sampler(16, 1, "cpu", ())
    sampler.add_row(0, SamplingParams(thinking=budget(0)), 0, [1], 1)
    logits = torch.zeros(1, 16)
    logits[0, 2] = math.nan
    assert sampler.sample(logits, [0], [0]).errors[0] == "numerical_error"


def sampled(logits: torch.Tensor, params: SamplingParams) -> tuple[list[int], list[float]]:
    sampler = Sampler(logits.shape[1], 1, "cpu", ())
    sampler.add_row(0, params, 0, [1, 2], 2)
    tokens, logprobs = [], []
    for index in range(len(logits)):
        output = sampler.sample(logits[index : index + 1].clone(), [0], [index])
        tokens.append(output.token_ids[0])
        logprobs.append(output.logprobs[0].logprob if output.logprobs and output.logprobs[0] else math.nan)
    return tokens, logprobs
