"""EngineCore: the main loop of the engine. Knows no HTTP, no text, no tensors."""

from __future__ import annotations

import logging
import time
from collections import deque
from typing import cast

import msgspec

from engine.control import Controls
from engine.errors import EngineDead
from engine.isolation import Launcher, Pending, Runner, execute_isolated
from engine.scheduling.plan import StepPlan, StepResult
from engine.scheduling.scheduler import Scheduler
from engine.speculation.manager import Speculation
from engine.types import EngineRequest, EngineStats, TokenOutput

logger = logging.getLogger(__name__)

# Timings kept between two calls of `stats`; older ones are dropped when nobody asks.
MAX_TIMINGS = 4096


class EngineCore:
    """Requests in, token outputs out, one step at a time. Not thread-safe: one thread calls everything."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        speculation: Speculation | None = None,
        *,
        overlaps: bool = False,
    ) -> None:
        """overlaps: `advance` plans a step while another one runs; the runner is a Launcher then."""
        self.scheduler = scheduler
        self.runner = runner
        self.speculation = speculation
        self.overlaps = overlaps
        self._ahead: tuple[StepPlan, Pending | None] | None = None  # the plan made while another one ran
        self.controls = Controls()  # what operators may do between two steps; `engine.launch` fills it
        self.started: list[str] = []  # requests that began to run in the last step
        self._num_steps = {"prefill": 0, "decode": 0, "mixed": 0}
        self._step_seconds: deque[tuple[str, float, int, int]] = deque(maxlen=MAX_TIMINGS)
        self._scheduler_seconds: deque[float] = deque(maxlen=MAX_TIMINGS)
        self._sampler_seconds: deque[float] = deque(maxlen=MAX_TIMINGS)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self._ahead is not None

    def add(self, request: EngineRequest) -> None:
        """Accepts a request. Raises RequestError or CapacityError; nothing has changed then."""
        self.scheduler.add(request)

    def abort(self, request_id: str, choice: int | None = None) -> None:
        """Ends a request, or one choice of it, without further output. Unknown and finished ones are ignored."""
        self.scheduler.abort(request_id, choice)
        if self.speculation is not None:
            self.speculation.forget()

    def advance(self) -> list[TokenOutput]:
        """One step, in the way of this core: by `step` or by `step_overlapped`, with the same outputs."""
        return self.step_overlapped() if self.overlaps else self.step()

    def step(self) -> list[TokenOutput]:
        """Runs one step. Raises EngineDead when the device is gone; any other failure ends only its own request."""
        started = time.perf_counter()
        plan = self.scheduler.schedule()  # who runs, how many tokens, which blocks
        scheduled = time.perf_counter()
        result = execute_isolated(self.runner, plan) if plan.chunks else StepResult()  # forward, sample
        executed = time.perf_counter()
        outputs = self.scheduler.commit(plan, result)  # append ids, publish blocks, free the finished
        committed = time.perf_counter()
        if self.speculation is not None:
            # what the next step will check besides
            self.speculation.advance(plan, committed - started, self.scheduler.progress, self.scheduler.roster.running)
        guessed = time.perf_counter()
        self.started = [new.request_id for new in plan.new_rows]
        if plan.chunks:
            self._record(plan, result, scheduled - started + committed - executed, guessed - started)
        return outputs

    def step_overlapped(self) -> list[TokenOutput]:
        """`step`, but while the device runs a plan, the next one is made and queued behind it: before tokens are known.

        Where that cannot be, because a row needs the host between two tokens, it is what `step` does.
        """
        started = time.perf_counter()
        plan, pending = self._ahead or self._launch(self.scheduler.schedule())
        ahead = None if pending is None else self.scheduler.schedule_ahead()
        self._ahead = None if ahead is None else self._launch(ahead)
        planned = time.perf_counter()
        if pending is not None:
            result = pending.result()
        else:
            result = execute_isolated(self.runner, plan) if plan.chunks else StepResult()
        executed = time.perf_counter()
        outputs = self.scheduler.commit(plan, result)
        committed = time.perf_counter()
        if self.speculation is not None and self._ahead is None:
            self.speculation.advance(plan, committed - started, self.scheduler.progress, self.scheduler.roster.running)
        self.started = [new.request_id for new in plan.new_rows]
        if plan.chunks:
            self._record(plan, result, planned - started + committed - executed, time.perf_counter() - started)
        return outputs

    def _launch(self, plan: StepPlan) -> tuple[StepPlan, Pending | None]:
        """The plan, and its run on the device; None when it must be executed instead."""
        if not plan.chunks:
            return plan, None
        try:
            return plan, cast(Launcher, self.runner).launch(plan)
        except EngineDead:
            raise
        except Exception as error:  # whose fault it is shows when it is executed in parts
            logger.warning("a step of %d requests raised %s when started", len(plan.chunks), type(error).__name__)
            return plan, None

    def stats(self) -> EngineStats:
        """Counters and gauges, and the timings of the steps since the last call."""
        stats = msgspec.structs.replace(
            self.scheduler.stats(),
            num_steps=dict(self._num_steps),
            step_seconds=list(self._step_seconds),
            scheduler_seconds=list(self._scheduler_seconds),
            sampler_seconds=list(self._sampler_seconds),
        )
        for timings in (self._step_seconds, self._scheduler_seconds, self._sampler_seconds):
            timings.clear()
        return stats if self.speculation is None else self.speculation.add_to(stats)

    def _record(self, plan: StepPlan, result: StepResult, scheduler_s: float, step_s: float) -> None:
        kind = plan.kind
        self._num_steps[kind] += 1
        self._step_seconds.append((kind, step_s, plan.num_tokens, len(plan.chunks)))
        self._scheduler_seconds.append(scheduler_s)
        self._sampler_seconds.append(result.sampler_s)
