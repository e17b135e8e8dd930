"""A background task that watches the engine's phase and the event loop, for metrics and the log."""

from __future__ import annotations

import asyncio
import logging
import time

from engine.metrics import EngineMetrics
from server.context import LOADING_PHASES, ServerContext
from server.report import startup_report

logger = logging.getLogger(__name__)

INTERVAL_S = 0.1


async def monitor(context: ServerContext) -> None:
    """Runs until cancelled."""
    watch = _PhaseWatch(context)
    while True:
        watch.look()
        began_at = time.monotonic()
        await asyncio.sleep(INTERVAL_S)
        context.metrics.http.loop_lag.observe(max(time.monotonic() - began_at - INTERVAL_S, 0.0))


class _PhaseWatch:
    def __init__(self, context: ServerContext) -> None:
        self._context = context
        self._phase = "starting"
        self._since = time.monotonic()
        self._was_ready = False

    def look(self) -> None:
        phase = self._context.engine.state.phase
        metrics: EngineMetrics = self._context.metrics.engine
        if phase == self._phase:
            return
        now = time.monotonic()
        if self._phase in LOADING_PHASES:
            metrics.startup_seconds[self._phase].set(now - self._since)
        logger.info("engine: %s after %.1f s in %s", phase, now - self._since, self._phase)
        self._phase, self._since = phase, now
        info, config = self._context.engine.info, self._context.config
        if phase == "ready" and info is not None:
            if not self._was_ready:
                report = startup_report(
                    info,
                    self._context.engine.model_names[0],
                    self._context.url,
                    max_num_seqs=config.scheduler.max_num_seqs,
                )
                for line in report.splitlines():  # a record of its own each: newlines inside of one are escaped
                    logger.info(line)
            self._was_ready = True
            labels = {
                "block_size": str(info.block_size),
                "kv_dtype": config.cache.kv_cache_dtype,
                "attention_backend": info.kernels.get("paged_attention", ""),
                "spec_method": "none",
                "compression_policy": "none",
                "max_model_len": str(info.max_model_len),
                "tp": "1",
                "pp": "1",
            }
            metrics.describe_model(info, labels)
