"""Responses that are made while nobody waits for them, and streams that read their events later."""

from __future__ import annotations

import asyncio
import logging

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from engine.errors import KvasirError
from server.chat_pipeline import ChatJob
from server.context import ServerContext
from server.errors import to_api_error
from server.generation import Generation
from server.responses.store import Cancelled, ResponseStore, StoredResponse, Turn
from server.responses.writer import ResponseWriter
from server.sse import HEADERS, KEEP_ALIVE

logger = logging.getLogger(__name__)


async def _never() -> Message:
    """In place of a client's `receive`: nobody is there who could leave."""
    message: Message = await asyncio.get_running_loop().create_future()
    return message


async def run_in_background(
    context: ServerContext, store: ResponseStore, entry: StoredResponse, writer: ResponseWriter, job: ChatJob
) -> asyncio.Task[None]:
    """Starts the job and returns. Raises what the gate raises: the work counts as in flight for its key."""
    generation = Generation(context, [job.request], _never)
    generation.labels.add(entry.id)
    await generation.__aenter__()
    entry.running = generation
    writer.queue(entry.frames)
    store.put(entry)
    return asyncio.create_task(_run(store, entry, writer, generation, job.request.client_request_id))


async def _run(
    store: ResponseStore, entry: StoredResponse, writer: ResponseWriter, generation: Generation, request_id: str
) -> None:
    frames = entry.frames
    try:
        while (pieces := await generation.take()) is not None:
            for index, output in pieces:
                writer.write(frames, index, output)
            store.log_has_grown(entry)
            entry.notify()
        writer.end(frames)
    except Cancelled:
        writer.cancel(frames)
    except Exception as error:
        if not isinstance(error, KvasirError):
            logger.error("request %s failed", request_id, exc_info=error)
        writer.fail(frames, to_api_error(error, request_id))
    finally:
        await generation.__aexit__(None, None, None)
        entry.running = None
        entry.context = Turn(entry.response["output"], entry.input)
        if store.get(entry.tenant, entry.id) is entry:  # else it was deleted
            store.put(entry)
        entry.notify()


class LogStream(Response):
    """Sends the events of a stored response from number `start` on, those to come included."""

    def __init__(self, entry: StoredResponse, start: int, ping_s: float) -> None:
        super().__init__()
        self._entry = entry
        self._next = start
        self._ping_s = ping_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        leaving = asyncio.create_task(_left(receive))
        try:
            while not leaving.done():
                if self._next < len(self._entry.log):
                    frames = self._entry.log[self._next :]
                    self._next += len(frames)
                    await send({"type": "http.response.body", "body": b"".join(frames), "more_body": True})
                elif self._entry.running is None:
                    break
                elif not await self._changes(leaving):
                    await send({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})
            scope["state"]["is_disconnected"] = leaving.done()
        finally:
            leaving.cancel()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _changes(self, leaving: asyncio.Task[None]) -> bool:
        """Waits for more, or for the client to leave. False when it took too long."""
        waiting = asyncio.create_task(self._entry.changed.wait())
        done, _ = await asyncio.wait({waiting, leaving}, timeout=self._ping_s, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        return bool(done)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue
