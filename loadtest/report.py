"""Turns records into figures: latencies, throughput, goodput; as a table for people and JSON for machines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from loadtest.client import Run


@dataclass(frozen=True)
class Goals:
    """Limits that a request must keep to count for goodput."""

    ttft_s: float | None = None
    time_per_output_token_s: float | None = None


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
    first_error: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def summarize(run: Run, goals: Goals = Goals()) -> Summary:
    """Failed requests count in `failed` only; every other figure is of requests that finished."""
    done = [record for record in run.records if record.error is None]
    good = [
        record
        for record in done
        if (goals.ttft_s is None or record.ttft_s <= goals.ttft_s)
        and (goals.time_per_output_token_s is None or record.time_per_output_token_s <= goals.time_per_output_token_s)
    ]
    prompt, output = sum(r.prompt_tokens for r in done), sum(r.output_tokens for r in done)
    errors = [record.error for record in run.records if record.error is not None]
    return Summary(
        requests=len(run.records),
        failed=len(errors),
        duration_s=run.duration_s,
        prompt_tokens=prompt,
        cached_tokens=sum(record.cached_tokens for record in done),
        output_tokens=output,
        output_tokens_per_s=output / run.duration_s,
        total_tokens_per_s=(prompt + output) / run.duration_s,
        requests_per_s=len(done) / run.duration_s,
        goodput_requests_per_s=len(good) / run.duration_s,
        ttft_ms=_percentiles([record.ttft_s for record in done]),
        inter_token_ms=_percentiles([gap for record in done for gap in record.gaps_s]),
        time_per_output_token_ms=_percentiles([record.time_per_output_token_s for record in done]),
        latency_ms=_percentiles([record.latency_s for record in done]),
        first_error=errors[0] if errors else None,
    )


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
    ):
        figures = "  ".join(f"{key} {value:.1f}" for key, value in values.items())
        lines.append(f"{name:<19} {figures} ms")
    if summary.first_error:
        lines.append(f"first error         {summary.first_error}")
    return "\n".join(lines)


def _percentiles(values_s: Sequence[float]) -> dict[str, float]:
    """Mean, p50, p90, p99 and max in milliseconds; zeros when there are no values."""
    ordered = sorted(values_s)
    if not ordered:
        return dict.fromkeys(("mean", "p50", "p90", "p99", "max"), 0.0)

    def at(share: float) -> float:
        return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))] * 1000

    mean = sum(ordered) / len(ordered) * 1000
    return {"mean": mean, "p50": at(0.5), "p90": at(0.9), "p99": at(0.99), "max": ordered[-1] * 1000}
