"""An HTTP server whose answers are scripted, to see what the client makes of good and bad ones."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

Script = Callable[[dict[str, Any]], list[bytes | float | None]]  # pieces, seconds to wait, None: cut the connection


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def answer(body: dict[str, Any], text: str = "word ") -> list[bytes | float | None]:
    """What a good server says: a piece per token, the usage, the end."""
    is_chat = "messages" in body
    piece: dict[str, Any] = {"delta": {"content": text}} if is_chat else {"text": text}
    count = body["max_tokens"]
    prompt = body.get("prompt") or ""
    num_prompt = len(prompt) if isinstance(prompt, list) else 7
    pieces: list[bytes | float | None] = [event(choices=[piece]) for _ in range(count)]
    pieces.append(event(choices=[{"finish_reason": "length"}]))
    pieces.append(event(choices=[], usage={"prompt_tokens": num_prompt, "completion_tokens": count}))
    return [*pieces, b"data: [DONE]\n\n"]


@contextlib.asynccontextmanager
async def scripted(script: Script, bodies: list[dict[str, Any]] | None = None) -> AsyncIterator[str]:
    """Yields the URL. `bodies` receives what was sent."""

    is_over = asyncio.Event()
    handlers: set[asyncio.Task[Any]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handlers.add(asyncio.current_task())  # type: ignore[arg-type]
        with contextlib.closing(writer), contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while head := await reader.readuntil(b"\r\n\r\n"):
                fields = head.decode().lower().split("\r\n")
                length = next((int(f.partition(":")[2]) for f in fields if f.startswith("content-length")), 0)
                body = json.loads(await reader.readexactly(length) or b"{}")
                if bodies is not None:
                    bodies.append(body)
                await _answer(writer, script(body), is_over)

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    async with server:
        yield f"http://{host}:{port}"
        is_over.set()
        await asyncio.gather(*handlers)


async def _answer(writer: asyncio.StreamWriter, pieces: list[bytes | float | None], is_over: asyncio.Event) -> None:
    if pieces and isinstance(pieces[0], bytes) and pieces[0].startswith(b"HTTP/"):
        writer.write(pieces[0])
        await writer.drain()
        return
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
    for piece in pieces:
        if piece is None:
            writer.transport.abort()
            raise ConnectionError("cut, as scripted")
        if isinstance(piece, float):
            await writer.drain()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(is_over.wait(), piece)
        else:
            writer.write(b"%x\r\n%s\r\n" % (len(piece), piece))
    writer.write(b"0\r\n\r\n")
    await writer.drain()
