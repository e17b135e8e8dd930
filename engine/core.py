"""EngineCore: the main loop of the engine. Knows no HTTP, no text, no tensors."""

from __future__ import annotations

import time
from collections import deque

import msgspec

from engine.control import Controls
from engine.isolation import Runner, execute_isolated
from engine.scheduling.plan import StepPlan, StepResult
from engine.scheduling.scheduler import Scheduler
from engine.speculation.manager import Speculation
from engine.types import EngineRequest, EngineStats, TokenOutput

# Timings kept between two calls of `stats`; older ones are dropped when nobody asks.
MAX_TIMINGS = 4096


class EngineCore:
    """Requests in, token outputs out, one step at a time. Not thread-safe: one thread calls everything."""

    def __init__(self, scheduler: Scheduler, runner: Runner, speculation: Speculation | None = None) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.speculation = speculation
        self.controls = Controls()  # what operators may do between two steps; `engine.launch` fills it
        self.started: list[str] = []  # requests that began to run in the last step
        self._num_steps = {"prefill": 0, "decode": 0, "mixed": 0}
        self._step_seconds: deque[tuple[str, float, int, int]] = deque(maxlen=MAX_TIMINGS)
        self._scheduler_seconds: deque[float] = deque(maxlen=MAX_TIMINGS)
        self._sampler_seconds: deque[float] = deque(maxlen=MAX_TIMINGS)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def add(self, request: EngineRequest) -> None:
        """Accepts a request. Raises RequestError or CapacityError; nothing has changed then."""
        self.scheduler.add(request)

    def abort(self, request_id: str, choice: int | None = None) -> None:
        """Ends a request, or one choice of it, without further output. Unknown and finished ones are ignored."""
        self.scheduler.abort(request_id, choice)
        if self.speculation is not None:
            self.speculation.forget()

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
            self.speculation.time_step(plan, committed - started)
            self.speculation.follow(self.scheduler.progress)
            self.speculation.guess(self.scheduler.roster.running)  # what the next step will check besides
        guessed = time.perf_counter()
        self.started = [new.request_id for new in plan.new_rows]
        if plan.chunks:
            self._record(plan, result, scheduled - started + committed - executed, guessed - started)
        return outputs

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
