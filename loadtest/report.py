"""Turns records into figures: latencies, throughput, goodput, errors; as a table for people and JSON for machines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from loadtest.client import Record, Run

NUM_QUANTILES = 101


@dataclass(frozen=True)
class Goals:
    """Limits that a request must keep to count for goodput."""

    ttft_s: float | None = None
    time_per_output_token_s: float | None = None

    def are_met(self, record: Record) -> bool:
        return (
            record.error is None
            and (self.ttft_s is None or record.ttft_s <= self.ttft_s)
            and (self.time_per_output_token_s is None or record.time_per_output_token_s <= self.time_per_output_token_s)
        )


@dataclass(frozen=True)
class Summary:
    """Figures of one run; times in milliseconds, rates per second."""

    requests: int
    failed: int
    duration_s: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    output_tokens_per_s: float
    total_tokens_per_s: float
    requests_per_s: float
    goodput_requests_per_s: float
    ttft_ms: dict[str, float]
    inter_token_ms: dict[str, float]
    time_per_output_token_ms: dict[str, float]
    latency_ms: dict[str, float]
    late_ms: dict[str, float]  # how much later than due requests were sent
    events: int  # pieces with text
    unsent: int = 0
    errors: dict[str, int] = field(default_factory=dict)  # failed requests by kind
    first_error: str | None = None
    suspicious: int = 0  # answers whose counts contradict what was sent or received
    first_suspicion: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def summarize(run: Run, goals: Goals = Goals()) -> Summary:
    """Failed requests count in `failed` and `errors` only; other figures are of requests that finished.

    Lateness is of all. Latencies count from when a request was due.
    """
    done = [record for record in run.records if record.error is None]
    failed = [record for record in run.records if record.error is not None]
    suspicious = [record.suspicion for record in done if record.suspicion is not None]
    prompt, output = sum(r.prompt_tokens for r in done), sum(r.output_tokens for r in done)
    return Summary(
        requests=len(run.records),
        failed=len(failed),
        duration_s=run.duration_s,
        prompt_tokens=prompt,
        cached_tokens=sum(record.cached_tokens for record in done),
        output_tokens=output,
        output_tokens_per_s=output / run.duration_s,
        total_tokens_per_s=(prompt + output) / run.duration_s,
        requests_per_s=len(done) / run.duration_s,
        goodput_requests_per_s=sum(map(goals.are_met, done)) / run.duration_s,
        ttft_ms=percentiles([record.ttft_s for record in done]),
        inter_token_ms=percentiles([gap for record in done for gap in record.gaps_s]),
        time_per_output_token_ms=percentiles([record.time_per_output_token_s for record in done]),
        latency_ms=percentiles([record.latency_s for record in done]),
        late_ms=percentiles([record.late_s for record in run.records]),
        events=sum(len(record.arrivals) for record in done),
        unsent=run.unsent,
        errors=dict(Counter(record.error_kind or "other" for record in failed).most_common()),
        first_error=failed[0].error if failed else None,
        suspicious=len(suspicious),
        first_suspicion=suspicious[0] if suspicious else None,
    )


def quantiles(run: Run) -> dict[str, list[float]]:
    """The distributions of three latencies in milliseconds, at 0 %, 1 % ... 100 %; empty without a finished request."""
    done = [record for record in run.records if record.error is None]
    return {
        "ttft_ms": _quantiles([record.ttft_s for record in done]),
        "inter_token_ms": _quantiles([gap for record in done for gap in record.gaps_s]),
        "latency_ms": _quantiles([record.latency_s for record in done]),
    }


def table(summary: Summary) -> str:
    """A few lines for a terminal."""
    lines = [
        f"requests            {summary.requests}, failed {summary.failed}, {summary.duration_s:.2f} s",
        f"tokens              prompt {summary.prompt_tokens} (cached {summary.cached_tokens}), "
        f"output {summary.output_tokens}",
        f"throughput          {summary.output_tokens_per_s:.1f} output tok/s, {summary.total_tokens_per_s:.1f} tok/s, "
        f"{summary.requests_per_s:.2f} req/s, goodput {summary.goodput_requests_per_s:.2f} req/s",
    ]
    for name, values in (
        ("time to first token", summary.ttft_ms),
        ("inter-token latency", summary.inter_token_ms),
        ("per output token", summary.time_per_output_token_ms),
        ("request latency", summary.latency_ms),
        ("sent late", summary.late_ms),
    ):
        figures = "  ".join(f"{key} {value:.1f}" for key, value in values.items())
        lines.append(f"{name:<19} {figures} ms")
    return "\n".join([*lines, *troubles(summary)])


def troubles(summary: Summary) -> list[str]:
    """What a reader must know before believing the figures: errors, requests never sent, counts in doubt."""
    lines = []
    if summary.errors:
        kinds = ", ".join(f"{kind} {count}" for kind, count in summary.errors.items())
        lines.append(f"errors              {kinds}; first: {summary.first_error}")
    if summary.unsent:
        lines.append(f"never sent          {summary.unsent} later turns: one before failed, or the time was over")
    if summary.suspicious:
        lines.append(f"counts in doubt     {summary.suspicious} answers; first: {summary.first_suspicion}")
    return lines


def percentiles(values_s: Sequence[float]) -> dict[str, float]:
    """Mean, p50, p90, p99 and max in milliseconds; zeros when there are no values."""
    ordered = sorted(values_s)
    if not ordered:
        return dict.fromkeys(("mean", "p50", "p90", "p99", "max"), 0.0)
    mean = sum(ordered) / len(ordered) * 1000
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {"mean": mean, **{name: _at(ordered, share) for name, share in shares.items()}}


def _quantiles(values_s: Sequence[float]) -> list[float]:
    ordered = sorted(values_s)
    return [round(_at(ordered, i / (NUM_QUANTILES - 1)), 3) for i in range(NUM_QUANTILES)] if ordered else []


def _at(ordered: Sequence[float], share: float) -> float:
    """Nearest rank, in milliseconds."""
    return ordered[round(share * (len(ordered) - 1))] * 1000
