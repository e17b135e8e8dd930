"""Records a few steps with torch's profiler, on an operator's order: a Chrome trace in a configured folder."""

from __future__ import annotations

import logging
import os
import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from engine.control import Controls, Payload
from engine.errors import Conflict, InvalidParameter, UnsupportedParameter
from engine.isolation import Launcher, Pending, Runner
from engine.scheduling.plan import StepPlan, StepResult

if TYPE_CHECKING:
    from engine.core import EngineCore

logger = logging.getLogger(__name__)

MAX_STEPS = 1000


class StepProfiler:
    """Stands between a core and its runner while it records. Offers `profile_start` and `profile_stop`."""

    def __init__(self, core: EngineCore, folder: str | None) -> None:
        self._core = core
        self._folder = folder
        self._runner: Runner = core.runner
        self._profile: torch.profiler.profile | None = None
        self._num_left = 0
        self._path = Path()

    def offer(self, controls: Controls) -> None:
        controls.add("profile_start", self._start)
        controls.add("profile_stop", self._stop)

    def execute(self, plan: StepPlan) -> StepResult:
        """As the runner, recorded."""
        with torch.profiler.record_function(f"step of {len(plan.chunks)} requests"):
            result = self._runner.execute(plan)
        self._count()
        return result

    def launch(self, plan: StepPlan) -> Pending | None:
        """As the runner, recorded as far as the host is concerned; what the device does is recorded as it happens."""
        with torch.profiler.record_function(f"launch of {len(plan.chunks)} requests"):
            pending = cast(Launcher, self._runner).launch(plan)
        if pending is not None:
            self._count()
        return pending

    def _count(self) -> None:
        self._num_left -= 1
        if self._num_left <= 0:
            self._finish()

    def _start(self, payload: Payload) -> Payload:
        if self._folder is None:
            raise UnsupportedParameter("profiling is off on this server; start it with --profile-folder")
        if self._profile is not None:
            raise Conflict("a profile is being recorded; wait for its end or POST /stop_profile")
        steps = payload.get("steps")
        if type(steps) is not int or not 1 <= steps <= MAX_STEPS:
            raise InvalidParameter(f"steps must be a whole number from 1 to {MAX_STEPS}", param="steps")
        folder = Path(self._folder)
        folder.mkdir(parents=True, exist_ok=True)
        name = f"kvasir-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{secrets.token_hex(4)}.json"
        self._path, self._num_left = folder / name, steps
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profile = torch.profiler.profile(activities=activities)
        self._profile.start()
        self._runner, self._core.runner = self._core.runner, self
        return {"trace": name, "steps": steps}

    def _stop(self, payload: Payload) -> Payload:
        if self._profile is None:
            return {"trace": None}
        self._finish()
        return {"trace": self._path.name}

    def _finish(self) -> None:
        assert self._profile is not None
        profile, self._profile = self._profile, None
        self._core.runner = self._runner
        profile.stop()
        profile.export_chrome_trace(str(self._path))
        logger.info("a profile was written to %s", self._path)
