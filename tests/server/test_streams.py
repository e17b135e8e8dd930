"""Streams under trouble: errors before and after the first token, silence, slow readers, clients that leave."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from engine import errors
from engine.recovery import PoisonedRequest
from tests.fakes_engine import FakeEngine
from tests.server.support import (
    CHAT,
    COMPLETIONS,
    HELLO,
    TIMEOUT_S,
    app,
    connection,
    error_of,
    events,
    eventually,
    make_config,
    parse_events,
    running,
)

FAULTS: list[tuple[errors.KvasirError | Exception, int, str, str | None, dict[str, str]]] = [
    (errors.PromptTooLong("too long", param="messages"), 400, "invalid_request_error", "context_length_exceeded", {}),
    (errors.TemplateError("no", param="messages"), 400, "invalid_request_error", "template_error", {}),
    (errors.QueueFull("full", retry_after_s=99), 429, "rate_limit_error", "queue_full", {"retry-after": "30"}),
    (
        errors.CapacityError("waited", retry_after_s=7),
        503,
        "server_overloaded",
        "server_overloaded",
        {"retry-after": "7"},
    ),
    (errors.NotReady("loading"), 503, "unavailable_error", "loading", {"retry-after": "1"}),
    (errors.DeadlineExceeded("late"), 504, "timeout_error", "deadline_exceeded", {"x-should-retry": "false"}),
    (errors.NumericalError("nan"), 500, "server_error", "numerical_error", {"x-should-retry": "false"}),
    (PoisonedRequest("again"), 500, "server_error", "internal_error", {"x-should-retry": "false"}),
    (errors.EngineDead("dead"), 503, "server_error", "engine_dead", {"retry-after": "5"}),
    (ValueError("secret /path/0xdeadbeef"), 500, "server_error", "internal_error", {"x-should-retry": "false"}),
]


@pytest.mark.parametrize(("fault", "status", "kind", "code", "headers"), FAULTS, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("stream", [False, True])
async def test_an_error_before_the_first_token_is_a_real_status(
    fault: Exception, status: int, kind: str, code: str, headers: dict[str, str], stream: bool
) -> None:
    async with app(FakeEngine(error=fault)) as server:
        response = await server.chat(stream=stream)
        assert response.status_code == status
        error = error_of(response)
        assert (error["type"], error["code"]) == (kind, code)
        assert {name: response.headers[name] for name in headers} == headers
        if isinstance(fault, ValueError):
            assert "secret" not in response.text
            assert response.headers["x-request-id"] in error["message"]
        assert server.context.gate.num_in_flight == 0


@pytest.mark.parametrize(("fault", "status", "kind", "code", "headers"), FAULTS, ids=lambda value: type(value).__name__)
async def test_an_error_after_the_first_token_is_a_frame_and_the_end(
    fault: Exception, status: int, kind: str, code: str, headers: dict[str, str]
) -> None:
    async with app(FakeEngine(error=fault, error_after=3, delay_s=0.001)) as server:
        response = await server.chat(stream=True)
        assert response.status_code == 200
        *chunks, failure = events(response)
        assert set(failure["error"]) == {"message", "type", "param", "code"}
        assert (failure["error"]["type"], failure["error"]["code"]) == (kind, code)
        assert "secret" not in response.text
        assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks)
        whole = await server.complete()
        assert whole.status_code == status, "an answer that is not streamed has nothing to save"


async def test_one_failing_prompt_ends_the_request_and_aborts_the_others() -> None:
    engine = FakeEngine(delay_s=0.01, error=errors.NumericalError("nan"), error_after=6, error_once=True)
    async with app(engine) as server:
        response = await server.complete(prompt=["a", "b", "c"])
        assert response.status_code == 500
        assert engine.num_active == 0
        assert len(engine.aborted) == 2


async def test_comments_are_sent_while_nothing_happens_and_later_errors_are_frames() -> None:
    engine = FakeEngine()
    engine.hold = asyncio.Event()
    async with (
        running(engine, make_config(sse_ping_s=0.05, drain_timeout_s=0.1)) as server,
        connection(server) as client,
    ):
        client.post(CHAT, json.dumps({**HELLO, "stream": True}).encode())
        assert await client.status() == 200
        received = b""
        while received.count(b": keep-alive\n\n") < 3:
            received += await asyncio.wait_for(client.reader.read(1000), TIMEOUT_S)
        assert b"data:" not in received
        engine.error, engine.error_after = errors.EngineDead("gone"), 1
        engine.hold.set()
        while b'"code":"engine_dead"' not in received:
            received += await asyncio.wait_for(client.reader.read(1000), TIMEOUT_S)
        assert b"[DONE]" not in received


BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "streamed": (CHAT, {**HELLO, "stream": True}),
    "whole": (CHAT, HELLO),
    "n": (CHAT, {**HELLO, "n": 8, "stream": True}),
    "prompts": (COMPLETIONS, {"prompt": ["a", "b", "c"], "n": 2}),
    "prompts streamed": (COMPLETIONS, {"prompt": ["a", "b", "c"], "stream": True}),
}


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("moment", ["queued", "decoding"])
async def test_a_client_that_leaves_aborts_everything(name: str, moment: str) -> None:
    path, body = BODIES[name]
    num_requests = len(body["prompt"]) if "prompt" in body else 1
    engine = FakeEngine(["x"] * 1000, delay_s=0.005, max_model_len=2000)
    if moment == "queued":
        engine.hold = asyncio.Event()
    async with running(engine) as server:
        async with connection(server) as client:
            client.post(path, json.dumps({"max_tokens": 1000, **body}).encode())
            await eventually(lambda: engine.num_active == num_requests)
            if moment == "decoding":
                await eventually(lambda: engine.num_yielded > 10)
        await eventually(lambda: engine.num_active == 0)
        assert len(engine.aborted) == num_requests
        await eventually(lambda: server.context.gate.num_in_flight == 0)
        phase = "queued" if moment == "queued" else "decode"
        await eventually(lambda: server.context.metrics.http.disconnects[phase]._value.get() == 1.0)
        assert server.context.metrics.requests.finished["abort"]._value.get() == num_requests
        async with connection(server) as client:
            engine.hold, engine.delay_s = None, 0.0
            client.post(CHAT, json.dumps({**HELLO, "max_tokens": 1}).encode())
            assert await client.status() == 200, "the next request runs"


async def test_a_client_that_leaves_while_sending_its_body_starts_nothing() -> None:
    engine = FakeEngine()
    async with running(engine) as server:
        async with connection(server) as client:
            client.post(CHAT, b'{"messages', "Content-Length: 1000\r\n")
            await client.writer.drain()
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.05)
        assert not engine.seen


async def test_output_for_a_reader_that_does_not_read_is_bounded() -> None:
    """The engine's stream ends at the bound, not when the reader comes back; what was sent stays readable."""
    engine = FakeEngine(["x" * 1000] * 50_000, max_model_len=100_000)
    limits = {"max_unsent_bytes": 64 * 1024}
    config = make_config(limits=limits, drain_timeout_s=0.1)
    async with running(engine, config) as server, connection(server, receive_buffer=1024) as client:
        engine.delay_s = 0.00001
        client.post(CHAT, json.dumps({**HELLO, "stream": True, "max_tokens": 50_000}).encode())
        await eventually(lambda: engine.num_yielded > 0)
        await eventually(lambda: engine.num_active == 0)
        assert server.context.metrics.http.buffer_overflows._value.get() == 1.0
        assert engine.num_yielded < 50_000
        await client.rest_until(b'"code":"slow_reader"')
    assert engine.aborted


async def test_a_reader_that_stalls_is_dropped() -> None:
    engine = FakeEngine(["x" * 1000] * 50_000, delay_s=0.00001, max_model_len=100_000)
    limits = {"read_stall_s": 0.3, "max_unsent_bytes": 1 << 30}
    async with running(engine, make_config(limits=limits, drain_timeout_s=0.1)) as server:
        async with connection(server, receive_buffer=1024) as client:
            client.post(CHAT, json.dumps({**HELLO, "stream": True, "max_tokens": 50_000}).encode())
            await eventually(lambda: engine.num_active == 1)
            await eventually(lambda: engine.num_active == 0)
        assert len(engine.aborted) == 1


async def test_many_tokens_at_once_share_a_chunk() -> None:
    async with app(FakeEngine(["x"] * 200, max_model_len=1000)) as server:
        chunks = events(await server.chat(stream=True, max_tokens=200))
        assert len(chunks) < 20


async def test_a_stream_over_a_socket_is_well_formed() -> None:
    async with running(FakeEngine(delay_s=0.002)) as server, connection(server) as client:
        client.post(CHAT, json.dumps({**HELLO, "stream": True}).encode(), "Connection: close\r\n")
        assert await client.status() == 200
        head, _, body = (await client.rest()).partition(b"\r\n\r\n")
        assert b"server:" not in head.lower()
        assert b"x-content-type-options: nosniff" in head.lower()
        text = b"".join(body.split(b"\r\n")[1::2]).decode()  # chunked transfer: size, data, size, data
        assert parse_events(text)[-1] == "[DONE]"
