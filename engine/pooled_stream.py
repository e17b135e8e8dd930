"""The client's side of one running pooling request: its single output, however often the engine process restarts.

The twin of `engine.stream.RequestStream` for requests that have no text.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from engine.error_codes import to_exception
from engine.errors import KvasirError
from engine.submission import with_time_left
from engine.types import EngineRequest, PooledOutput, TokenOutput


class PooledStream:
    """One request. Numbers depend on the prompt alone, so a new engine process simply computes them again."""

    def __init__(self, request: EngineRequest, abort: Callable[[str, int | None], None]) -> None:
        """abort(request_id, choice) tells the core that nobody wants the result any more."""
        self.request = request
        self.num_restarts = 0
        self.is_started = False
        self._created_s = time.monotonic()
        self._abort = abort
        self._output: PooledOutput | None = None
        self._error: KvasirError | None = None
        self._ended = asyncio.Event()

    @property
    def is_done(self) -> bool:
        return self._output is not None or self._error is not None

    @property
    def has_output(self) -> bool:
        return self._output is not None

    @property
    def has_progressed(self) -> bool:
        return self.has_output

    @property
    def done_choices(self) -> list[int]:
        return [0] if self.is_done else []

    def push(self, output: TokenOutput) -> None:
        if self.is_done:
            return
        if output.pooled is None:
            self.fail(to_exception(output.error or "internal_error"))
            return
        self._output = PooledOutput(
            data=output.pooled,
            shape=output.pooled_shape,
            num_prompt_tokens=len(self.request.prompt_token_ids),
            num_cached_tokens=output.num_cached_tokens or 0,
            queued_s=output.queued_s,
            num_preemptions=output.num_preemptions,
        )
        self._ended.set()

    def to_send(self) -> EngineRequest:
        """The request for the core, with what is left of its time."""
        return with_time_left(self.request, self._created_s)

    def restart(self) -> None:
        """The engine process is gone; the next one will get the request from its beginning."""
        self.num_restarts += 1

    def fail(self, error: KvasirError) -> None:
        """Ends the request for whoever waits. The core is told to drop it."""
        if not self.is_done:
            self._error = error
            self._abort(self.request.request_id, None)
            self._ended.set()

    def close(self) -> None:
        """Nobody waits any more."""
        self.fail(to_exception("aborted", "the reader left"))

    async def result(self) -> PooledOutput:
        """Waits for the output. Raises what `fail` was given."""
        await self._ended.wait()
        if self._error is not None:
            raise self._error
        assert self._output is not None
        return self._output
