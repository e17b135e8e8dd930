"""Server-sent events: from engine outputs to frames on the wire. Knows no fields of any route."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from engine.types import TextOutput
from server.errors import ClientDisconnected, to_api_error
from server.generation import Generation
from server.outputs import Piece

logger = logging.getLogger(__name__)

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
encode = msgspec.json.Encoder().encode


class ChunkWriter(Protocol):
    """Words the chunks of one route."""

    def write(self, frames: list[bytes], index: int, output: TextOutput) -> None:
        """Appends the frames for a piece of prompt `index`: none, one or several."""

    def end(self, frames: list[bytes]) -> None:
        """Appends what comes after the last choice has finished."""


def frame(data: Any) -> bytes:
    return b"data: " + encode(data) + b"\n\n"


class EventStream(Response):
    """Streams a generation that has already begun, and leaves its context when it ends, however it ends.

    The first pieces are given, so that an error before them could still become an HTTP status. All pieces that arrived
    while the socket was busy go out in one write.
    """

    def __init__(
        self, generation: Generation, writer: ChunkWriter, first: Sequence[Piece] | None, ping_s: float
    ) -> None:
        super().__init__()
        self._generation = generation
        self._writer = writer
        self._first = first
        self._ping_s = ping_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        last = b""
        try:
            await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
            last = await self._stream(send)
        except ClientDisconnected:
            scope["state"]["is_disconnected"] = True
        except Exception as error:
            api_error = to_api_error(error, scope["state"]["request_id"])
            if api_error.error["code"] == "internal_error":
                logger.error("request %s failed", scope["state"]["request_id"], exc_info=error)
            last = frame(api_error.body()) + DONE
        finally:
            await self._generation.__aexit__(None, None, None)
        await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _stream(self, send: Send) -> bytes:
        """Returns the last bytes, which are sent once the generation is over."""
        pieces: Sequence[Piece] | None = self._first
        frames: list[bytes] = []
        while pieces is not None:
            for index, output in pieces:
                self._writer.write(frames, index, output)
            if not pieces:
                frames.append(KEEP_ALIVE)
            if frames:
                await send({"type": "http.response.body", "body": b"".join(frames), "more_body": True})
                frames = []
            pieces = await self._generation.take(self._ping_s)
        self._writer.end(frames)
        frames.append(DONE)
        return b"".join(frames)


async def start_stream(generation: Generation, writer: ChunkWriter, ping_s: float) -> EventStream:
    """Waits for the first piece, but not longer than a proxy would wait for the response head.

    Raises what the engine raised before the first piece.
    """
    await generation.__aenter__()
    try:
        first = await generation.take(ping_s)
    except BaseException:
        await generation.__aexit__(None, None, None)
        raise
    return EventStream(generation, writer, first, ping_s)
