"""Same requests, other circumstances: chunking, batching, memory pressure, caching and order change no token."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest

from tests.scheduling.harness import Harness

BLOCK_SIZE = 4
Workload = list[tuple[str, list[int], dict[str, Any]]]


def workload(seed: int) -> Workload:
    """30 requests with shared beginnings, several choices, tenants, seeds and priorities."""
    rng = random.Random(seed)
    stems = [[rng.randrange(50) for _ in range(rng.randrange(5, 30))] for _ in range(4)]
    requests: Workload = []
    for i in range(30):
        stem = rng.choice(stems)
        prompt = stem[: rng.randrange(1, len(stem) + 1)] + [rng.randrange(50) for _ in range(rng.randrange(4))]
        options = {
            "max_tokens": rng.randrange(1, 20),
            "temperature": rng.choice([0.0, 1.0]),
            "seed": rng.randrange(3),
            "num_choices": rng.choice([1, 1, 2, 4]),
            "tenant": rng.choice("ab"),
            "priority": rng.choice([0, 0, 1]),
            "logprobs": rng.choice([None, 0]),
            "prompt_logprobs": rng.choice([None, None, 0]),
        }
        requests.append((f"r{i}", prompt, options))
    return requests


def answers(requests: Workload, **options: Any) -> tuple[dict[tuple[str, int], object], Harness]:
    """What every client saw, without what may differ: how it was cut into outputs, cache hits, times."""
    harness = Harness(block_size=BLOCK_SIZE, max_waiting_requests=1000, max_waiting_pools=1e9, **options)
    for request_id, prompt, fields in requests:
        harness.add(prompt, request_id, **fields)
    harness.run()
    seen: dict[tuple[str, int], object] = {}
    for key, stream in harness.streams.items():
        logprobs = [entry for output in stream.outputs for entry in output.logprobs or []]
        prompts = [output.prompt_logprobs for output in stream.outputs if output.prompt_logprobs is not None]
        assert len(prompts) <= 1, "prompt log-probabilities are sent once"
        assert stream.final is not None
        seen[key] = (stream.token_ids, stream.final.finish_reason, logprobs, prompts)
    harness.check_finished()
    return seen, harness


@pytest.mark.parametrize("seed", range(2))
def test_no_circumstance_changes_an_answer(seed: int) -> None:
    requests = workload(seed)
    expected, _ = answers(requests, num_blocks=500, prefix_cache=False, max_num_seqs=64, max_num_batched_tokens=4096)
    num_preemptions = 0
    budgets = (1, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 4096)
    # 14 blocks hold the longest request and little else
    for prefix_cache, budget, num_blocks in itertools.product((False, True), budgets, (14, 30, 500)):
        options = {"prefix_cache": prefix_cache, "max_num_batched_tokens": budget, "num_blocks": num_blocks}
        seen, harness = answers(requests, **options)
        assert seen == expected, options
        num_preemptions += harness.scheduler.stats().num_preemptions
    assert num_preemptions > 50, "the small pools were meant to force preemption"


@pytest.mark.parametrize("seed", range(3))
def test_order_of_arrival_and_batch_size_change_no_answer(seed: int) -> None:
    requests = workload(10 + seed)
    expected, _ = answers(requests, num_blocks=40, max_num_seqs=64)
    shuffled = random.Random(seed).sample(requests, len(requests))
    for max_num_seqs in (1, 2, 16):
        assert answers(shuffled, num_blocks=40, max_num_seqs=max_num_seqs)[0] == expected


@pytest.mark.parametrize("protect_after", [0, 1, 3])
def test_protection_changes_no_answer_and_everybody_finishes(protect_after: int) -> None:
    requests = workload(20)
    expected, _ = answers(requests, num_blocks=500)
    seen, harness = answers(requests, num_blocks=14, protect_after_preemptions=protect_after)
    assert seen == expected
    assert harness.scheduler.stats().num_preemptions > 0


def test_the_same_trace_gives_the_same_schedule() -> None:
    requests = workload(30)
    first = answers(requests, num_blocks=20)[1]
    second = answers(requests, num_blocks=20)[1]
    assert first.num_steps == second.num_steps
    assert first.runner.plans == second.runner.plans
