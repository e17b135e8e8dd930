"""The profiler stands between core and runner for some steps, however these run, and leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.execution.profiler import StepProfiler
from tests.scheduling.harness import Harness


@pytest.mark.parametrize("overlaps", [False, True])
def test_so_many_steps_are_recorded_and_no_token_changes(tmp_path: Path, overlaps: bool) -> None:
    harness = Harness(overlaps=overlaps)
    harness.add([1, 2, 3], max_tokens=8, ignore_eos=True)
    profiler = StepProfiler(harness.core, str(tmp_path))
    told = profiler._start({"steps": 3})
    while harness.core.has_work:
        for output in harness.core.advance():
            harness._record(output)
    assert harness.core.runner is harness.runner
    harness.check_finished()
    events = json.loads((tmp_path / told["trace"]).read_text())["traceEvents"]
    names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert names == [("launch" if overlaps else "step") + " of 1 requests"] * 3
