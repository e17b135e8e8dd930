"""Metrics and the one log line of a generation request, as its outputs pass by."""

from __future__ import annotations

import logging
import time

from engine.metrics import RequestMetrics
from engine.types import GenerationRequest, TextOutput

logger = logging.getLogger(__name__)


class RequestTracker:
    """One per engine request, that is one per prompt."""

    def __init__(self, metrics: RequestMetrics, request: GenerationRequest) -> None:
        self._metrics = metrics
        self._request = request
        self._began_at = time.monotonic()
        self._first_at: float | None = None
        self._queued_s: float | None = None
        self._last_at: dict[int, float] = {}
        self._num_output: dict[int, int] = {}
        self._num_prompt = 0
        self._num_cached = 0
        self._num_preemptions = 0
        self._reason = "stop"

    @property
    def has_output(self) -> bool:
        return self._first_at is not None

    def saw(self, output: TextOutput) -> None:
        """Called for every output, so it does little."""
        now = time.monotonic()
        num_new = output.num_output_tokens - self._num_output.get(output.choice, 0)
        last_at = self._last_at.get(output.choice)
        if self._first_at is None:
            self._first_output(now, output)
        if last_at is not None and num_new > 0:
            gap = (now - last_at) / num_new
            for _ in range(num_new):
                self._metrics.itl_seconds.observe(gap)
        elif num_new > 1:
            for _ in range(num_new - 1):
                self._metrics.itl_seconds.observe(0.0)
        if num_new > 0:
            self._last_at[output.choice] = now
            self._num_output[output.choice] = output.num_output_tokens
        if output.finish_reason is not None:
            self._num_preemptions += output.num_preemptions
            if output.finish_reason == "length":
                self._reason = "length"

    def finished(self, reason: str | None = None) -> None:
        """The end. Without a reason: "length" when any choice ended so, else "stop"."""
        now = time.monotonic()
        reason = reason or self._reason
        metrics, num_output = self._metrics, sum(self._num_output.values())
        metrics.finished[reason].inc()
        metrics.e2e_seconds.observe(now - self._began_at)
        if reason == "timeout":
            metrics.deadline_misses["e2e"].inc()
        metrics.preemptions.observe(self._num_preemptions)
        if self._first_at is not None:
            metrics.decode_seconds.observe(now - self._first_at)
            metrics.prompt_tokens.observe(self._num_prompt)
            metrics.cached_tokens.observe(self._num_cached)
            metrics.output_tokens.observe(num_output)
            if num_output > len(self._num_output):
                metrics.tpot_seconds.observe((now - self._first_at) / (num_output - len(self._num_output)))
        logger.info(
            "request %s: prompt=%d cached=%d output=%d ttft_ms=%s total_ms=%.0f finish=%s",
            self._request.client_request_id,
            self._num_prompt,
            self._num_cached,
            num_output,
            "-" if self._first_at is None else f"{(self._first_at - self._began_at) * 1000:.0f}",
            (now - self._began_at) * 1000,
            reason,
        )

    def _first_output(self, now: float, output: TextOutput) -> None:
        self._first_at = now
        self._num_prompt = output.num_prompt_tokens
        self._num_cached = output.num_cached_tokens
        self._metrics.ttft_seconds.observe(now - self._began_at)
        if output.queued_s is not None:
            self._metrics.queue_seconds[_priority_class(self._request.priority)].observe(output.queued_s)
            self._metrics.prefill_seconds.observe(max(now - self._began_at - output.queued_s, 0.0))


def _priority_class(priority: int) -> str:
    if priority < 0:
        return "high"
    return "low" if priority > 0 else "normal"
