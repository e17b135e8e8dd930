"""What a step costs depends on its rows, not on how long their contexts are or how many requests wait.

Counted in executed lines of Python, not in seconds: exact, and independent of the machine.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

from engine.scheduling.plan import ChunkResult, StepPlan, StepResult
from tests.fakes import FakeRunner
from tests.scheduling.harness import Harness


class Lines:
    """Counts executed lines of the scheduling package while active. C code counts as the line that calls it."""

    count = 0

    def __enter__(self) -> Lines:
        sys.settrace(self._trace)
        return self

    def __exit__(self, *exception: object) -> None:
        sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if "scheduling" not in frame.f_code.co_filename:
            return None
        self.count += event == "line"
        return self._trace


class EchoRunner(FakeRunner):
    """Answers every sampling chunk with token 1: its cost does not blur the measurement."""

    def execute(self, plan: StepPlan) -> StepResult:
        return StepResult(
            chunks=tuple([ChunkResult(token_ids=(1,) if chunk.is_sampling else ()) for chunk in plan.chunks])
        )


def decoding(num_rows: int, context: int, num_waiting: int = 0) -> Harness:
    """A scheduler with so many rows past their prompts, and so many requests that find no row."""
    block_size = 16
    harness = Harness(
        num_blocks=num_rows * (context // block_size + 20),
        block_size=block_size,
        max_model_len=context + 1000,
        strict=False,
        runner=EchoRunner(block_size),
        max_num_seqs=num_rows,
        max_num_batched_tokens=1 << 20,
        max_waiting_requests=1 << 20,
        max_waiting_pools=1e9,
    )
    for i in range(num_rows + num_waiting):
        harness.add([i % 50_000, *range(context - 1)], max_tokens=900, ignore_eos=True, tenant=f"t{i % 7}")
    harness.step()
    return harness


def lines_per_step(harness: Harness, num_steps: int = 64) -> float:
    """Averaged over enough steps that every row crosses some block borders."""
    with Lines() as lines:
        for _ in range(num_steps):
            plan = harness.scheduler.schedule()
            harness.scheduler.commit(plan, harness.runner.execute(plan))
    return lines.count / num_steps


def test_a_step_does_not_get_dearer_with_the_context() -> None:
    short, long = (lines_per_step(decoding(8, context)) for context in (100, 3000))
    assert long <= 1.02 * short


def test_a_step_does_not_get_dearer_with_the_queue() -> None:
    empty, full = (lines_per_step(decoding(8, 50, num_waiting)) for num_waiting in (0, 2000))
    assert full <= 1.05 * empty + 10


def test_a_step_gets_dearer_in_proportion_to_its_rows() -> None:
    few, many = (lines_per_step(decoding(num_rows, 50)) for num_rows in (8, 64))
    assert 6 <= many / few <= 9


def test_plans_do_not_carry_block_tables() -> None:
    harness = decoding(4, 1000)
    for _ in range(40):
        plan = harness.scheduler.schedule()
        harness.scheduler.commit(plan, harness.runner.execute(plan))
        assert plan.new_rows == ()
        assert all(len(chunk.new_block_ids) <= 1 for chunk in plan.chunks)


def test_a_head_of_the_queue_that_does_not_fit_costs_little_however_long_it_is() -> None:
    costs = []
    for context in (400, 6400):
        block_size = 16
        harness = Harness(
            num_blocks=2 * context // block_size,
            block_size=block_size,
            max_model_len=2 * context,
            strict=False,
            runner=EchoRunner(block_size),
            max_num_batched_tokens=1 << 20,
        )
        for start in (0, 1):
            harness.add(range(start, start + context), max_tokens=context // 4, ignore_eos=True)
            harness.step()
        assert harness.scheduler.roster.num_waiting == 1
        costs.append(lines_per_step(harness, 50))
    assert costs[1] <= 1.2 * costs[0]
