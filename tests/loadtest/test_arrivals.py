"""Arrival processes have the rate that was asked for and the spread that their names promise."""

from __future__ import annotations

import statistics
from itertools import islice, pairwise

import pytest

from loadtest.arrivals import ARRIVALS, BURSTINESS, OFF_S, ON_S, on_off, recorded

RATE = 5.0


def gaps(name: str, count: int = 8000) -> list[float]:
    times = [0.0, *islice(ARRIVALS[name](RATE, 7), count)]
    return [later - earlier for earlier, later in pairwise(times)]


@pytest.mark.parametrize(("name", "variation"), [("constant", 0.0), ("poisson", 1.0), ("gamma", BURSTINESS**-0.5)])
def test_gaps_have_the_mean_of_the_rate_and_their_variation(name: str, variation: float) -> None:
    found = gaps(name)
    mean = statistics.mean(found)
    assert min(found) >= 0
    assert mean == pytest.approx(1 / RATE, rel=0.05)
    assert statistics.pstdev(found) / mean == pytest.approx(variation, abs=0.1)


def test_on_off_is_silent_between_its_bursts_and_keeps_the_mean_rate() -> None:
    times = list(islice(on_off(RATE, 3), 8000))
    assert all(time_s % (ON_S + OFF_S) <= ON_S for time_s in times)
    assert len(times) / times[-1] == pytest.approx(RATE, rel=0.05)


@pytest.mark.parametrize("name", [name for name in ARRIVALS if name != "constant"])
def test_the_seed_decides_the_arrivals(name: str) -> None:
    make = ARRIVALS[name]
    assert list(islice(make(RATE, 1), 50)) == list(islice(make(RATE, 1), 50))
    assert list(islice(make(RATE, 1), 50)) != list(islice(make(RATE, 2), 50))


def test_a_trace_starts_at_once_and_may_be_played_faster() -> None:
    assert list(recorded([100.0, 101.0, 105.0], speed=2.0)) == [0.0, 0.5, 2.5]
    assert list(recorded([])) == []
