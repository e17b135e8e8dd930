"""Which requests a new engine process gets after the old one died, and in which company.

Most crashes have nothing to do with a request: after the first, all run again together. Those that see a second crash
are suspects: they run again one at a time, and one with which the engine dies a third time is given up. So a request
that kills the engine ends alone, and the others finish.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from engine.errors import EngineError
from engine.pooled_stream import PooledStream
from engine.stream import RequestStream

NUM_RESTARTS_TOGETHER = 1


class PoisonedRequest(EngineError):
    """The engine died each time it ran this request. Not an EngineDead, which invites clients to send it again."""


AnyStream = RequestStream | PooledStream


class Recovery:
    """Decides; `send` hands a stream's request to the engine."""

    def __init__(self, send: Callable[[AnyStream], None]) -> None:
        self._send = send
        self._suspects: deque[AnyStream] = deque()
        self._on_trial: AnyStream | None = None

    def lost(self, streams: Iterable[AnyStream]) -> None:
        """The engine process died with these requests."""
        on_trial, self._on_trial = self._on_trial, None
        self._suspects.clear()
        for stream in streams:
            if stream.is_done:
                continue  # its reader has yet to take the rest
            if stream is on_trial:
                stream.fail(PoisonedRequest("the engine ended each time it ran this request; do not send it again"))
            else:
                stream.restart()

    def ready(self, streams: Iterable[AnyStream]) -> None:
        """A new process takes requests."""
        for stream in streams:
            if stream.is_done:
                continue
            if stream.num_restarts > NUM_RESTARTS_TOGETHER:
                self._suspects.append(stream)
            else:
                self._send(stream)
        self._try_next()

    def noticed(self, stream: AnyStream) -> None:
        """The stream got further, ended or was closed: when it was on trial, the next suspect's turn has come."""
        if stream is self._on_trial and (stream.has_progressed or stream.is_done):
            stream.num_restarts = 0
            self._try_next()

    def _try_next(self) -> None:
        self._on_trial = None
        while self._suspects:
            stream = self._suspects.popleft()
            if not stream.is_done:
                self._on_trial = stream
                self._send(stream)
                return
