"""EngineCore: the loop, its timings, and one failing request among others."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from engine.config import CacheConfig, SchedulerConfig
from engine.core import MAX_TIMINGS, EngineCore
from engine.errors import EngineDead, PromptTooLong, QueueFull
from engine.isolation import execute_isolated, part_of
from engine.scheduling.invariants import check_invariants
from engine.scheduling.plan import Chunk, NewRow, StepPlan, StepResult
from engine.scheduling.scheduler import Scheduler
from engine.types import EngineRequest, SamplingParams, TokenOutput
from tests.fakes import FakeRunner


def make_core(runner: FakeRunner | None = None, **limits: int) -> EngineCore:
    scheduler = Scheduler(
        SchedulerConfig(**{"max_num_seqs": 8, "max_num_batched_tokens": 32, **limits}),
        CacheConfig(block_size=4),
        num_blocks=64,
        max_model_len=64,
    )
    return EngineCore(scheduler, runner or FakeRunner(4))


def request(request_id: str, length: int = 6, **options: int) -> EngineRequest:
    num_choices = options.pop("num_choices", 1)
    return EngineRequest(
        request_id=request_id,
        prompt_token_ids=[hash_of(request_id) + i for i in range(length)],
        sampling=SamplingParams(temperature=0.0, **{"max_tokens": 5, **options}),
        num_choices=num_choices,
    )


def hash_of(request_id: str) -> int:
    return sum(map(ord, request_id)) % 40


def run(core: EngineCore) -> dict[str, list[TokenOutput]]:
    seen: dict[str, list[TokenOutput]] = {}
    while core.has_work:
        for output in core.step():
            seen.setdefault(output.request_id, []).append(output)
        check_invariants(core.scheduler)
    return seen


def test_a_request_yields_its_tokens_and_one_end() -> None:
    core = make_core()
    assert not core.has_work
    core.add(request("a"))
    assert core.has_work
    outputs = run(core)["a"]
    assert [len(output.token_ids) for output in outputs] == [1] * 5
    assert [output.finish_reason for output in outputs] == [None] * 4 + ["length"]
    assert core.step() == []


def test_refusals_are_raised_to_the_caller_and_change_nothing() -> None:
    core = make_core(max_num_seqs=1, max_waiting_requests=0)
    with pytest.raises(PromptTooLong):
        core.add(request("long", length=64))
    core.add(request("a"))
    with pytest.raises(QueueFull):
        core.add(request("b"))
    assert list(run(core)) == ["a"]


def test_an_aborted_request_yields_nothing_more() -> None:
    core = make_core()
    core.add(request("a"))
    core.add(request("b", num_choices=2))
    core.step()
    core.abort("a")
    core.abort("b", 1)
    core.abort("unknown")
    seen = run(core)
    assert "a" not in seen
    assert {output.choice for output in seen["b"]} == {0}


def test_timings_are_reported_once_and_counters_keep_growing() -> None:
    core = make_core()
    core.add(request("a", length=40))
    run(core)
    stats = core.stats()
    assert stats.num_steps == {"prefill": 2, "decode": 4, "mixed": 0}
    assert [(kind, tokens, requests) for kind, _, tokens, requests in stats.step_seconds][:3] == [
        ("prefill", 32, 1),
        ("prefill", 8, 1),
        ("decode", 1, 1),
    ]
    assert len(stats.scheduler_seconds) == len(stats.sampler_seconds) == len(stats.step_seconds) == 6
    assert all(seconds > 0 for _, seconds, _, _ in stats.step_seconds)
    again = core.stats()
    assert again.step_seconds == again.scheduler_seconds == again.sampler_seconds == []
    assert (again.num_steps, again.generation_tokens) == (stats.num_steps, 5)


def test_timings_nobody_asks_for_do_not_pile_up() -> None:
    core = make_core()
    core._step_seconds.extend([("decode", 0.0, 1, 1)] * (MAX_TIMINGS + 5))
    assert len(core.stats().step_seconds) == MAX_TIMINGS


@pytest.mark.parametrize("culprits", [{"r0"}, {"r3"}, {"r6"}, {"r1", "r2"}, {f"r{i}" for i in range(7)}])
def test_a_request_that_raises_ends_alone(culprits: set[str]) -> None:
    healthy = make_core()
    for i in range(7):
        healthy.add(request(f"r{i}", num_choices=1 + i % 2))
    expected = run(healthy)

    runner = FakeRunner(4)
    runner.fail_ids = culprits
    core = make_core(runner)
    for i in range(7):
        core.add(request(f"r{i}", num_choices=1 + i % 2))
    seen = run(core)
    assert set(seen) == set(expected)
    for request_id, outputs in seen.items():
        if request_id in culprits:
            assert {(o.finish_reason, o.error) for o in outputs} == {("error", "internal_error")}
        else:
            assert by_choice(outputs) == by_choice(expected[request_id])


def by_choice(outputs: list[TokenOutput]) -> dict[int, list[int]]:
    tokens: dict[int, list[int]] = {}
    for output in outputs:
        tokens.setdefault(output.choice, []).extend(output.token_ids)
    return tokens


def test_a_request_that_fails_in_the_middle_ends_with_the_tokens_it_has() -> None:
    core = make_core()
    core.add(request("good", max_tokens=10))
    core.add(request("bad", max_tokens=10))
    core.step()
    core.step()
    core.runner.fail_ids.add("bad")
    seen = run(core)
    assert (seen["bad"][-1].error, seen["bad"][-1].token_ids) == ("internal_error", [])
    assert len(seen["good"]) == 8


def test_failing_costs_a_logarithmic_number_of_extra_runs() -> None:
    calls = count_calls(runner := FakeRunner(4))
    runner.fail_ids = {"r5"}
    core = make_core(runner)
    for i in range(8):
        core.add(request(f"r{i}", length=4))
    core.step()
    assert len(calls) == 1 + 2 * 3


def count_calls(runner: FakeRunner) -> list[StepPlan]:
    calls: list[StepPlan] = []
    execute: Callable[[StepPlan], StepResult] = runner.execute

    def counted(plan: StepPlan) -> StepResult:
        calls.append(plan)
        return execute(plan)

    runner.execute = counted  # type: ignore[method-assign]
    return calls


def test_a_dead_device_is_not_taken_for_a_bad_request() -> None:
    class DeadRunner(FakeRunner):
        def execute(self, plan: StepPlan) -> StepResult:
            raise EngineDead("the device is gone")

    core = make_core(DeadRunner(4))
    core.add(request("a"))
    core.add(request("b"))
    with pytest.raises(EngineDead):
        core.step()


def plan_of_rows(*rows: int) -> StepPlan:
    """Rows freed and taken again, with one edit and one copy per row."""
    return StepPlan(
        chunks=tuple(Chunk(row, 4, 1, (), is_sampling=True, output_index=0) for row in rows),
        new_rows=tuple(NewRow(row, f"r{row}", 0, [1] * 5, 5, SamplingParams(), (10 + row,), 4) for row in rows),
        freed_rows=rows,
        table_edits=tuple((row, 0, 10 + row) for row in rows),
        block_copies=tuple((30, 10 + row) for row in rows),
    )


def test_a_part_of_a_plan_has_what_its_rows_need_and_no_more() -> None:
    plan = plan_of_rows(0, 1, 2)
    first, second = part_of(plan, 0, 1), part_of(plan, 1, 3)
    assert [chunk.row for chunk in second.chunks] == [1, 2]
    assert [new.row for new in second.new_rows] == [1, 2]
    assert second.table_edits == plan.table_edits[1:]
    assert second.block_copies == plan.block_copies[1:]
    # a row freed later would wipe what an earlier part put there
    assert (first.freed_rows, second.freed_rows) == ((0, 1, 2), ())
    assert part_of(plan, 0, 3) == plan


def test_results_of_parts_come_back_in_the_order_of_the_plan() -> None:
    runner = FakeRunner(4)
    core = make_core(runner)
    for i in range(5):
        core.add(request(f"r{i}", length=3 + i))
    plan = core.scheduler.schedule()
    alone = FakeRunner(4).execute(plan)
    runner.fail_ids = {"r2"}
    result = execute_isolated(runner, plan)
    assert result.chunks[2].error == "internal_error"
    assert [chunk for i, chunk in enumerate(result.chunks) if i != 2] == [
        chunk for i, chunk in enumerate(alone.chunks) if i != 2
    ]
