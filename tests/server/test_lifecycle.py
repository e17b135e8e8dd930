"""Start, drain, forced exit, and an engine that is gone."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from engine.config import Config, RuntimeConfig, ServerConfig
from engine.errors import ConfigError
from server.lifecycle import bind, check_exposure, prepare
from tests.fakes_engine import FakeEngine
from tests.server.support import CHAT, HELLO, KEY, app, connection, eventually, make_config, parse_events

SLOW = ["x"] * 1000
CHILD = """
import asyncio, sys
from server.lifecycle import prepare
from tests.fakes_engine import FakeEngine
from tests.server.support import make_config

async def main():
    server = prepare(FakeEngine(["x"] * 1000, delay_s=0.01, max_model_len=2000), make_config(drain_timeout_s=30))
    print(server.context.url, flush=True)
    return await server.serve_to_end()

sys.exit(asyncio.run(main()))
"""


async def test_the_first_signal_lets_running_work_finish_and_refuses_new() -> None:
    engine = FakeEngine(["x"] * 40, delay_s=0.01)
    server = prepare(engine, make_config(drain_timeout_s=20))
    serving = asyncio.create_task(server.serve_to_end())
    await eventually(lambda: server.started)
    async with httpx.AsyncClient(base_url=server.context.url) as http:
        running = asyncio.create_task(http.post(CHAT, json=HELLO))
        await eventually(lambda: engine.num_yielded > 0)
        server.on_signal()
        refused = await http.post(CHAT, json=HELLO)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "draining"
        assert (await http.get("/readyz")).status_code == 503
        assert (await http.get("/livez")).status_code == 200
        answer = await running
        assert answer.status_code == 200
        assert answer.json()["usage"]["completion_tokens"] == 40
    assert await serving == 0
    assert engine.is_stopped


async def test_after_the_drain_time_the_rest_gets_an_error() -> None:
    engine = FakeEngine(SLOW, delay_s=0.01, max_model_len=2000)
    server = prepare(engine, make_config(drain_timeout_s=0.2))
    serving = asyncio.create_task(server.serve_to_end())
    await eventually(lambda: server.started)
    body = {**HELLO, "max_tokens": 1000}
    async with httpx.AsyncClient(base_url=server.context.url) as http:
        whole = asyncio.create_task(http.post(CHAT, json=body))
        streamed = asyncio.create_task(http.post(CHAT, json={**body, "stream": True}))
        await eventually(lambda: engine.num_active == 2 and engine.num_yielded > 2)
        began_at = time.monotonic()
        server.on_signal()
        assert (await whole).status_code == 503
        *_, failure = parse_events((await streamed).text)
        assert failure["error"]["code"] == "draining"
    assert await serving == 0
    assert time.monotonic() - began_at < 10
    assert len(engine.aborted) == 2


async def test_an_engine_that_is_dead_for_good_ends_the_server_with_code_1() -> None:
    engine = FakeEngine(SLOW, delay_s=0.01, max_model_len=2000)
    server = prepare(engine, make_config())
    serving = asyncio.create_task(server.serve_to_end())
    await eventually(lambda: server.started)
    async with httpx.AsyncClient(base_url=server.context.url) as http:
        running = asyncio.create_task(http.post(CHAT, json=HELLO))
        await eventually(lambda: engine.num_active == 1)
        engine.state.phase = "dead"
        assert (await running).status_code == 503
    assert await asyncio.wait_for(serving, 20) == 1


async def test_an_engine_that_never_started_is_a_config_error_with_its_reason() -> None:
    engine = FakeEngine(phase="loading")
    server = prepare(engine, make_config())
    serving = asyncio.create_task(server.serve_to_end())
    await eventually(lambda: server.started)
    engine.state.phase, engine.state.detail = "dead", "the model folder is empty"
    engine._info = None  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="folder is empty"):
        await asyncio.wait_for(serving, 20)


@pytest.fixture
def child() -> object:
    """A server in a process of its own, with its URL."""
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    yield process, url
    process.kill()
    process.wait()
    process.stdout.close()


def begin_stream(url: str) -> socket.socket:
    """A request that has received its first token."""
    host, _, port = url.removeprefix("http://").partition(":")
    body = json.dumps({**HELLO, "stream": True, "max_tokens": 200}).encode()
    client = socket.create_connection((host, int(port)), timeout=20)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    client.sendall(head.encode() + body)
    while b"data:" not in client.recv(65536):
        continue
    return client


def test_sigterm_drains_and_exits_with_0(child: tuple[subprocess.Popen[str], str]) -> None:
    process, url = child
    with begin_stream(url) as client:
        process.send_signal(signal.SIGTERM)
        received = b""
        while data := client.recv(65536):
            received += data
        assert b"[DONE]" in received
        assert b'"error"' not in received
    assert process.wait(timeout=20) == 0


def test_a_second_signal_exits_within_two_seconds(child: tuple[subprocess.Popen[str], str]) -> None:
    process, url = child
    with begin_stream(url):
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        began_at = time.monotonic()
        assert process.wait(timeout=20) == 1
        # two seconds on a machine of one's own; the drain would have taken thirty
        assert time.monotonic() - began_at < 8


async def test_the_port_answers_while_the_model_loads() -> None:
    engine = FakeEngine(phase="loading")
    server = prepare(engine, make_config(drain_timeout_s=0.1))
    serving = asyncio.create_task(server.serve_to_end())
    await eventually(lambda: server.started)
    async with connection(server) as client:
        client.writer.write(b"GET /readyz HTTP/1.1\r\nHost: t\r\n\r\n")
        assert await client.status() == 503
    server.on_signal()
    assert await serving == 0


def test_a_port_in_use_is_one_clear_line() -> None:
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port {port} of '127.0.0.1': Address already in use; .*--port"):
            bind("127.0.0.1", port)
        with pytest.raises(ConfigError, match="another with --metrics-port"):
            bind("127.0.0.1", port, flag="--metrics-port")


@pytest.mark.parametrize(("host", "port"), [("no.such.host.invalid", 0), ("127.0.0.1", 70000), ("203.0.113.7", 0)])
def test_an_address_that_cannot_be_bound_is_a_config_error(host: str, port: int) -> None:
    with pytest.raises(ConfigError, match=r"host|port"):
        bind(host, port)


def test_a_public_address_needs_keys_or_an_explicit_word() -> None:
    for host in ("127.0.0.1", "::1", "localhost", "127.8.8.8"):
        check_exposure(Config(server=ServerConfig(host=host)))
    for host in ("0.0.0.0", "::", "", "192.168.1.1", "example.org"):
        with pytest.raises(ConfigError, match="api-key"):
            check_exposure(Config(server=ServerConfig(host=host)))
        check_exposure(Config(server=ServerConfig(host=host, api_keys=(KEY,))))
        check_exposure(Config(server=ServerConfig(host=host, allow_unauthenticated=True)))
        with pytest.raises(ConfigError, match="faults"):
            check_exposure(Config(server=ServerConfig(host=host, api_keys=(KEY,)), runtime=RuntimeConfig(faults="x")))


async def test_an_engine_that_is_not_heard_of_makes_the_server_unready_and_not_unhealthy() -> None:
    engine = FakeEngine()
    async with app(engine, make_config(ready_heartbeat_s=3.0)) as server:
        assert (await server.http.get("/readyz")).status_code == 200
        engine.heartbeat_age_s = 3.1
        for path in ("/readyz", "/ready"):
            answer = await server.http.get(path)
            assert answer.status_code == 503
            assert answer.json()["status"] == "unresponsive"
        assert (await server.http.get("/health")).status_code == 200
        assert (await server.chat()).status_code == 200, "requests wait for it all the same"
        engine.heartbeat_age_s = 0.1
        assert (await server.http.get("/readyz")).status_code == 200
