"""Raises the load until a server is saturated: goodput falls, latency explodes, or offered load is not kept up with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

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


@dataclass
class Climb:
    """How far one endpoint has been taken. `cells` are in the order in which they were measured."""

    endpoint: Endpoint
    cells: list[Cell] = field(default_factory=list)
    good: float = 0.0  # the highest load that it kept up with
    bad: float = 0.0  # the lowest that it did not
    reason: str | None = None

    def add(self, cell: Cell, goals: Goals) -> None:
        self.cells.append(cell)
        below = [other for other in self.cells if other.level.load <= self.good]
        reason = saturation([(one.level, summarize(one.run(), goals)) for one in [*below, cell]])
        if reason is None:
            self.good = cell.level.load
        else:
            self.bad = cell.level.load
            self.reason = self.reason or reason


def sweep(
    endpoints: Sequence[Endpoint],
    plan: Plan,
    make: MakeLevel,
    start: float,
    max_levels: int,
    *,
    report: Callable[[Cell], None],
) -> tuple[list[Cell], dict[str, str]]:
    """Doubles the load of all endpoints, which take turns at each level, until each is saturated; of rates, then tries
    for each by itself some between the last good and the first bad one.

    Returns the cells in order of load, and for each endpoint why it ended.
    """
    climbs = [Climb(endpoint) for endpoint in endpoints]
    value = start
    for index in range(max_levels):
        going = [climb for climb in climbs if climb.reason is None]
        if not going:
            break
        _measure(going, make(value), index, plan, report)
        value *= 2
    for climb in climbs:
        is_refined = bool(climb.good and climb.bad) and climb.cells[0].level.rate is not None
        for _ in range(min(REFINEMENTS, max_levels - len(climb.cells)) if is_refined else 0):
            middle = round((climb.good + climb.bad) / 2, 2)
            _measure([climb], make(middle), max_levels + len(climb.cells), plan, report)
    cells = sorted((cell for climb in climbs for cell in climb.cells), key=lambda cell: cell.level.load)
    enough = f"{max_levels} levels are the most (--max-levels)"
    return cells, {climb.endpoint.name: climb.reason or enough for climb in climbs}


def _measure(climbs: Sequence[Climb], level: Level, index: int, plan: Plan, report: Callable[[Cell], None]) -> None:
    cells = measure_level([climb.endpoint for climb in climbs], level, index, plan)
    for climb, cell in zip(climbs, cells, strict=True):
        report(cell)
        climb.add(cell, plan.goals)


def best(cells: Sequence[Cell], goals: Goals) -> Cell:
    """The level with the highest goodput."""
    return max(cells, key=lambda cell: summarize(cell.run(), goals).goodput_requests_per_s)
