"""Raises the load until a server is saturated: goodput falls, latency explodes, or offered load is not kept up with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from loadtest.measure import Cell, Endpoint, Level, Plan, measure_level
from loadtest.report import Goals, Summary, summarize

FALL = 0.9  # of the best goodput so far
EXPLOSION = 10.0  # times the least p90 of the time to first token
KEPT_UP = 0.8  # of the offered rate
MAX_FAILED = 0.05  # of the requests
REFINEMENTS = 2

MakeLevel = Callable[[float], Level]


def saturation(levels: Sequence[tuple[Level, Summary]]) -> str | None:
    """Why the last level is beyond what the server can do; None while it is not."""
    level, last = levels[-1]
    if last.failed > MAX_FAILED * last.requests:
        return f"{last.failed} of {last.requests} requests failed"
    if level.rate is not None and last.requests_per_s < KEPT_UP * level.rate:
        return f"{last.requests_per_s:.2f} of {level.rate:g} requests a second were answered"
    if len(levels) == 1:
        return None
    best = max(summary.goodput_requests_per_s for _, summary in levels[:-1])
    if last.goodput_requests_per_s < FALL * best:
        return f"goodput fell from {best:.2f} to {last.goodput_requests_per_s:.2f} requests a second"
    least = min(summary.ttft_ms["p90"] for _, summary in levels[:-1])
    if level.rate is not None and last.ttft_ms["p90"] > EXPLOSION * least > 0:
        return f"time to first token (p90) rose from {least:.0f} to {last.ttft_ms['p90']:.0f} ms"
    return None


def sweep(
    endpoint: Endpoint, plan: Plan, make: MakeLevel, start: float, max_levels: int, *, report: Callable[[Cell], None]
) -> tuple[list[Cell], str]:
    """Doubles the load until saturation; of rates, then tries some between the last good and the first bad one.

    Returns the cells in order of load, and why it ended.
    """
    cells: list[Cell] = []
    good, bad, reason = 0.0, 0.0, None
    value = start
    while len(cells) < max_levels and reason is None:
        cells += measure_level([endpoint], make(value), len(cells), plan)
        report(cells[-1])
        reason = saturation([(cell.level, summarize(cell.run(), plan.goals)) for cell in cells])
        good, bad = (value, bad) if reason is None else (good, value)
        value *= 2
    is_refined = bool(good and bad) and cells[0].level.rate is not None
    for _ in range(min(REFINEMENTS, max_levels - len(cells)) if is_refined else 0):
        middle = round((good + bad) / 2, 2)
        cells += measure_level([endpoint], make(middle), len(cells), plan)
        report(cells[-1])
        below = [cell for cell in cells if cell.level.load <= good] + cells[-1:]
        is_good = saturation([(cell.level, summarize(cell.run(), plan.goals)) for cell in below]) is None
        good, bad = (middle, bad) if is_good else (good, middle)
    cells.sort(key=lambda cell: cell.level.load)
    return cells, reason or f"{max_levels} levels are the most (--max-levels)"


def best(cells: Sequence[Cell], goals: Goals) -> Cell:
    """The level with the highest goodput."""
    return max(cells, key=lambda cell: summarize(cell.run(), goals).goodput_requests_per_s)
