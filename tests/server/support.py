"""Helpers for tests of the server: an in-process client, a real server on a loopback port, and SSE parsing."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
from starlette.types import ASGIApp, Message

from engine.config import Config, Limits, ServerConfig
from server.app import create_app, make_context
from server.context import ServerContext
from server.lifecycle import DrainingServer, prepare
from tests.fakes_engine import FakeEngine

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
KEY = "k" * 32
OTHER_KEY = "o" * 32
TIMEOUT_S = 30.0  # far above what anything here takes, for busy machines


def make_config(*, limits: dict[str, Any] | None = None, **server: Any) -> Config:
    return Config(server=ServerConfig(**{"port": 0, **server}), limits=dataclasses.replace(Limits(), **(limits or {})))


@dataclasses.dataclass
class App:
    """An application without a socket."""

    engine: FakeEngine
    context: ServerContext
    http: httpx.AsyncClient
    asgi: ASGIApp

    async def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        return await self.http.post(path, json=body, headers=headers)

    async def chat(self, **fields: Any) -> httpx.Response:
        return await self.post(CHAT, {**HELLO, **fields})

    async def complete(self, **fields: Any) -> httpx.Response:
        return await self.post(COMPLETIONS, {"prompt": "ab", **fields})

    async def metrics(self) -> str:
        return (await self.http.get("/metrics")).text


@contextlib.asynccontextmanager
async def app(engine: FakeEngine | None = None, config: Config | None = None, **headers: str) -> AsyncIterator[App]:
    engine = engine or FakeEngine()
    config = config or make_config()
    context = make_context(engine, config)
    engine.on_stats = context.metrics.engine.update
    asgi = create_app(engine, config, context)
    transport = httpx.ASGITransport(app=asgi)
    async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers) as http:
        yield App(engine, context, http, asgi)


async def call(asgi: ASGIApp, method: str, path: str, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body for a path exactly as given; HTTP clients tidy paths up."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
    }
    sent: list[Message] = []

    is_read = False

    async def receive() -> Message:
        nonlocal is_read
        if is_read:
            await asyncio.Event().wait()  # the client stays
        is_read = True
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    await asgi(scope, receive, send)
    answer_headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], answer_headers, b"".join(message.get("body", b"") for message in sent[1:])


@contextlib.asynccontextmanager
async def running(engine: FakeEngine | None = None, config: Config | None = None) -> AsyncIterator[DrainingServer]:
    """A real server on a loopback port, ended as by a signal."""
    server = prepare(engine or FakeEngine(), config or make_config(drain_timeout_s=0.2))
    serving = asyncio.create_task(server.serve_to_end())
    await eventually(lambda: server.started)
    try:
        yield server
    finally:
        if not serving.done():
            server.on_signal()
        await serving


@dataclasses.dataclass
class Connection:
    """A raw HTTP/1.1 connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def post(self, path: str, body: bytes, headers: str = "") -> None:
        head = f"POST {path} HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\n{headers}"
        if "content-length" not in headers.lower() and "transfer-encoding" not in headers.lower():
            head += f"Content-Length: {len(body)}\r\n"
        self.writer.write(head.encode() + b"\r\n" + body)

    async def status(self) -> int:
        line = await asyncio.wait_for(self.reader.readline(), TIMEOUT_S)
        return int(line.split()[1]) if line else 0

    async def rest(self) -> bytes:
        return await asyncio.wait_for(self.reader.read(), TIMEOUT_S)

    async def rest_until(self, end: bytes) -> bytes:
        received = b""
        async with asyncio.timeout(TIMEOUT_S):
            while end not in received:
                data = await self.reader.read(65536)
                assert data, "the connection ended"
                received += data
        return received


@contextlib.asynccontextmanager
async def connection(server: DrainingServer, *, receive_buffer: int | None = None) -> AsyncIterator[Connection]:
    host, _, port = server.context.url.removeprefix("http://").partition(":")
    limit = receive_buffer or 2**20
    reader, writer = await asyncio.open_connection(host, int(port), limit=limit)
    try:
        yield Connection(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def eventually(condition: Callable[[], bool], timeout_s: float = TIMEOUT_S) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


def events(response: httpx.Response) -> list[Any]:
    """The data of all frames; the last one is "[DONE]". Comments are dropped."""
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    return parse_events(response.text)


def parse_events(text: str) -> list[Any]:
    assert text.endswith("\n\n")
    data = []
    for frame in text.removesuffix("\n\n").split("\n\n"):
        if frame.startswith(":"):
            continue
        assert frame.startswith("data: ")
        assert "\n" not in frame
        payload = frame.removeprefix("data: ")
        data.append(payload if payload == "[DONE]" else json.loads(payload))
    return data


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error object; fails unless it has exactly the four keys and is small."""
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert len(response.content) <= 4096
    error: dict[str, Any] = body["error"]
    return error
