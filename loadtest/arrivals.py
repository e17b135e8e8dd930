"""When the requests of an open loop are due: arrival processes, endless and decided by their seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

Arrivals = Iterator[float]  # seconds after the start, never falling

BURSTINESS = 0.25  # shape of the gamma distribution: gaps vary twice as much as a Poisson process's
ON_S, OFF_S = 2.0, 2.0


def poisson(rate: float, seed: int) -> Arrivals:
    """Independent arrivals, `rate` a second."""
    generator = random.Random(seed)
    return _sum(lambda: generator.expovariate(rate))


def constant(rate: float, seed: int) -> Arrivals:
    """One every 1 / `rate` seconds."""
    return _sum(lambda: 1 / rate)


def gamma(rate: float, seed: int, shape: float = BURSTINESS) -> Arrivals:
    """Bursts: gaps of a gamma distribution whose coefficient of variation is 1 / sqrt(shape); 1 is Poisson."""
    generator = random.Random(seed)
    return _sum(lambda: generator.gammavariate(shape, 1 / (rate * shape)))


def on_off(rate: float, seed: int, on_s: float = ON_S, off_s: float = OFF_S) -> Arrivals:
    """Poisson for `on_s` seconds, nothing for `off_s`; `rate` is the mean over both."""
    for active_s in poisson(rate * (on_s + off_s) / on_s, seed):
        yield active_s + active_s // on_s * off_s


def recorded(times_s: Sequence[float], speed: float = 1.0) -> Arrivals:
    """Those of a trace, `speed` times as fast; they end where it ends."""
    first = times_s[0] if times_s else 0.0
    return ((time_s - first) / speed for time_s in times_s)


def _sum(gap: Callable[[], float]) -> Arrivals:
    now = 0.0
    while True:
        now += gap()
        yield now


ARRIVALS: dict[str, Callable[[float, int], Arrivals]] = {
    "poisson": poisson,
    "constant": constant,
    "gamma": gamma,
    "on-off": on_off,
}
