"""The engine streams behind one HTTP request: started together, merged, ended together.

Outputs wait here until the HTTP side takes them. The engine never waits for a client: what piles up is bounded, and a
client that leaves ends everything, whether its answer is streamed or not.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from types import TracebackType

from starlette.types import Receive

from engine.errors import CapacityError, DeadlineExceeded, NotReady, QueueFull, RequestError
from engine.types import GenerationRequest
from server.context import ServerContext
from server.engine_api import Stream
from server.errors import ClientDisconnected
from server.outputs import Piece, merge
from server.tracking import RequestTracker

REFUSED = "refused"


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
        self.labels = {request.client_request_id for request in requests}
        self._context = context
        self._requests = requests
        self._receive = receive
        self._max_unsent = max_unsent_bytes
        self._failure: Exception | None = None
        self._streams: dict[int, Stream] = {}  # those that were opened and not yet seen to their end
        self._phase = "queued"  # how far the first of the requests had come when all were ended
        self._num_running = 0  # requests that have not been seen to their end
        self._waiter: asyncio.Future[None] | None = None
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
        self._tasks = [asyncio.create_task(self._open(index)) for index in range(len(self._requests))]
        self._tasks.append(asyncio.create_task(self._watch()))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._silence_timer is not None:
            self._silence_timer.cancel()
        self._stop()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for index in list(self._streams):
            self._ended(index, "abort")
        self._admission.close()
        if self.is_disconnected:
            self._context.metrics.http.disconnects[self._phase].inc()

    def abort(self, reason: Exception) -> None:
        """Ends everything; `take` raises `reason` once what had arrived is taken."""
        if self._failure is None:
            self._failure = reason
        self._stop()
        self._wake()

    async def take(self, idle_s: float | None = None) -> list[Piece] | None:
        """What arrived since the last call, merged per choice; empty after `idle_s` seconds; None at the end.

        Raises what ended the requests early.
        """
        while not (pieces := self._gather()):
            if self._failure is not None:
                raise self._failure
            if not self._num_running:
                return None
            if self._is_silent:
                self._is_silent = False
                return []
            if idle_s is not None:
                self._watch_silence(idle_s)
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return pieces

    async def collect(self) -> list[Piece]:
        """Waits for the end: one piece per choice."""
        collected: list[Piece] = []
        while (pieces := await self.take()) is not None:
            collected += pieces
        return merge(collected)

    def _gather(self) -> list[Piece]:
        """What the engine has for us at this moment."""
        pieces: list[Piece] = []
        is_over = False
        for index, stream in self._streams.items():
            saw = self._trackers[index].saw
            try:
                while (output := stream.take()) is not None:
                    saw(output)
                    pieces.append((index, output))
            except Exception:
                is_over = True
            is_over = is_over or stream.is_done
        if is_over:
            self._close_finished()
        return pieces

    def _close_finished(self) -> None:
        """Closes the streams that have been taken to their end, and all of them when one has failed."""
        for index, stream in tuple(self._streams.items()):
            try:
                if stream.is_done and stream.take() is None:
                    self._ended(index, None)
            except Exception as error:
                self._ended(index, "abort" if self._failure is not None else _end_of(error))
                self.abort(error)  # one failed prompt ends the whole HTTP request

    def _ended(self, index: int, reason: str | None) -> None:
        """A stream has been seen to its end."""
        self._streams.pop(index).close()
        self._num_running -= 1
        if reason != REFUSED:
            tracker = self._trackers[index]
            tracker.finished(reason)
            self._context.gate.rate_limits.charge(self._requests[index].tenant, tracker.num_tokens)

    def _stop(self) -> None:
        """Ends the work, not the pieces that wait."""
        if any(tracker.has_output for tracker in self._trackers):
            self._phase = "decode"
        elif any(stream.is_started for stream in self._streams.values()):
            self._phase = "prefill"
        for task in self._tasks:
            task.cancel()
        for stream in self._streams.values():
            stream.close()

    def _notify(self) -> None:
        """The engine has something. While nobody waits for it, the reader is busy or slow."""
        if self._waiter is not None:
            self._wake()
        elif self._max_unsent is not None and self._failure is None:
            unsent = sum(stream.unsent_bytes for stream in self._streams.values())
            if unsent > self._max_unsent:
                self._context.metrics.http.buffer_overflows.inc()
                self.abort(SlowReader())

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

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
        self._wake()

    async def _open(self, index: int) -> None:
        end: str | None = "abort"  # what a cancellation leaves behind
        try:
            stream = await self._context.engine.open(self._requests[index], self._notify)
        except Exception as error:
            end = _end_of(error)
            self.abort(error)
        else:
            self._streams[index] = stream
            self._notify()  # it may have had something to say before we knew it
            return
        finally:
            if index not in self._streams:
                self._num_running -= 1
                if end != REFUSED:
                    self._trackers[index].finished(end)
                self._wake()

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            continue
        self.abort(ClientDisconnected())


def _end_of(error: Exception) -> str:
    """The label under which a failed request is counted; REFUSED when the engine never accepted it."""
    if isinstance(error, RequestError | QueueFull | NotReady):
        return REFUSED
    # CapacityError itself: it waited too long for its first step
    return "timeout" if isinstance(error, DeadlineExceeded | CapacityError) else "error"
