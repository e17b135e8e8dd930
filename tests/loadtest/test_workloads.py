"""Workloads are the same for everybody who uses the same seed, and have the asked lengths."""

from __future__ import annotations

from loadtest.workloads import Workload


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
