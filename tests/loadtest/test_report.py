"""Figures are computed from the records alone; failed requests never flatter them."""

from __future__ import annotations

import pytest

from loadtest.client import Record, Run
from loadtest.report import Goals, percentiles, quantiles, summarize, table


def record(first: float, finished: float, tokens: int, **changes: object) -> Record:
    arrivals = [first + i * (finished - first) / max(tokens - 1, 1) for i in range(tokens)]
    return Record(
        sent=0.0,
        first=first,
        finished=finished,
        arrivals=arrivals,
        prompt_tokens=10,
        output_tokens=tokens,
        **changes,  # type: ignore[arg-type]
    )


def test_rates_latencies_and_percentiles() -> None:
    summary = summarize(Run(records=[record(0.1, 1.1, 11), record(0.3, 2.3, 11)], duration_s=4.0))
    assert (summary.requests, summary.failed, summary.output_tokens, summary.prompt_tokens) == (2, 0, 22, 20)
    assert summary.output_tokens_per_s == pytest.approx(5.5)
    assert summary.total_tokens_per_s == pytest.approx(10.5)
    assert summary.ttft_ms["mean"] == pytest.approx(200)
    assert summary.inter_token_ms["p50"] == pytest.approx(100, abs=101)
    assert summary.time_per_output_token_ms["max"] == pytest.approx(200)


def test_goodput_counts_only_requests_within_the_limits() -> None:
    run = Run(records=[record(0.1, 1.1, 11), record(0.3, 2.3, 11)], duration_s=1.0)
    assert summarize(run, Goals(ttft_s=0.2)).goodput_requests_per_s == pytest.approx(1.0)
    assert summarize(run, Goals(time_per_output_token_s=0.05)).goodput_requests_per_s == 0.0
    assert summarize(run).goodput_requests_per_s == pytest.approx(2.0)


def test_failed_requests_are_counted_and_left_out_of_the_rest() -> None:
    summary = summarize(
        Run(records=[record(0.1, 1.1, 11), Record(sent=0.0, finished=9.0, error="503: x")], duration_s=1.0)
    )
    assert (summary.failed, summary.first_error, summary.output_tokens) == (1, "503: x", 11)
    assert summary.latency_ms["max"] == pytest.approx(1100)
    assert "503: x" in table(summary)


def test_a_run_without_any_success_still_reports() -> None:
    summary = summarize(Run(records=[Record(sent=0.0, error="boom")], duration_s=1.0))
    assert summary.failed == 1
    assert summary.output_tokens_per_s == 0.0


def test_failed_requests_are_counted_by_kind_and_doubts_are_shown() -> None:
    run = Run(
        records=[
            record(0.1, 1.1, 11, suspicion="3 pieces of 2 tokens"),
            Record(sent=0.0, error="a", error_kind="timeout"),
            Record(sent=0.0, error="b", error_kind="http 503"),
            Record(sent=0.0, error="c", error_kind="timeout"),
        ],
        duration_s=1.0,
        unsent=4,
    )
    summary = summarize(run)
    assert summary.errors == {"timeout": 2, "http 503": 1}
    assert (summary.unsent, summary.suspicious) == (4, 1)
    text = table(summary)
    assert all(word in text for word in ("timeout 2", "http 503 1", "4 later turns", "3 pieces of 2 tokens"))


def test_latencies_count_from_when_a_request_was_due() -> None:
    late = record(0.5, 1.0, 6, due=-2.0)
    summary = summarize(Run(records=[late], duration_s=1.0), Goals(ttft_s=1.0))
    assert summary.ttft_ms["p50"] == pytest.approx(2500)
    assert summary.latency_ms["p50"] == pytest.approx(3000)
    assert summary.late_ms["max"] == pytest.approx(2000)
    assert summary.goodput_requests_per_s == 0.0


def test_percentiles_are_values_that_occurred() -> None:
    values = [i / 1000 for i in range(1, 101)]
    found = percentiles(values)
    assert {key: round(value, 6) for key, value in found.items()} == {
        "mean": 50.5,
        "p50": 51.0,  # of an even number, the upper of the two in the middle
        "p90": 90.0,
        "p99": 99.0,
        "max": 100.0,
    }
    assert percentiles([0.007]) == dict.fromkeys(("mean", "p50", "p90", "p99", "max"), 7.0)


def test_quantiles_rise_from_the_least_to_the_most() -> None:
    run = Run(records=[record(i / 10, 1.0, 5) for i in range(1, 9)], duration_s=1.0)
    found = quantiles(run)["ttft_ms"]
    assert (len(found), found[0], found[-1]) == (101, 100.0, 800.0)
    assert found == sorted(found)
    assert quantiles(Run(records=[], duration_s=1.0))["latency_ms"] == []


def test_runs_add_up() -> None:
    first = Run(records=[record(0.1, 1.1, 11)], duration_s=2.0, unsent=1)
    both = first + Run(records=[record(0.1, 1.1, 9)], duration_s=3.0)
    assert (len(both.records), both.duration_s, both.unsent) == (2, 5.0, 1)
    assert summarize(both).output_tokens_per_s == pytest.approx(4.0)
