"""Runs a plan so that one request whose forward raises does not take the others with it.

Source of the rule: halve the batch until the culprit is alone, give it an error, let the others continue. Works on
plans only: the scheduler learns about it as one chunk's error, when it commits.
"""

from __future__ import annotations

import logging
from typing import Protocol

from engine.errors import EngineDead, EngineError
from engine.scheduling.plan import ChunkResult, StepPlan, StepResult

logger = logging.getLogger(__name__)


class Runner(Protocol):
    """The data plane as the core sees it."""

    def execute(self, plan: StepPlan) -> StepResult:
        """Runs one step: one result per chunk, in order.

        May raise. It is then called again with parts of the same plan: applying an entry twice must change nothing,
        and no token may have been recorded. EngineDead means that the device is gone and trying again is useless.
        """
        ...


class Pending(Protocol):
    """A step that the device runs."""

    def result(self) -> StepResult:
        """As `Runner.execute` returns it; waits until the step is done. To be called once, oldest step first.

        Raises EngineDead when the device is gone.
        """
        ...


class Launcher(Runner, Protocol):
    """A data plane whose device computes while the host goes on."""

    def launch(self, plan: StepPlan) -> Pending | None:
        """Starts one step behind the one that runs, from whose tokens it may go on before the host knows them.

        None, with nothing applied, where a row of the plan needs the host before or after its token is chosen. May
        raise, or be followed by `execute` of the same plan: then the same holds as for that. No more than one other
        step may be pending.
        """
        ...


def execute_isolated(runner: Runner, plan: StepPlan) -> StepResult:
    """The results of the plan, with the error `internal_error` for chunks that raise on their own."""
    try:
        return runner.execute(plan)
    except EngineDead:
        raise
    except Exception as error:
        if len(plan.chunks) == 1:
            logger.exception("a request failed on its own; it is ended with an error, the others continue")
            return StepResult(chunks=(ChunkResult(error=EngineError.code),))
        name = type(error).__name__
        logger.warning("a step of %d requests raised %s; running it again in halves", len(plan.chunks), name)
    middle = len(plan.chunks) // 2
    first = execute_isolated(runner, part_of(plan, 0, middle))
    second = execute_isolated(runner, part_of(plan, middle, len(plan.chunks)))
    return StepResult(chunks=first.chunks + second.chunks, sampler_s=first.sampler_s + second.sampler_s)


def part_of(plan: StepPlan, start: int, stop: int) -> StepPlan:
    """The plan of chunks [start, stop), with what their rows need. The first part also frees the freed rows."""
    chunks = plan.chunks[start:stop]
    rows = {chunk.row for chunk in chunks}
    new_rows = tuple(new for new in plan.new_rows if new.row in rows)
    own_blocks = {block_id for new in new_rows for block_id in new.block_ids}
    return StepPlan(
        chunks=chunks,
        new_rows=new_rows,
        # rows freed in a later part could wipe a row that an earlier part has taken anew
        freed_rows=plan.freed_rows if start == 0 else (),
        table_edits=tuple(edit for edit in plan.table_edits if edit[0] in rows),
        block_copies=tuple(copy for copy in plan.block_copies if copy[1] in own_blocks),
    )
