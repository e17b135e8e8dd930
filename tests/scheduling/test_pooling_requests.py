"""Requests that end with their prompt: chunks, prefix cache, preemption, deadlines and whole prompts."""

from __future__ import annotations

import random

import pytest

from engine.errors import InvalidParameter, PromptTooLong
from engine.types import PoolingParams, TokenOutput
from tests.fakes import ROOT, next_hash
from tests.scheduling.harness import Harness

LAST, MEAN = PoolingParams(method="last"), PoolingParams(method="mean")


def prompt_of(length: int, start: int = 10) -> list[int]:
    return list(range(start, start + length))


def expected(prompt: list[int]) -> bytes:
    history = ROOT
    for token_id in prompt:
        history = next_hash(history, token_id)
    return history.to_bytes(8, "little")


def result(harness: Harness, name: str) -> TokenOutput:
    (output,) = harness.streams[name, 0].outputs
    return output


def test_a_pooling_request_ends_after_its_prompt_with_one_output() -> None:
    harness = Harness(max_num_batched_tokens=10)
    name = harness.add(prompt_of(25), pooling=MEAN)
    harness.run()
    output = result(harness, name)
    assert (output.pooled, output.pooled_shape) == (expected(prompt_of(25)), (2,))
    assert (output.finish_reason, output.token_ids, output.num_cached_tokens) == ("stop", [], 0)
    assert not any(chunk.is_sampling for plan in harness.runner.plans for chunk in plan.chunks)


def test_it_reads_the_prefix_cache_only_where_the_last_token_is_enough_and_always_feeds_it() -> None:
    harness = Harness()
    for pooling, num_cached in ((MEAN, 0), (LAST, 20), (MEAN, 0), (PoolingParams(task="token_embed"), 0)):
        name = harness.add(prompt_of(22), pooling=pooling)
        harness.run()
        assert result(harness, name).num_cached_tokens == num_cached
        assert result(harness, name).pooled == expected(prompt_of(22))


def test_its_prompt_may_fill_the_context_and_no_more() -> None:
    harness = Harness(max_model_len=40)
    name = harness.add(prompt_of(40), pooling=MEAN)
    harness.run()
    assert result(harness, name).pooled == expected(prompt_of(40))
    with pytest.raises(PromptTooLong, match="41 tokens, the limit is 40"):
        harness.add(prompt_of(41), pooling=MEAN)
    with pytest.raises(InvalidParameter, match="one result"):
        harness.add(prompt_of(4), pooling=MEAN, num_choices=2)


def test_a_deadline_ends_it_with_an_error() -> None:
    harness = Harness(max_num_batched_tokens=4)
    name = harness.add(prompt_of(20), pooling=MEAN, deadline_s=5.0)
    harness.step()
    harness.now = 6.0
    harness.run()
    assert (result(harness, name).finish_reason, result(harness, name).error) == ("error", "deadline_exceeded")


def test_more_urgent_ones_run_sooner() -> None:
    harness = Harness(max_num_seqs=1)
    names = [harness.add(prompt_of(4), pooling=MEAN, priority=priority) for priority in (1, 0)]
    ended: list[str] = []
    while harness.core.has_work:
        ended += [output.request_id for output in harness.step()]
    assert ended == names[::-1]


def test_non_finite_results_are_errors() -> None:
    harness = Harness()
    harness.runner.fail_ids.add("bad")
    harness.add(prompt_of(4), "bad", pooling=MEAN)
    good = harness.add(prompt_of(5), pooling=MEAN)
    harness.run()
    assert result(harness, "bad").error == "internal_error"
    assert result(harness, good).pooled == expected(prompt_of(5))


@pytest.mark.parametrize("seed", range(4))
def test_beside_generation_under_pressure_every_result_is_that_of_a_run_alone(seed: int) -> None:
    """Few blocks, so that requests are preempted; some leave. The harness compares the generated tokens."""
    draw = random.Random(seed)
    harness = Harness(num_blocks=14, max_model_len=48, max_num_batched_tokens=16)
    prompts: dict[str, list[int]] = {}
    for _ in range(60):
        prompt = prompt_of(draw.randint(1, 30), start=draw.choice((10, 10, 50)))
        if draw.random() < 0.5:
            pooling = draw.choice((LAST, MEAN, PoolingParams(method="cls")))
            name = harness.try_add(prompt, pooling=pooling, priority=draw.choice((0, 0, 1)))
            if name is not None:
                prompts[name] = prompt
        else:
            harness.try_add(prompt, max_tokens=draw.randint(1, 18), ignore_eos=True)
        if draw.random() < 0.1 and harness.requests:
            harness.abort(draw.choice(list(harness.requests)))
        harness.step()
    harness.run()
    for name, prompt in prompts.items():
        if not harness.streams[name, 0].is_aborted:
            assert result(harness, name).pooled == expected(prompt)
    harness.check_finished()
    assert harness.scheduler.stats().num_preemptions > 0


def test_whole_prompts_wait_for_a_step_that_holds_all_of_them() -> None:
    harness = Harness(max_model_len=32, max_num_batched_tokens=32, prefix_cache=False, whole_prompts=True)
    prompts = [prompt_of(length) for length in (20, 12, 1, 32, 5, 27)]
    names = [harness.add(prompt, pooling=MEAN) for prompt in prompts]
    harness.run()
    steps = [[chunk.num_tokens for chunk in plan.chunks] for plan in harness.runner.plans if plan.chunks]
    assert steps == [[20, 12], [1], [32], [5, 27]]
    assert [result(harness, name).pooled for name in names] == [expected(prompt) for prompt in prompts]
