"""Server-sent events: from engine outputs to frames on the wire. Knows no fields of any route."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from engine.types import GenerationRequest, TextOutput
from server.context import ServerContext
from server.errors import ApiError, ClientDisconnected, to_api_error
from server.generation import Generation
from server.http_protocol import WRITE_EXTENSION
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


def named_frame(name: str, data: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode("ascii"), encode(data))


class TextFrames:
    """The chunk that most tokens become: all of it but the text is encoded once per choice."""

    def __init__(self, head: Mapping[str, Any], field: str, rest: bytes) -> None:
        """
        head    the members of the chunk that come before `choices`
        field   what stands between the choice's index and the text: `"text":`, for instance
        rest    what follows the text, to the end of the chunk, without its closing brace
        """
        self._head = b"data: " + encode(head)[:-1] + b',"choices":[{"index":'
        self._field = field.encode()
        self._rest = rest + b"}\n\n"
        self._prefixes: dict[int, bytes] = {}

    def __call__(self, choice: int, text: str) -> bytes:
        prefix = self._prefixes.get(choice)
        if prefix is None:
            prefix = self._prefixes[choice] = b"%b%d,%b" % (self._head, choice, self._field)
        return prefix + encode(text) + self._rest


class Wording:
    """What a stream has besides its chunks, in the OpenAI form. Other APIs bring a form of their own."""

    keep_alive = KEEP_ALIVE
    done = DONE

    def failure(self, error: ApiError) -> bytes:
        """The frames that tell of an error after the head of the answer was sent."""
        return frame(error.body())


class EventStream(Response):
    """Streams a generation that has already begun, and leaves its context when it ends, however it ends.

    The first pieces are given, so that an error before them could still become an HTTP status. All pieces that arrived
    while the socket was busy go out in one write.
    """

    def __init__(
        self,
        generation: Generation,
        writer: ChunkWriter,
        first: Sequence[Piece] | None,
        ping_s: float,
        wording: Wording,
    ) -> None:
        super().__init__()
        self._generation = generation
        self._writer = writer
        self._first = first
        self._ping_s = ping_s
        self._wording = wording

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        last = b""
        try:
            await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
            last = await self._stream(send, scope.get("extensions", {}).get(WRITE_EXTENSION))
        except ClientDisconnected:
            scope["state"]["is_disconnected"] = True
        except Exception as error:
            api_error = to_api_error(error, scope["state"]["request_id"])
            if api_error.error["code"] == "internal_error":
                logger.error("request %s failed", scope["state"]["request_id"], exc_info=error)
            last = self._wording.failure(api_error)  # and nothing after it: `done` follows a finish_reason
        finally:
            await self._generation.__aexit__(None, None, None)
        await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _stream(self, send: Send, write: Callable[[bytes], bool] | None) -> bytes:
        """Returns the last bytes, which are sent once the generation is over."""
        take, write_chunk = self._generation.take, self._writer.write
        pieces: Sequence[Piece] | None = self._first
        frames: list[bytes] = []
        while pieces is not None:
            for index, output in pieces:
                write_chunk(frames, index, output)
            if not pieces:
                frames.append(self._wording.keep_alive)
            if frames:
                data = frames[0] if len(frames) == 1 else b"".join(frames)
                if write is None or not write(data):
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                frames = []
            pieces = await take(self._ping_s)
        self._writer.end(frames)
        frames.append(self._wording.done)
        return b"".join(frames)


async def stream_answer(
    context: ServerContext,
    requests: Sequence[GenerationRequest],
    request: Request,
    writer: ChunkWriter,
    wording: Wording | None = None,
    *,
    answer_id: str = "",
) -> EventStream:
    """Runs the requests behind one HTTP request and streams what `writer` makes of their outputs.

    answer_id   the id in the answer, by which an operator may end it
    Raises what the engine raised before the first piece.
    """
    generation = Generation(context, requests, request.receive, max_unsent_bytes=context.config.limits.max_unsent_bytes)
    generation.labels.add(answer_id)
    return await start_stream(generation, writer, context.config.server.sse_ping_s, wording)


async def start_stream(
    generation: Generation, writer: ChunkWriter, ping_s: float, wording: Wording | None = None
) -> EventStream:
    """Waits for the first piece, but not longer than a proxy would wait for the response head.

    Raises what the engine raised before the first piece.
    """
    await generation.__aenter__()
    try:
        first = await generation.take(ping_s)
    except BaseException:
        await generation.__aexit__(None, None, None)
        raise
    return EventStream(generation, writer, first, ping_s, wording or Wording())
