"""Metrics of cache policies: whose caches shrank, what they gave up, and what came free."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import Counter

from engine.metrics_factory import MetricFactory
from engine.types import EngineStats

POLICIES = (
    *("a2sf", "ems", "fp8", "gemfilter", "h2o", "int8", "keyformer", "kivi", "kvcrush", "pyramidkv", "quest", "raas"),
    *("random", "razor_attention", "scissorhands", "snapkv", "streaming_llm", "tova", "vatp", "other"),
)

Advance = Callable[[Counter, str, float], None]


class CompressionMetrics:
    """A request counts with its first compaction; one that is computed again after a preemption counts again."""

    def __init__(self, make: MetricFactory) -> None:
        families = (
            ("requests", "kvasir_requests_compressed", "Requests whose cache shrank"),
            ("compactions", "kvasir_kv_compactions", "Times that a cache shrank"),
            ("evicted_tokens", "kvasir_kv_evicted_tokens", "Tokens dropped from the caches of live requests"),
            ("released_bytes", "kvasir_kv_bytes_saved", "Bytes that live requests gave back"),
        )
        text = "Times that a cache shrank because memory was short, by what was done"
        self._rungs = make.counters("kvasir_pressure_rungs", text, "policy", POLICIES)
        self._counters = {field: make.counters(name, text, "policy", POLICIES) for field, name, text in families}

    def update(self, stats: EngineStats, advance: Advance) -> None:
        """`advance(counter, key, value)` brings a counter up to a value of the core's."""
        for policy, counts in stats.compression.items():
            label = policy if policy in POLICIES else "other"
            for field, counters in self._counters.items():
                advance(counters[label], f"kv.{field}.{policy}", getattr(counts, field))
        for policy, count in stats.rungs.items():
            advance(self._rungs[policy if policy in POLICIES else "other"], f"rungs.{policy}", count)
