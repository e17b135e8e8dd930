"""Long traffic under a virtual clock: nothing is lost, duplicated or left behind, and nothing grows."""

from __future__ import annotations

import gc

import pytest

from engine.scheduling.invariants import check_invariants
from engine.scheduling.request import Request
from tests.scheduling.harness import Harness
from tests.scheduling.traffic import Traffic


def soak(num_requests: int, seed: int) -> None:
    """A pool small enough that some requests are preempted; invariants now and then, answers all compared."""
    harness = Harness(
        num_blocks=22,
        block_size=4,
        max_model_len=64,
        strict=False,
        max_num_seqs=16,
        max_num_batched_tokens=128,
        max_waiting_requests=64,
    )
    traffic = Traffic(harness, seed, alphabet=50)
    num_checked = 0
    while traffic.num_accepted < num_requests:
        traffic.tick()
        if harness.num_steps % 500 == 0:
            check_invariants(harness.scheduler)
        if harness.num_steps % 2000 == 0:
            num_checked += harness.settle()
    num_checked += harness.settle()
    assert num_checked >= num_requests
    assert harness.scheduler.stats().num_preemptions > num_requests // 20
    gc.collect()
    # not isinstance, which asks proxies of other libraries for their class, and some of them warn
    num_left = sum(type(found) is Request for found in gc.get_objects())
    assert num_left < 100, "finished requests are kept alive"


def test_20_000_requests_are_all_answered_as_if_alone() -> None:
    soak(20_000, seed=1)


@pytest.mark.slow
def test_1_000_000_requests_are_all_answered_as_if_alone() -> None:
    soak(1_000_000, seed=2)
