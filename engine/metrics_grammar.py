"""Metrics of constrained output: how many, of which kinds, what compiling them takes and what becomes of it."""

from __future__ import annotations

from typing import get_args

from engine.metrics_factory import LATENCY_BUCKETS, MetricFactory
from engine.types import ConstraintKind

KINDS = get_args(ConstraintKind)
REASONS = {"invalid_value": "invalid", "schema_too_complex": "too_complex"}


class GrammarMetrics:
    """Written once per constrained request."""

    def __init__(self, make: MetricFactory) -> None:
        self.requests = make.counters("kvasir_grammar_requests", "Constrained requests", "kind", KINDS)
        self.compile_seconds = make.histogram(
            "kvasir_grammar_compile_seconds", "Compiling one constraint, without waiting for its turn", LATENCY_BUCKETS
        )
        self.cache_hits = make.counter("kvasir_grammar_cache_hits", "Constraints that had been compiled before")
        self.cache_misses = make.counter("kvasir_grammar_cache_misses", "Constraints that had to be compiled")
        self.errors = make.counters(
            "kvasir_grammar_errors", "Constraints that were refused", "reason", (*REASONS.values(), "other")
        )

    def observe(self, kind: str, outcome: str, seconds: float) -> None:
        """`outcome` as in `ConstraintCompiler`; seconds of compiling, 0 where nothing was compiled."""
        self.requests[kind].inc()
        if outcome == "cached":
            self.cache_hits.inc()
            return
        self.cache_misses.inc()
        if outcome == "compiled":
            self.compile_seconds.observe(seconds)
        else:
            self.errors[REASONS.get(outcome, "other")].inc()
