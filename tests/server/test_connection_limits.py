"""Limits on heads and on slow senders, on a real socket."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.server.support import CHAT, HELLO, app, connection, error_of, make_config, running

BODY = json.dumps(HELLO).encode()
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\n"


def quick(**limits: Any) -> Any:
    return make_config(limits=limits, drain_timeout_s=0.1)


async def answer_to(config: Any, data: bytes) -> tuple[int, dict[str, Any]]:
    """Status and error of a request that the server ends by closing the connection."""
    async with running(config=config) as server, connection(server) as client:
        client.writer.write(data)
        status = await client.status()
        head, _, body = (await client.rest()).partition(b"\r\n\r\n")
        assert b"connection: close" in head.lower()
        error: dict[str, Any] = json.loads(body)["error"]
        return status, error


async def test_header_fields_are_bounded_exactly() -> None:
    async with app(config=make_config(limits={"max_header_fields": 10})) as server:
        base = len(server.http.build_request("GET", "/livez").headers)
        for count, status in ((9, 200), (10, 200), (11, 431)):
            headers = {f"x-{i}": "1" for i in range(count - base)}
            response = await server.http.get("/livez", headers=headers)
            assert response.status_code == status
        assert error_of(response)["code"] == "too_many_headers"


async def test_the_url_is_bounded_exactly() -> None:
    async with app(config=make_config(limits={"max_url_bytes": 100})) as server:
        for query_bytes, status in ((93, 200), (94, 200), (95, 400)):  # /livez has six
            response = await server.http.get("/livez?" + "x" * query_bytes)
            assert response.status_code == status


async def test_a_head_that_is_too_large_is_refused() -> None:
    data = b"GET /livez HTTP/1.1\r\nHost: t\r\nX-Big: " + b"x" * 2000
    status, error = await answer_to(quick(max_header_bytes=1024), data)
    assert (status, error["code"]) == (400, "invalid_http")


@pytest.mark.parametrize("data", [b"\x00\x01\x02\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/1.1\r\nbad header\r\n\r\n"])
async def test_bytes_that_are_not_http_are_refused(data: bytes) -> None:
    status, error = await answer_to(quick(), data)
    assert (status, error["code"]) == (400, "invalid_http")


async def test_a_head_that_does_not_arrive_gets_408() -> None:
    status, error = await answer_to(quick(header_timeout_s=0.2), b"POST /v1/chat/completions HTTP/1.1\r\nHost:")
    assert (status, error["code"]) == (408, "request_timeout")


async def test_a_connection_that_says_nothing_is_closed() -> None:
    async with running(config=quick(header_timeout_s=0.2)) as server, connection(server) as client:
        assert await client.rest() == b""


async def test_a_body_that_does_not_arrive_gets_408() -> None:
    status, error = await answer_to(quick(body_timeout_s=0.2), HEAD + b"Content-Length: 50\r\n\r\n{")
    assert (status, error["code"]) == (408, "request_timeout")


async def test_a_body_in_drops_within_the_time_is_fine() -> None:
    async with running() as server, connection(server) as client:
        client.post(CHAT, b"", f"Content-Length: {len(BODY)}\r\n")
        for i in range(0, len(BODY), 10):
            client.writer.write(BODY[i : i + 10])
            await asyncio.sleep(0.001)
        assert await client.status() == 200


async def test_a_declared_size_above_the_limit_is_refused_before_the_body_comes() -> None:
    status, error = await answer_to(quick(max_body_bytes=1000), HEAD + b"Content-Length: 1001\r\n\r\n")
    assert (status, error["type"]) == (413, "request_too_large")


async def test_a_chunked_body_is_counted_as_it_arrives() -> None:
    """The sender hears 413 although it never stops sending and declared no size."""
    async with running(config=quick(max_body_bytes=100_000)) as server, connection(server) as client:
        client.post(CHAT, b"", "Transfer-Encoding: chunked\r\n")
        chunk = b"1000\r\n" + b" " * 4096 + b"\r\n"
        for _ in range(100):
            client.writer.write(chunk)
        client.writer.write(b"0\r\n\r\n")
        assert await client.status() == 413


async def test_the_connection_stays_usable_after_an_ordinary_error() -> None:
    async with running() as server, connection(server) as client:
        for body, status in ((b"{", 400), (BODY, 200), (b"[]", 400)):
            client.post(CHAT, body)
            assert await client.status() == status
            length = 0
            while (line := await client.reader.readline()) != b"\r\n":
                name, _, value = line.decode().partition(":")
                length = int(value) if name.lower() == "content-length" else length
            await client.reader.readexactly(length)


async def test_slow_senders_do_not_hold_up_others() -> None:
    async with running() as server, connection(server) as slow, connection(server) as other:
        slow.post(CHAT, b"{", "Content-Length: 100\r\n")
        other.post(CHAT, BODY)
        assert await other.status() == 200
