"""Metrics and the one log line of a generation request, as its outputs pass by."""

from __future__ import annotations

import logging
import time

from engine.logs import FIELDS
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
        self._last: dict[int, tuple[float, int]] = {}  # by choice: when tokens last came, how many there are
        self._num_prompt = 0
        self._num_cached = 0
        self._num_preemptions = 0
        self._reason = "stop"

    @property
    def has_output(self) -> bool:
        return self._first_at is not None

    @property
    def num_tokens(self) -> int:
        """Of prompt and output, as far as known."""
        return self._num_prompt + sum(count for _, count in self._last.values())

    def saw(self, output: TextOutput) -> None:
        """Called for every output, so it does little."""
        now = time.monotonic()
        count = output.num_output_tokens
        last = self._last.get(output.choice)
        if last is not None:
            last_at, num_before = last
            if count > num_before:
                num_new = count - num_before
                self._metrics.itl_seconds.observe((now - last_at) / num_new, num_new)
                self._last[output.choice] = (now, count)
        elif count:
            self._first_of_choice(now, count, output)
        if output.finish_reason is not None:
            self._num_preemptions += output.num_preemptions
            if output.finish_reason == "length":
                self._reason = "length"

    def finished(self, reason: str | None = None) -> None:
        """The end. Without a reason: "length" when any choice ended so, else "stop"."""
        now = time.monotonic()
        reason = reason or self._reason
        metrics, num_output = self._metrics, sum(count for _, count in self._last.values())
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
            if num_output > len(self._last):
                metrics.tpot_seconds.observe((now - self._first_at) / (num_output - len(self._last)))
        logger.info(
            "request %s: prompt=%d cached=%d output=%d ttft_ms=%s total_ms=%.0f finish=%s",
            self._request.client_request_id,
            self._num_prompt,
            self._num_cached,
            num_output,
            "-" if self._first_at is None else f"{(self._first_at - self._began_at) * 1000:.0f}",
            (now - self._began_at) * 1000,
            reason,
            extra={FIELDS: self._log_fields(now, num_output, reason)},
        )

    def _log_fields(self, now: float, num_output: int, reason: str) -> dict[str, object]:
        """The line's figures as members of a JSON log."""
        ttft_s = None if self._first_at is None else self._first_at - self._began_at
        return {
            "request_id": self._request.client_request_id,
            "prompt_tokens": self._num_prompt,
            "cached_tokens": self._num_cached,
            "output_tokens": num_output,
            "ttft_ms": None if ttft_s is None else round(ttft_s * 1000, 3),
            "total_ms": round((now - self._began_at) * 1000, 3),
            "finish_reason": reason,
        }

    def _first_of_choice(self, now: float, count: int, output: TextOutput) -> None:
        self._last[output.choice] = (now, count)
        if count > 1:
            self._metrics.itl_seconds.observe(0.0, count - 1)
        if self._first_at is None:
            self._first_output(now, output)

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
