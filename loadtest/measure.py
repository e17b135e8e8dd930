"""Measures endpoints level by level: at each level they take turns, round by round, until their throughput is known.

Timings of shared machines drift, ratios inside one round much less: ratios are medians over the rounds.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from loadtest.arrivals import ARRIVALS, Arrivals
from loadtest.client import Run, Target
from loadtest.load import Load, drive
from loadtest.report import Goals, Summary, summarize
from loadtest.timeline import INTERVAL_S, Timeline, watched
from loadtest.workloads import Conversation

ROUND_SEED, LEVEL_SEED, WARMUP_SEED = 1, 1000, 1_000_000

# figures that are compared; True where less is better
RATIOS: dict[str, tuple[Callable[[Summary], float], bool]] = {
    "output tok/s": (lambda s: s.output_tokens_per_s, False),
    "goodput req/s": (lambda s: s.goodput_requests_per_s, False),
    "TTFT p50": (lambda s: s.ttft_ms["p50"], True),
    "time per token p50": (lambda s: s.time_per_output_token_ms["p50"], True),
    "latency p50": (lambda s: s.latency_ms["p50"], True),
}


@dataclass(frozen=True)
class Endpoint:
    name: str
    target: Target


@dataclass(frozen=True, kw_only=True)
class Level:
    """One load: so many requests in flight, or arriving per second, or those of a trace."""

    concurrency: int | None = None
    rate: float | None = None
    num_requests: int

    @property
    def label(self) -> str:
        if self.concurrency is not None:
            return f"{self.concurrency} in flight"
        return "trace" if self.rate is None else f"{self.rate:g} req/s"

    @property
    def load(self) -> float:
        """Where it stands on the axis of a plot."""
        return float(self.concurrency or self.rate or 1)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """
    conversations  from a seed to what is sent
    arrivals       of an open loop: from a level and a seed to when conversations are due
    """

    conversations: Callable[[int], Iterator[Conversation]]
    arrivals: Callable[[Level, int], Arrivals] | None = None
    goals: Goals = field(default_factory=Goals)
    rounds: int = 1
    duration_s: float | None = None
    max_in_flight: int | None = None
    warmup: int = 0
    seed: int = 0
    interval_s: float = INTERVAL_S


@dataclass
class Cell:
    """One endpoint at one level."""

    endpoint: str
    level: Level
    rounds: list[Run] = field(default_factory=list)
    timelines: list[Timeline] = field(default_factory=list)  # of each round

    def run(self) -> Run:
        return sum(self.rounds[1:], start=self.rounds[0])


@dataclass(frozen=True)
class Ratio:
    """Above 1: better than the first endpoint. `least` and `most` are the extremes of the rounds."""

    endpoint: str
    level: str
    figure: str
    median: float
    least: float
    most: float
    rounds: int


def warm_up(endpoints: Sequence[Endpoint], plan: Plan) -> dict[str, Summary]:
    """Requests that are not measured, so that first calls are over. Their failures are in the summaries."""
    if not plan.warmup:
        return {}
    load = Load(num_requests=plan.warmup, duration_s=plan.duration_s)
    seed = plan.seed + WARMUP_SEED
    return {
        endpoint.name: summarize(asyncio.run(drive(endpoint.target, plan.conversations(seed), load)))
        for endpoint in endpoints
    }


def measure_level(endpoints: Sequence[Endpoint], level: Level, index: int, plan: Plan) -> list[Cell]:
    """All rounds of one level. A round sends every endpoint the same requests, which no other round or level does."""
    cells = [Cell(endpoint.name, level) for endpoint in endpoints]
    for number in range(plan.rounds):
        seed = plan.seed + index * LEVEL_SEED + number * ROUND_SEED
        for cell, endpoint in zip(cells, endpoints, strict=True):
            title = f"{endpoint.name}, {level.label}" + (f", round {number + 1}" if plan.rounds > 1 else "")
            with tqdm(total=level.num_requests, desc=title, unit="req", disable=None, leave=False) as bar:
                run, timeline = asyncio.run(_measure(endpoint, level, plan, seed, bar))
            cell.rounds.append(run)
            cell.timelines.append(timeline)
    return cells


async def _measure(endpoint: Endpoint, level: Level, plan: Plan, seed: int, bar: Any) -> tuple[Run, Timeline]:
    load = Load(
        num_requests=level.num_requests,
        concurrency=level.concurrency or plan.max_in_flight,
        arrivals=None if plan.arrivals is None else plan.arrivals(level, seed),
        duration_s=plan.duration_s,
    )
    async with watched(endpoint.target, plan.interval_s) as timeline:
        run = await drive(endpoint.target, plan.conversations(seed), load, progress=lambda record: bar.update())
    return run, timeline


def arrivals_of(process: str, turns: float) -> Callable[[Level, int], Arrivals]:
    """Arrivals of conversations of `turns` requests on average, so that requests come at a level's rate."""

    def arrivals(level: Level, seed: int) -> Arrivals:
        return ARRIVALS[process]((level.rate or 1.0) / turns, seed)

    return arrivals


def ratios(cells: Iterable[Cell], goals: Goals) -> list[Ratio]:
    """Every endpoint against the first one measured at all, at the levels that both have; a figure that is 0 anywhere
    has no ratio.
    """
    levels: dict[str, list[Cell]] = {}
    for cell in cells:
        levels.setdefault(cell.level.label, []).append(cell)
    base = next((group[0].endpoint for group in levels.values()), None)
    found = []
    for label, group in levels.items():
        if group[0].endpoint != base:
            continue  # a sweep goes on with the others when the first endpoint is saturated
        first = [summarize(run, goals) for run in group[0].rounds]
        for cell in group[1:]:
            pairs = list(zip(first, (summarize(run, goals) for run in cell.rounds), strict=True))
            for figure in RATIOS:
                values = [ratio for one, other in pairs if (ratio := figure_ratio(figure, one, other)) is not None]
                if len(values) == len(pairs):
                    middle = statistics.median(values)
                    found.append(Ratio(cell.endpoint, label, figure, middle, min(values), max(values), len(values)))
    return found


def figure_ratio(figure: str, first: Summary, other: Summary) -> float | None:
    """How many times better `other` is; None when either is 0."""
    read, is_less_better = RATIOS[figure]
    one, two = read(first), read(other)
    if not one or not two:
        return None
    return one / two if is_less_better else two / one
