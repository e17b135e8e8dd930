"""What a server says about itself during a run: batch size, queue and cache blocks, sampled from its /metrics."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from loadtest.client import Target, connect

INTERVAL_S = 0.5
SCRAPE_TIMEOUT_S = 5.0

# series of the timeline -> names in the exposition of Kvasir, vLLM and llama.cpp; a state is matched inside the labels
GAUGES: dict[str, tuple[tuple[str, str], ...]] = {
    "running": (
        ("kvasir_requests_running", ""),
        ("vllm:num_requests_running", ""),
        ("llamacpp:requests_processing", ""),
    ),
    "waiting": (
        ("kvasir_requests_waiting", ""),
        ("vllm:num_requests_waiting", ""),
        ("llamacpp:requests_deferred", ""),
    ),
    "blocks in use": (("kvasir_kv_blocks", 'state="active"'),),
    "blocks kept": (("kvasir_kv_blocks", 'state="cached"'),),
    "cache in use": (("kvasir_kv_cache_usage_ratio", ""), ("vllm:kv_cache_usage_perc", "")),
}
# mean rows of a step since the last sample, from the sum and count of a histogram
STEP_ROWS = "kvasir_engine_step_requests"


@dataclass
class Timeline:
    """`series[name][i]` belongs to `times_s[i]`, seconds after the start; None where the server did not say."""

    times_s: list[float] = field(default_factory=list)
    series: dict[str, list[float | None]] = field(default_factory=dict)
    note: str | None = None  # why there is none, or not all of it

    def to_json(self) -> dict[str, Any]:
        return {"times_s": [round(at, 3) for at in self.times_s], "series": self.series, "note": self.note}


@contextlib.asynccontextmanager
async def watched(target: Target, interval_s: float = INTERVAL_S) -> AsyncIterator[Timeline]:
    """Samples while the block runs; without metrics the timeline's note says so, and nothing else happens."""
    timeline = Timeline(note=None if interval_s else "not asked for")
    if not interval_s:
        yield timeline
        return
    task = asyncio.create_task(_sample(target, interval_s, timeline))
    try:
        yield timeline
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _sample(target: Target, interval_s: float, timeline: Timeline) -> None:
    started = time.perf_counter()
    rows_before = (0.0, 0.0)
    async with connect(target) as http:
        while True:
            try:
                response = await http.get("/metrics", timeout=SCRAPE_TIMEOUT_S)
                response.raise_for_status()
            except httpx.HTTPError as error:
                timeline.note = f"/metrics: {type(error).__name__} {error}".strip()
                return
            found = read_gauges(response.text)
            rows = read_rows(response.text)
            if rows is not None:
                if timeline.times_s:
                    steps = rows[1] - rows_before[1]
                    found["batch size"] = (rows[0] - rows_before[0]) / steps if steps else 0.0
                rows_before = rows
            _append(timeline, time.perf_counter() - started, found)
            await asyncio.sleep(interval_s)


def read_gauges(text: str) -> dict[str, float]:
    """The series that an exposition has, summed over labels."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        name = line.partition("{")[0].partition(" ")[0]
        for series, sources in GAUGES.items():
            if any(name == known and state in line for known, state in sources):
                found[series] = found.get(series, 0.0) + float(line.rsplit(" ", 1)[1])
    return found


def read_rows(text: str) -> tuple[float, float] | None:
    """Rows and steps so far, when the server counts them."""
    totals: dict[str, float] = {}
    for line in text.splitlines():
        for part in ("_sum", "_count"):
            if line.startswith(STEP_ROWS + part):
                totals[part] = totals.get(part, 0.0) + float(line.rsplit(" ", 1)[1])
    return (totals["_sum"], totals["_count"]) if len(totals) == 2 else None


def _append(timeline: Timeline, at_s: float, found: dict[str, float]) -> None:
    for name in found:
        timeline.series.setdefault(name, [None] * len(timeline.times_s))
    timeline.times_s.append(at_s)
    for name, values in timeline.series.items():
        values.append(found.get(name))
