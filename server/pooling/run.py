"""The pooling requests behind one HTTP request: a few at a time, ended together when one fails or the client leaves."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence

import msgspec
from starlette.types import Receive

from engine.errors import CapacityError, DeadlineExceeded, NotReady, QueueFull, RequestError
from engine.types import PooledOutput, PoolingRequest
from server.context import ServerContext
from server.errors import ClientDisconnected

logger = logging.getLogger(__name__)

RETRY_S = 0.05  # when others have filled the queue meanwhile


class PoolingRun:
    """Runs a list of requests. The engine's queue never holds more of them than two steps take."""

    def __init__(self, context: ServerContext, requests: Sequence[PoolingRequest], receive: Receive) -> None:
        """`receive` is watched for the client's leaving."""
        scheduler = context.config.scheduler
        self.labels = {request.client_request_id for request in requests}
        self._context = context
        self._requests = requests
        self._receive = receive
        self._num_workers = min(len(requests), 2 * scheduler.max_num_seqs, max(scheduler.max_waiting_requests, 1))
        self._pending = iter(range(len(requests)))
        self._outputs: dict[int, PooledOutput] = {}
        self._num_running = 0
        self._failure: Exception | None = None
        self._ended = asyncio.Event()
        self._began_at = time.monotonic()

    async def collect(self) -> list[PooledOutput]:
        """All results in order. Raises what ended one of the requests."""
        with self._context.gate.admit(self, self._requests[0].tenant):
            tasks = [asyncio.create_task(self._work()) for _ in range(self._num_workers)]
            tasks.append(asyncio.create_task(self._watch()))
            try:
                await self._ended.wait()
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        self._log()
        if self._failure is not None:
            if isinstance(self._failure, ClientDisconnected):
                self._context.metrics.http.disconnects["prefill"].inc()
            raise self._failure
        return [self._outputs[index] for index in range(len(self._requests))]

    def abort(self, reason: Exception) -> None:
        """Ends everything; `collect` raises `reason`."""
        if self._failure is None:
            self._failure = reason
        self._ended.set()

    async def _work(self) -> None:
        for index in self._pending:
            self._num_running += 1
            reason: str | None = "abort"  # what a cancellation leaves behind
            began_at = time.monotonic()
            try:
                self._outputs[index] = await self._run(self._requests[index])
                reason = "stop"
            except Exception as error:
                reason = _end_of(error)
                self.abort(error)
                return
            finally:
                self._num_running -= 1
                self._count(index, reason, time.monotonic() - began_at)
        if len(self._outputs) == len(self._requests):
            self._ended.set()

    async def _run(self, request: PoolingRequest) -> PooledOutput:
        while True:
            left_s = None
            if request.deadline_s is not None:
                left_s = request.deadline_s - (time.monotonic() - self._began_at)
                if left_s <= 0:
                    raise DeadlineExceeded("the request did not finish within its time limit")
            try:
                return await self._context.engine.pool(msgspec.structs.replace(request, deadline_s=left_s))
            except QueueFull:
                if not self._outputs and self._num_running == 1:
                    raise
            await asyncio.sleep(RETRY_S)

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            continue
        self.abort(ClientDisconnected())

    def _count(self, index: int, reason: str | None, seconds: float) -> None:
        metrics = self._context.metrics.requests
        if reason is None:
            return
        metrics.finished[reason].inc()
        metrics.e2e_seconds.observe(seconds)
        if reason == "timeout":
            metrics.deadline_misses["e2e"].inc()
        output = self._outputs.get(index)
        if output is not None:
            metrics.prompt_tokens.observe(output.num_prompt_tokens)
            metrics.cached_tokens.observe(output.num_cached_tokens)
            metrics.preemptions.observe(output.num_preemptions)

    def _log(self) -> None:
        logger.info(
            "request %s: pooled=%d of %d prompt=%d total_ms=%.0f finish=%s",
            self._requests[0].client_request_id,
            len(self._outputs),
            len(self._requests),
            sum(output.num_prompt_tokens for output in self._outputs.values()),
            (time.monotonic() - self._began_at) * 1000,
            "stop" if self._failure is None else type(self._failure).__name__,
        )


def _end_of(error: Exception) -> str | None:
    """The label under which a failed request is counted; None when the engine never accepted it."""
    if isinstance(error, RequestError | QueueFull | NotReady):
        return None
    return "timeout" if isinstance(error, DeadlineExceeded | CapacityError) else "error"
