"""The engine streams behind one HTTP request: started together, merged, ended together.

Outputs wait here until the HTTP side takes them. The engine never waits for a client: what piles up is bounded, and a
client that leaves ends everything, whether its answer is streamed or not.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from types import TracebackType
from typing import cast

from starlette.types import Receive

from engine.errors import CapacityError, DeadlineExceeded, NotReady, QueueFull, RequestError
from engine.types import GenerationRequest, TextOutput
from server.context import ServerContext
from server.errors import ClientDisconnected
from server.outputs import Piece, merge, unsent_size
from server.tracking import RequestTracker


class SlowReader(CapacityError):
    """The client did not read fast enough."""

    code = "slow_reader"

    def __init__(self) -> None:
        super().__init__("too much output was waiting to be read; read the stream faster")


class Generation:
    """An async context manager: inside, the requests run; leaving it aborts whatever still does."""

    def __init__(
        self,
        context: ServerContext,
        requests: Sequence[GenerationRequest],
        receive: Receive,
        *,
        max_unsent_bytes: int | None = None,
    ) -> None:
        """`receive` is watched for the client's leaving. No bound on unsent bytes: for answers given in one piece."""
        self._context = context
        self._requests = requests
        self._receive = receive
        self._max_unsent = max_unsent_bytes
        self._pending: list[Piece] = []
        self._unsent = 0
        self._failure: Exception | None = None
        self._num_running = 0
        self._wake = asyncio.Event()
        self._silence_timer: asyncio.TimerHandle | None = None
        self._silent_at = 0.0
        self._is_silent = False
        self._tasks: list[asyncio.Task[None]] = []
        self._admission = contextlib.ExitStack()
        self._trackers: list[RequestTracker] = []

    @property
    def is_disconnected(self) -> bool:
        return isinstance(self._failure, ClientDisconnected)

    async def __aenter__(self) -> Generation:
        tenant = self._requests[0].tenant
        self._admission.enter_context(self._context.gate.admit(self, tenant))
        self._trackers = [RequestTracker(self._context.metrics.requests, request) for request in self._requests]
        self._num_running = len(self._requests)
        self._tasks = [asyncio.create_task(self._pump(index)) for index in range(len(self._requests))]
        self._tasks.append(asyncio.create_task(self._watch()))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._silence_timer is not None:
            self._silence_timer.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._admission.close()
        if self.is_disconnected:
            began = any(tracker.has_output for tracker in self._trackers)
            self._context.metrics.http.disconnects["decode" if began else "prefill"].inc()

    def abort(self, reason: Exception) -> None:
        """Ends everything; `take` raises `reason` once what had arrived is taken."""
        if self._failure is None:
            self._failure = reason
        for task in self._tasks:
            task.cancel()
        self._wake.set()

    async def take(self, idle_s: float | None = None) -> list[Piece] | None:
        """What arrived since the last call, merged per choice; empty after `idle_s` seconds; None at the end.

        Raises what ended the requests early.
        """
        while not self._pending:
            if self._failure is not None:
                raise self._failure
            if not self._num_running:
                return None
            if self._is_silent:
                self._is_silent = False
                return []
            if idle_s is not None:
                self._watch_silence(idle_s)
            self._wake.clear()
            await self._wake.wait()
        pieces, self._pending, self._unsent = self._pending, [], 0
        return merge(pieces)

    def _watch_silence(self, idle_s: float) -> None:
        """Moves the moment of silence on. One timer runs late and looks again: arming one per token costs more."""
        loop = asyncio.get_running_loop()
        self._silent_at = loop.time() + idle_s
        if self._silence_timer is None:
            self._silence_timer = loop.call_at(self._silent_at, self._check_silence)

    def _check_silence(self) -> None:
        loop = asyncio.get_running_loop()
        if loop.time() < self._silent_at:
            self._silence_timer = loop.call_at(self._silent_at, self._check_silence)
            return
        self._silence_timer = None
        self._is_silent = True
        self._wake.set()

    async def collect(self) -> list[Piece]:
        """Waits for the end: one piece per choice."""
        collected: list[Piece] = []
        while (pieces := await self.take()) is not None:
            collected += pieces
        return merge(collected)

    async def _pump(self, index: int) -> None:
        tracker = self._trackers[index]
        end: str | None = "abort"  # what a cancellation leaves behind
        is_refused = False
        try:
            outputs = cast(AsyncGenerator[TextOutput, None], self._context.engine.generate(self._requests[index]))
            async with contextlib.aclosing(outputs):
                await self._forward(index, outputs, tracker)
            end = None
        except Exception as error:
            end = _end_of(error)
            is_refused = end is None
            if isinstance(error, SlowReader):
                self._context.metrics.http.buffer_overflows.inc()
            self.abort(error)  # one failed prompt ends the whole HTTP request
        finally:
            self._num_running -= 1
            self._wake.set()
            if not is_refused:
                tracker.finished(end)

    async def _forward(self, index: int, outputs: AsyncIterator[TextOutput], tracker: RequestTracker) -> None:
        async for output in outputs:
            tracker.saw(output)
            self._pending.append((index, output))
            if self._max_unsent is not None:
                self._unsent += unsent_size(output)
                if self._unsent > self._max_unsent:
                    raise SlowReader
            self._wake.set()

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            continue
        self.abort(ClientDisconnected())


def _end_of(error: Exception) -> str | None:
    """The label under which a failed request is counted; None when the engine never accepted it."""
    if isinstance(error, RequestError | QueueFull | NotReady):
        return None
    if isinstance(error, SlowReader):
        return "abort"
    # CapacityError itself: it waited too long for its first step
    return "timeout" if isinstance(error, DeadlineExceeded | CapacityError) else "error"
