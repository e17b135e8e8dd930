"""Metrics of speculation: what was guessed, by whom, how much of it was right, and what guessing takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from prometheus_client import Counter

from engine.metrics_factory import STEP_BUCKETS, MetricFactory
from engine.types import EngineStats

DRAFTERS = (
    *("ngram", "suffix", "token_recycling", "lookahead", "aded", "goose", "draft_model", "dyspec", "rsd_c", "rsd_s"),
    *("sequoia", "spectr", "multi_draft", "eagle", "other"),
)
DEPTHS = ("1", "2", "3", "4", "5", "6", "7", "8", "more")

Advance = Callable[[Counter, str, float], None]


class SpeculationMetrics:
    """Acceptance rate is accepted / verified, acceptance length 1 + accepted / steps."""

    def __init__(self, make: MetricFactory) -> None:
        self.steps = make.counter("kvasir_spec_steps", "Rows that checked a draft, summed over steps")
        self.emitted = make.counter("kvasir_spec_emitted_tokens", "Tokens that came out of rows that checked a draft")
        self.drafted = make.counters("kvasir_spec_draft_tokens", "Tokens guessed, checked or not", "drafter", DRAFTERS)
        self.verified = make.counters("kvasir_spec_verified_tokens", "Guessed tokens checked", "drafter", DRAFTERS)
        self.accepted = make.counters(
            "kvasir_spec_accepted_tokens", "Guessed tokens that were right", "drafter", DRAFTERS
        )
        self.reached = make.counters(
            "kvasir_spec_reached_at_depth", "Drafts that were right down to this depth and went on", "depth", DEPTHS
        )
        self.accepted_at = make.counters(
            "kvasir_spec_accepted_at_depth", "Drafts that were right at this depth too", "depth", DEPTHS
        )
        self.propose_seconds = make.histogram("kvasir_spec_propose_seconds", "Guessing for a step", STEP_BUCKETS)
        self.state_bytes = make.gauge("kvasir_spec_state_bytes", "Memory of what drafters have learnt")
        self.expected_rate = make.gauge(
            "kvasir_spec_expected_tokens_per_second", "What the last selection of guesses counted on"
        )
        self.selected = make.gauge("kvasir_spec_selected_nodes", "Guessed tokens in that selection")
        self.calibration_error = make.gauge(
            "kvasir_spec_calibration_error", "Mean distance between predicted and observed acceptance"
        )

    def update(self, stats: EngineStats, advance: Advance) -> None:
        """`advance(counter, key, value)` brings a counter up to a value of the core's."""
        advance(self.steps, "spec.steps", stats.spec_steps)
        advance(self.emitted, "spec.emitted", stats.spec_emitted)
        for name, counters, values in (
            ("drafted", self.drafted, _known(stats.spec_proposed)),
            ("verified", self.verified, _known(stats.spec_drafted)),
            ("accepted", self.accepted, _known(stats.spec_accepted)),
            ("reached_at", self.reached, _by_depth(stats.spec_reached_at_depth)),
            ("accepted_at", self.accepted_at, _by_depth(stats.spec_accepted_at_depth)),
        ):
            for label, value in values.items():
                advance(counters[label], f"spec.{name}.{label}", value)
        for seconds in stats.spec_propose_seconds:
            self.propose_seconds.observe(seconds)
        self.state_bytes.set(stats.spec_state_bytes)
        self.expected_rate.set(stats.spec_expected_rate)
        self.selected.set(stats.spec_selected_nodes)
        self.calibration_error.set(stats.spec_calibration_error)


def _known(counts: Mapping[str, int]) -> dict[str, int]:
    """Names outside of the closed set count as "other"."""
    found: dict[str, int] = {}
    for name, count in counts.items():
        label = name if name in DRAFTERS else "other"
        found[label] = found.get(label, 0) + count
    return found


def _by_depth(counts: Sequence[int]) -> dict[str, int]:
    last = len(DEPTHS) - 1
    found = dict(zip(DEPTHS[:last], counts, strict=False))
    if len(counts) > last:
        found[DEPTHS[last]] = sum(counts[last:])
    return found
