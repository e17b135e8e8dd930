"""Steps planned while others run: the same answers as without, whatever ends, leaves or fails in between."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from engine.scheduling.scheduler import Scheduler
from tests.fakes import LateRunner
from tests.scheduling.harness import EOS, Harness
from tests.scheduling.test_metamorphic import answers, workload
from tests.scheduling.traffic import Traffic


def late_runner(harness: Harness) -> LateRunner:
    assert isinstance(harness.runner, LateRunner)
    return harness.runner


def stress(seeds: range, num_ticks: int) -> tuple[int, int]:
    """Random traffic in small pools, with aborts, deadlines and failures. Returns steps launched, and preemptions."""
    num_launched = num_preemptions = 0
    for seed, (num_blocks, block_size) in itertools.product(seeds, ((14, 4), (40, 2), (200, 4))):
        harness = Harness(
            num_blocks=num_blocks, block_size=block_size, max_model_len=48, max_num_batched_tokens=12, overlaps=True
        )
        traffic = Traffic(harness, seed)
        for _ in range(num_ticks):
            traffic.tick()
        harness.run(max_steps=2000)
        harness.check_finished()
        num_launched += late_runner(harness).num_launched
        num_preemptions += harness.scheduler.stats().num_preemptions
    return num_launched, num_preemptions


def test_random_traffic_is_answered_as_if_every_request_were_alone() -> None:
    num_launched, num_preemptions = stress(range(4), 150)
    assert num_launched > 500, "the mix leaves hardly any step to overlap"
    assert num_preemptions > 20


@pytest.mark.slow
def test_much_random_traffic_is_answered_as_if_every_request_were_alone() -> None:
    stress(range(100, 160), 600)


@pytest.mark.parametrize("options", [{}, {"num_blocks": 20}, {"max_num_batched_tokens": 9}, {"max_num_seqs": 3}])
def test_answers_are_those_of_steps_one_by_one(options: dict[str, Any]) -> None:
    requests = workload(seed=5)
    options = {"num_blocks": 500, "max_num_seqs": 16, **options}
    assert answers(requests, overlaps=True, **options)[0] == answers(requests, **options)[0]


def decoding(num_requests: int, **options: Any) -> Harness:
    """Requests of which the next plan is launched already."""
    harness = Harness(overlaps=True, num_blocks=200)
    for i in range(num_requests):
        harness.add([10 + i] * 5, ignore_eos=True, **options)
    harness.step()
    harness.step()
    return harness


def test_every_step_of_plain_rows_is_launched_before_the_last_one_is_done() -> None:
    harness = decoding(3, max_tokens=10)
    harness.run()
    harness.check_finished()
    runner = late_runner(harness)
    assert runner.num_launched == 10
    assert harness.num_steps == 10, "no step more than one by one"


def test_a_request_that_has_its_tokens_has_no_part_in_the_next_step() -> None:
    harness = decoding(1, max_tokens=6)
    harness.add([40] * 5, max_tokens=12, ignore_eos=True)
    harness.run()
    rows = [len(plan.chunks) for plan in harness.runner.plans]
    assert sum(rows) == 6 + 12


def test_what_is_computed_behind_an_end_is_thrown_away() -> None:
    harness = Harness(overlaps=True, num_blocks=200)
    harness.runner.scripts = {("stops", 0): [5, 6, EOS, 8, 9]}
    harness.add([1] * 5, "stops", max_tokens=9)
    harness.add([2] * 5, "other", max_tokens=9, ignore_eos=True)
    harness.run()
    assert harness.tokens("stops") == [5, 6, EOS]
    computed = sum(len(plan.chunks) for plan in harness.runner.plans)
    assert computed == 3 + 9 + 1, "one step behind the end was in flight"
    harness.check_finished()


def test_blocks_of_a_request_stay_until_the_step_behind_its_end_is_done() -> None:
    harness = Harness(overlaps=True, num_blocks=200)
    harness.runner.scripts = {("stops", 0): [5, EOS, 8]}
    harness.add([1] * 5, "stops", max_tokens=9)
    harness.step()
    harness.step()
    assert harness.streams["stops", 0].final is not None
    assert harness.scheduler.left_in_flight
    assert harness.core.has_work
    harness.run()
    assert not harness.scheduler.left_in_flight
    harness.check_finished()


def test_an_abort_while_two_steps_are_in_flight_takes_effect_at_once() -> None:
    harness = decoding(2, max_tokens=10)
    harness.step(while_running=lambda: harness.abort("r0"))
    harness.run()
    harness.check_finished()


def test_new_requests_join_a_step_that_is_planned_ahead() -> None:
    harness = decoding(2, max_tokens=12)
    harness.add([30] * 40, "late", max_tokens=4, ignore_eos=True)
    harness.run()
    harness.check_finished()
    assert late_runner(harness).num_launched == len(harness.runner.plans)


def test_rows_that_need_the_host_run_one_step_at_a_time() -> None:
    harness = decoding(1, max_tokens=12, logprobs=0)
    assert late_runner(harness).num_launched == 0
    harness.run()
    harness.check_finished()


def test_a_row_that_needs_the_host_stops_the_overlap_only_while_it_runs() -> None:
    harness = decoding(1, max_tokens=20)
    harness.add([30] * 5, max_tokens=4, logprobs=0)
    before = late_runner(harness).num_launched
    harness.run()
    harness.check_finished()
    num_launched = late_runner(harness).num_launched - before
    assert 8 < num_launched < 16


def test_a_failing_request_ends_alone_and_no_token_of_the_others_is_lost() -> None:
    harness = decoding(3, max_tokens=12)
    late_runner(harness).fail_ids.add("r1")
    harness.run()
    harness.check_finished()
    assert harness.streams["r1", 0].final is not None
    assert harness.streams["r1", 0].final.error == "internal_error"


def test_numbers_that_are_not_finite_end_their_request_one_step_later() -> None:
    harness = decoding(3, max_tokens=12)
    late_runner(harness).nan_ids.add("r1")
    harness.run()
    harness.check_finished()
    assert harness.streams["r1", 0].final is not None
    assert harness.streams["r1", 0].final.error == "numerical_error"


def test_memory_that_runs_short_is_settled_one_step_at_a_time() -> None:
    harness = Harness(overlaps=True, num_blocks=14, max_model_len=48, max_num_batched_tokens=12)
    for i in range(6):
        harness.add([10 + i] * 9, max_tokens=24, ignore_eos=True)
    harness.run()
    harness.check_finished()
    assert harness.scheduler.stats().num_preemptions
    assert late_runner(harness).num_launched


class TestPlantedBugs:
    """What would go wrong without a rule is seen."""

    def test_tokens_that_are_not_known_are_not_sent(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Scheduler, "_may_preempt", lambda self: False)
        with pytest.raises(AssertionError):
            stress(range(4), 150)

    def test_a_request_that_ends_keeps_its_blocks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        original = Scheduler._leave

        def leave(self: Scheduler, request: Any) -> None:
            steps, self._in_flight = self._in_flight, type(self._in_flight)()
            original(self, request)
            self._in_flight = steps

        monkeypatch.setattr(Scheduler, "_leave", leave)
        with pytest.raises(AssertionError):
            stress(range(2), 150)
