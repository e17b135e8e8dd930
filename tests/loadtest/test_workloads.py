"""Workloads are the same for everybody who uses the same seed, and have the asked lengths."""

from __future__ import annotations

import statistics

import pytest

from loadtest.workloads import Workload, arrival_times


def test_prompts_have_the_asked_length_and_share_the_asked_prefix() -> None:
    workload = Workload(num_requests=5, prompt_tokens=7, shared_prefix_tokens=11, vocab_size=500, seed=3)
    prompts = list(workload.prompts())
    assert [len(prompt) for prompt in prompts] == [18] * 5
    assert len({tuple(prompt[:11]) for prompt in prompts}) == 1
    assert len({tuple(prompt) for prompt in prompts}) == 5
    assert all(250 <= token < 500 for prompt in prompts for token in prompt)  # type: ignore[operator]


def test_the_seed_decides_everything() -> None:
    assert list(Workload(seed=1).prompts()) == list(Workload(seed=1).prompts())
    assert list(Workload(seed=1).prompts()) != list(Workload(seed=2).prompts())


def test_without_a_vocabulary_prompts_are_words() -> None:
    prompt = next(Workload(prompt_tokens=6, shared_prefix_tokens=2, vocab_size=0).prompts())
    assert isinstance(prompt, str)
    assert len(prompt.split()) == 8


def test_poisson_arrivals_have_the_asked_rate_and_closed_loops_none() -> None:
    assert arrival_times(3, None, seed=0) == [0.0, 0.0, 0.0]
    times = arrival_times(4000, 5.0, seed=0)
    gaps = [later - earlier for earlier, later in zip([0.0, *times], times, strict=False)]
    assert min(gaps) >= 0
    assert statistics.mean(gaps) == pytest.approx(0.2, rel=0.1)
    assert statistics.pstdev(gaps) == pytest.approx(0.2, rel=0.15)  # exponential: as wide as long
