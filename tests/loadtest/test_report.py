"""Figures are computed from the records alone; failed requests never flatter them."""

from __future__ import annotations

import pytest

from loadtest.client import Record, Run, _read_line
from loadtest.report import Goals, summarize, table


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


def test_stream_events_fill_a_record() -> None:
    got = Record(sent=0.0)
    for line in (
        ": keep-alive",
        'data: {"choices": [{"index": 0, "text": "a"}], "usage": null}',
        'data: {"choices": [{"index": 0, "text": ""}], "usage": null}',
        'data: {"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 2, "total_tokens": 6, '
        '"prompt_tokens_details": {"cached_tokens": 3}}}',
        "data: [DONE]",
    ):
        _read_line(line, got)
    assert (len(got.arrivals), got.prompt_tokens, got.cached_tokens, got.output_tokens) == (1, 4, 3, 2)
    _read_line('data: {"error": {"message": "gone"}}', got)
    assert got.error == "gone"
