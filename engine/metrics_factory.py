"""How metrics are made: bucket borders, and families that carry the served model's name."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

# Bucket borders are part of the contract: changing them breaks recording rules.
LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640, 1280)
TTFT_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.5, 0.75),
    *(1, 2.5, 5, 10, 20, 40, 80, 160, 640),
)
ITL_BUCKETS = (
    *(0.0005, 0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5, 10),
)
STEP_BUCKETS = tuple(0.0001 * 2**i for i in range(17))
TOKEN_BUCKETS = tuple(m * 10**e for e in range(6) for m in (1, 2, 5))
STEP_TOKEN_BUCKETS = (1, *(8 * 2**i for i in range(12)))

Family = TypeVar("Family", bound=Collector)


class Series:
    """One histogram: one writer, no lock, the bucket found by bisection. The library's takes a dozen calls a value."""

    def __init__(self, bounds: Sequence[float]) -> None:
        """bounds   upper ones, ascending; the last is infinite"""
        self._bounds = bounds
        self._counts = [0] * len(bounds)
        self._sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Counts `value` so many times."""
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def add_to(self, family: HistogramMetricFamily, labels: Sequence[str]) -> None:
        cumulated = zip(self._bounds, itertools.accumulate(self._counts), strict=True)
        buckets = [("+Inf" if bound == math.inf else str(bound), float(count)) for bound, count in cumulated]
        family.add_metric(labels, buckets, sum_value=self._sum)


class Histogram(Collector):
    """A family of histograms, told apart by their labels. A series exists from the first `labels` on."""

    def __init__(
        self, name: str, text: str, labels: Sequence[str], buckets: Sequence[float], registry: CollectorRegistry
    ) -> None:
        self._name = name
        self._text = text
        self._labels = list(labels)
        self._bounds = [*map(float, buckets), math.inf]
        self._series: dict[tuple[str, ...], Series] = {}
        registry.register(self)

    def labels(self, *values: str) -> Series:
        series = self._series.get(values)
        if series is None:
            series = self._series[values] = Series(self._bounds)
        return series

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._text, labels=self._labels)
        for values, series in self._series.items():
            series.add_to(family, values)
        yield family


class MetricFactory:
    """Makes metrics that carry the served model's name, and remembers the families for `VllmNames`."""

    def __init__(self, registry: CollectorRegistry, model: str) -> None:
        self._registry = registry
        self.model = model
        self.families: dict[str, Collector] = {}

    def counter(self, name: str, text: str) -> Counter:
        return self._keep(name, Counter(name, text, ["model"], registry=self._registry)).labels(self.model)

    def counters(self, name: str, text: str, label: str, values: Iterable[str]) -> dict[str, Counter]:
        family = self._keep(name, Counter(name, text, ["model", label], registry=self._registry))
        return {value: family.labels(self.model, value) for value in values}

    def gauge(self, name: str, text: str) -> Gauge:
        return self._keep(name, Gauge(name, text, ["model"], registry=self._registry)).labels(self.model)

    def gauges(self, name: str, text: str, label: str, values: Iterable[str], **fixed: str) -> dict[str, Gauge]:
        """`fixed` labels have one value today; they are there so that more can come without a new name."""
        family = self._keep(name, Gauge(name, text, ["model", label, *fixed], registry=self._registry))
        return {value: family.labels(self.model, value, *fixed.values()) for value in values}

    def histogram(self, name: str, text: str, buckets: Sequence[float]) -> Series:
        return self._keep(name, Histogram(name, text, ["model"], buckets, self._registry)).labels(self.model)

    def histograms(
        self, name: str, text: str, buckets: Sequence[float], label: str, values: Iterable[str]
    ) -> dict[str, Series]:
        family = self._keep(name, Histogram(name, text, ["model", label], buckets, self._registry))
        return {value: family.labels(self.model, value) for value in values}

    def info(self, name: str, text: str, labels: Mapping[str, str]) -> Gauge:
        """A gauge that is always 1 and says something in its labels. Returns the family."""
        family = Gauge(name, text, ["model", *labels], registry=self._registry)
        self._keep(name, family).labels(self.model, *labels.values()).set(1)
        return family

    def _keep(self, name: str, family: Family) -> Family:
        self.families[name] = family
        return family
